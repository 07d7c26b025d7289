"""A training process that kills itself hard after some steps: `python slow_train_process.py FOLDER CONFIG KILL_AT`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from reparam_diffusion.config import read_settings, settle
from reparam_diffusion.events import Step
from reparam_diffusion.training.loop import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, config, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for event in train(settle(read_settings(config)), folder=folder):
        if isinstance(event, Step) and event.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
