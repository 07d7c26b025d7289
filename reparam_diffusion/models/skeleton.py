"""The standard models' layers without weights, for work on adapter files that needs only names and shapes."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from reparam_diffusion.models.load import Family
from reparam_diffusion.models.parts import MODEL_CONFIGS, empty_parts
from reparam_diffusion.models.quiet import quiet

_KINDS = {"sd1": "sd1", "sd2": "sd2-base", "sdxl": "sdxl"}


@cache
def skeleton(family: Family) -> dict[str, nn.Module]:
    """The parts of a family's standard model on torch's meta device."""
    with quiet(), torch.device("meta"):
        parts = empty_parts(MODEL_CONFIGS / _KINDS[family])
    encoders = {f"te{number}": encoder for number, encoder in enumerate(parts.text_encoders, 1)}
    return {name: part.requires_grad_(False).eval() for name, part in ({"unet": parts.unet} | encoders).items()}
