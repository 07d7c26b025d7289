"""Two processes train what one does with the batch of both: one flat mean of the gradients, the same samples."""

from __future__ import annotations

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
from reparam_diffusion.training.loop import train

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys, torch
from pathlib import Path
from reparam_diffusion.config import read_settings, settle
from reparam_diffusion.training.loop import train
torch.set_num_threads(1)
list(train(settle(read_settings(Path(sys.argv[1]))), folder=Path(sys.argv[2])))
"""


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_two_processes_learn_what_one_learns(method: str, tmp_path: Path) -> None:
    model, pictures = save_tiny(tmp_path / "model", "sd1"), save_pictures(tmp_path / "pictures", count=4)
    settings = [
        f"model.path='{model}'", "model.precision=fp32", "model.device=cpu", f"data.images='{pictures}'", "data.trigger=sks",
        f"adapter.method={method}", "training.steps=3", "training.warmup=0.0", "training.learning_rate=0.01",
        "output.file_precision=fp32", "output.sample_every=1000", "output.validate_every=1000",
    ]  # fmt: skip
    settings += ["embedding.vectors=2"] if method == "lora" else []
    one = settle(parse_set([*settings, "training.accumulation=2"]))
    list(train(one, folder=tmp_path / "one"))
    config = tmp_path / "config.toml"
    config.write_text(to_toml(settle(parse_set(settings))), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(config), str(tmp_path / "two")],
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [worker.wait(timeout=200) for worker in workers] == [0, 0]
    alone, together = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    assert alone.keys() == together.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(tensor, together[key], rtol=1e-3, atol=1e-5)
