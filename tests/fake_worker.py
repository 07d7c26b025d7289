"""A worker whose training is a slow pretence: `python tests/fake_worker.py FOLDER [--resume]`. Also used in-process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from reparam_diffusion import events as e
from reparam_diffusion.config import TrainConfig
from reparam_diffusion.jobs import worker
from reparam_diffusion.training.processes import join_processes


def fake_train(
    config: TrainConfig, *, stop: Callable[[], str | bool], folder: Path, resume: bool = False
) -> Iterator[e.Event]:
    """The loop's manners without its work: ten milliseconds a step, a checkpoint each five steps; also as several."""
    processes = join_processes(torch.device("cpu"))
    total = config.training.steps
    kept = sorted((folder / "checkpoints").glob("*"), key=lambda place: int(place.name))
    first = int(kept[-1].name) if resume and kept else 0
    yield e.Launched(os.getpid(), str(folder))
    yield e.Started(config.adapter.method, total, first + 1, 3, 100, 200, "cpu", "fp32", 2, processes=processes.ranks)
    for step in range(first + 1, total + 1):
        request = processes.agree(str(stop()))
        if request == "pause":
            yield e.Paused(step - 1)
            return
        if request:
            (folder / "adapter.safetensors").write_bytes(b"half")
            yield e.Stopped(step - 1, "adapter.safetensors")
            return
        time.sleep(0.01)
        yield e.Step(step, 1.0 / step, {"unet": 1e-4}, 0.01, 1.0)
        if step % 5 == 0 and processes.is_main:
            (folder / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
            yield e.Saved(step, f"checkpoints/{step}", "checkpoint")
    (folder / "adapter.safetensors").write_bytes(f"whole {config.training.seed}".encode())
    yield e.Finished(total, "adapter.safetensors", 1.0)


if __name__ == "__main__":
    sys.exit(worker.main(train=fake_train))
