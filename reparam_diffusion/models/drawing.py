"""In which number format a model is loaded when it is only drawn with."""

from __future__ import annotations

from pathlib import Path

import torch

from reparam_diffusion.models.outline import outline
from reparam_diffusion.models.precision import faster_on_cpu, pick_precision

_REAL = 300_000_000
"""Parameters of a UNet from which its number format is worth measuring: SD 1.5 has 860 million, the starter 24."""


def drawing_dtype(path: str | Path, precision: str, device: torch.device) -> torch.dtype:
    """The number format to draw in. "auto" is half precision on CUDA; on a CPU the faster one for real-size models."""
    if precision == "auto" and device.type == "cpu":
        unet = outline(path, fetch=True).unet
        return faster_on_cpu(unet) if unet.num_parameters() > _REAL else torch.float32
    return pick_precision(precision, device)
