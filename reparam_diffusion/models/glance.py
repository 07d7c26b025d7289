"""What a base model draws by itself, read from its small files: no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.habits import Habits
from reparam_diffusion.models.parts import read_config
from reparam_diffusion.models.source import find_source


@dataclass(frozen=True)
class Glance:
    """`size` is the side of its own square picture and None where that shows only once it is loaded; pixels."""

    habits: Habits = field(default_factory=Habits)
    size: int | None = None
    size_step: int = 64


def glance_at(model: str | Path) -> Glance:
    """A model's habits and sizes; where they do not show yet, what most models have."""
    try:
        source = find_source(model, fetch=False)
        unet, vae = read_config(source.configs, "unet"), read_config(source.configs, "vae")
        latent = 2 ** (len(vae["block_out_channels"]) - 1)
        sample = unet["sample_size"]
        size = (sample if isinstance(sample, int) else sample[0]) * latent
        step = latent * 2 ** (len(unet["block_out_channels"]) - 1)
        return Glance(source.habits, size, step)
    except (OSError, ValueError, KeyError, TypeError, UserError):  # loading tells what is wrong with it
        return Glance()
