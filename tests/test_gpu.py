"""What only a CUDA device can show; skipped visibly elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_pipelines import save_pictures, save_tiny

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.apply import apply_adapter, generate
from reparam_diffusion.config import parse_set, settle
from reparam_diffusion.events import Finished, Started, Step
from reparam_diffusion.models.load import load_model
from reparam_diffusion.training.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_the_device(method: str, precision: str, tmp_path: Path) -> None:
    model, pictures = save_tiny(tmp_path / "model", "sd1"), save_pictures(tmp_path / "pictures")
    settings = [
        f"model.path='{model}'", f"model.precision={precision}", "model.device=cuda", f"data.images='{pictures}'",
        "data.trigger=sks", f"adapter.method={method}", "targets.text_encoder=attention+mlp", "training.steps=4",
        "training.batch=2",
    ]  # fmt: skip
    events = list(train(settle(parse_set(settings)), folder=tmp_path / "run"))
    assert isinstance(events[-1], Finished)
    started = next(event for event in events if isinstance(event, Started))
    assert started.device.startswith("cuda")
    assert started.precision == precision
    base = load_model(model, device="cuda")
    assert generate(base, "a photo of sks", adapters=[tmp_path / "run" / "adapter.safetensors"], steps=2)


@pytest.mark.parametrize("settings", [["model.block_offload=true"], ["model.base_8bit=true"]], ids=str)
def test_what_saves_memory_trains_to_the_same_losses(settings: list[str], tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path / "pictures")
    losses = []
    for name, more in (("plain", []), ("small", settings)):
        given = [
            "model.device=cuda", "model.precision=fp32", f"data.images='{pictures}'", "data.trigger=sks",
            "training.steps=4", "training.gradient_checkpointing=true", *more,
        ]  # fmt: skip
        events = train(settle(parse_set(given)), folder=tmp_path / name)
        losses.append([event.loss for event in events if isinstance(event, Step)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_compiled_model_heeds_strength_and_removal(tmp_path: Path) -> None:
    model, pictures = save_tiny(tmp_path / "model", "sd1"), save_pictures(tmp_path / "pictures")
    settings = [
        f"model.path='{model}'", "model.device=cuda", f"data.images='{pictures}'", "training.steps=3", "training.warmup=0.0",
        "training.compile=true", "training.learning_rate=0.1",
    ]  # fmt: skip
    list(train(settle(parse_set(settings)), folder=tmp_path / "run"))
    base = load_model(model, device="cuda", dtype=torch.float32)
    base.unet.compile_repeated_blocks()
    x, t = torch.randn(1, 4, 16, 16, device="cuda"), torch.tensor([10], device="cuda")
    text = torch.randn(1, 32, 16, device="cuda")
    with torch.no_grad():
        before = base.unet(x, t, text).sample
        applied = apply_adapter(base, tmp_path / "run" / "adapter.safetensors")
        full = base.unet(x, t, text).sample
        applied.set_strength(0.5)
        half = base.unet(x, t, text).sample
        applied.remove()
        after = base.unet(x, t, text).sample
    assert not torch.allclose(before, full)
    assert not torch.allclose(half, full)
    torch.testing.assert_close(before, after)
