"""A tiny model, two adapters for it and a studio in this process: what tests of the studio share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from reparam_diffusion.gallery import shelf
from reparam_diffusion.gallery.recipe import Recipe
from reparam_diffusion.jobs import studio, studio_worker

FAST = {"steps": 2, "width": 32, "height": 32, "guidance": 3.0}


def tiny_workspace(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with the tiny model and two adapters, a device lock of its own, and no process started."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(studio, "wake", lambda workspace, folder=None: None)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny)
    for number, name in enumerate(("teddy", "style")):
        shelf.add(lora_file(tmp_path / f"{name}.safetensors", seed=number), tmp_path, name=name)
    return tmp_path


def lora_file(file: Path, *, seed: int, width: int = 16) -> Path:
    """A LoRA for the tiny model that changes what it draws, in the UNet and in the text encoder."""
    chance = torch.Generator().manual_seed(seed)
    sites = [
        "unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q",
        "te_text_model_encoder_layers_0_self_attn_q_proj",
    ]
    tensors = {}
    for site in sites:
        tensors[f"lora_{site}.lora_down.weight"] = torch.randn(4, width, generator=chance)
        tensors[f"lora_{site}.lora_up.weight"] = torch.randn(width, 4, generator=chance)
    save_file(tensors, file)
    return file


def recipe(**changes: object) -> Recipe:
    return Recipe.model_validate({"prompt": "a toy", "seed": 1, "model": "tiny", **FAST, **changes})


def asked(workspace: Path, *recipes: Recipe, **more: object) -> Path:
    return studio.submit(workspace, studio.Request(recipes=recipes, device="cpu", **more))  # type: ignore[arg-type]


def finish(workspace: Path, **more: object) -> None:
    """Let a studio in this process draw all there is."""
    studio_worker.serve(workspace, idle=0.0, **more)  # type: ignore[arg-type]


def pixels(file: Path) -> bytes:
    with Image.open(file) as picture:
        return picture.tobytes()
