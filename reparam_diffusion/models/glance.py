"""What a base model draws by itself, read from its folder's small files: no weights are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.habits import Habits, read_habits
from reparam_diffusion.models.outline import configs_of


@dataclass(frozen=True)
class Glance:
    """`size` is the side of its own square picture and None where that shows only once it is loaded; pixels."""

    habits: Habits = field(default_factory=Habits)
    size: int | None = None
    size_step: int = 64


def glance_at(model: str | Path) -> Glance:
    """A model folder's habits and sizes; for anything else what most models have."""
    try:
        folder = configs_of(model)
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        latent = 2 ** (len(vae["block_out_channels"]) - 1)
        sample = unet["sample_size"]
        size = (sample if isinstance(sample, int) else sample[0]) * latent
        step = latent * 2 ** (len(unet["block_out_channels"]) - 1)
        return Glance(read_habits(folder), size, step)
    except (OSError, ValueError, KeyError, TypeError, UserError):  # loading tells what is wrong with it
        return Glance()
