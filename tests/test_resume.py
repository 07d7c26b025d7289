"""kill -9 in the middle and resume: bit for bit what an undisturbed run gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import save_pictures, save_tiny

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import parse_set, settle, to_toml
from reparam_diffusion.events import Step
from reparam_diffusion.training.loop import train

ROOT = Path(__file__).resolve().parent.parent


def run_and_kill(folder: Path, config: Path, *, at: int) -> int:
    script = Path(__file__).with_name("slow_train_process.py")
    arguments = [str(folder), str(config), str(at)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *arguments], env=environment, check=False
    ).returncode


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_13_and_resumed_from_10_equals_20_steps(method: str, tmp_path: Path) -> None:
    model, pictures = save_tiny(tmp_path / "model", "sd1"), save_pictures(tmp_path / "pictures")
    settings = [
        f"model.path='{model}'", "model.precision=fp32", f"data.images='{pictures}'", "data.trigger=sks", "data.flip=true",
        f"adapter.method={method}", "targets.text_encoder=attention", "training.steps=20", "training.batch=2",
        "training.ema=0.9", "training.learning_rate=0.01", "output.checkpoint_every=10", "output.sample_every=1000",
        "output.validate_every=1000", "output.file_precision=fp32", "data.shuffle_tags=true",
    ]  # fmt: skip
    if method == "lora":
        settings += ["adapter.dropout=0.2", "adapter.weight_decompose=true", "embedding.vectors=2"]
    config = tmp_path / "config.toml"
    total = settle(parse_set(settings))
    config.write_text(to_toml(total), encoding="utf-8")
    assert run_and_kill(tmp_path / "cut", config, at=13) == -signal.SIGKILL
    events = list(train(total, folder=tmp_path / "cut", resume=True))
    assert [event.step for event in events if isinstance(event, Step)] == list(range(11, 21))
    list(train(total, folder=tmp_path / "whole"))
    whole, cut = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(tensor, cut[key]) for key, tensor in whole.items())
