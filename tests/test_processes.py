"""Two processes train what one does with the batch of both, bit-equal to each other; whoever is killed, it is told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import save_pictures, save_tiny

from reparam_diffusion.config import parse_set, settle, to_toml
from reparam_diffusion.events import Step
from reparam_diffusion.training.loop import train

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import json, os, sys, torch
from pathlib import Path
from reparam_diffusion.config import read_settings, settle
from reparam_diffusion.events import Step
from reparam_diffusion.training.learner import Learner
from reparam_diffusion.training.loop import train
torch.set_num_threads(1)
learners = []
init = Learner.__init__
def remembered(self, *args):
    init(self, *args)
    learners.append(self)
Learner.__init__ = remembered
folder = Path(sys.argv[2])
events = list(train(settle(read_settings(Path(sys.argv[1]))), folder=folder))
torch.save([p.detach() for p in learners[0].parameters], folder / f"rank{os.environ['RANK']}.pt")
print(json.dumps([event.loss for event in events if isinstance(event, Step)]))
"""


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_two_processes_learn_what_one_learns_with_the_batch_doubled(method: str, tmp_path: Path) -> None:
    model, pictures = save_tiny(tmp_path / "model", "sd1"), save_pictures(tmp_path / "pictures", count=4)
    settings = [
        f"model.path='{model}'", "model.precision=fp32", "model.device=cpu", f"data.images='{pictures}'", "data.trigger=sks",
        f"adapter.method={method}", "training.steps=10", "training.accumulation=2", "data.flip=true", "training.ema=0.9",
        "output.file_precision=fp32", "output.sample_every=1000", "output.validate_every=5", "targets.text_encoder=attention",
    ]  # fmt: skip
    one = settle(parse_set([*settings, "training.batch=2"]))
    alone = [event.loss for event in train(one, folder=tmp_path / "one") if isinstance(event, Step)]
    config = tmp_path / "config.toml"
    config.write_text(to_toml(settle(parse_set(settings))), encoding="utf-8")
    (tmp_path / "two").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(config), str(tmp_path / "two")],
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert said[0] == said[1], "both tell the mean loss"
    assert json.loads(said[0]) == pytest.approx(alone, abs=1e-5)
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    whole, together = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    assert whole.keys() == together.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(tensor, together[key], rtol=0, atol=1e-4)
