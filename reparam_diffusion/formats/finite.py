"""Layers of an adapter file whose numbers are NaN or infinity: found and named before any work."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.read import AdapterFile, Site


def find_broken_tensor(site: Site) -> str:
    """The name of a layer's first tensor that holds NaN or infinity; "" where all are numbers."""
    return next((name for name, tensor in site.leaves.items() if not _is_finite(name, site, tensor)), "")


def _is_finite(name: str, site: Site, tensor: Tensor) -> bool:
    if name == "alpha" and any(leaf.startswith("lokr") for leaf in site.leaves):
        return True  # "dim 100000" is infinite in fp16, and means nothing
    return bool(torch.isfinite(tensor.float()).all())


def require_numbers(file: AdapterFile, layers: Mapping[str, Site]) -> None:
    """Raise UserError, with the file, the first layer and how many there are, where layers hold NaN or infinity."""
    broken: list[str] = []
    for name, site in layers.items():
        if tensor := find_broken_tensor(site):
            broken.append(f"{name} ({tensor})")
    file.let_go()
    if broken:
        raise UserError(
            f"{file.file.name} holds values that are not numbers (NaN or infinity).",
            describe_broken(broken, len(layers)),
            "Use another copy or an earlier checkpoint, or leave these layers out with `doctor --repair`.",
        )


def describe_broken(broken: list[str], count: int) -> str:
    """ "3 of 79 layers are affected, the first is unet.conv_in (lora_up.weight)." """
    verb = "layer is" if len(broken) == 1 else "layers are"
    first = f": {broken[0]}" if len(broken) == 1 else f", the first is {broken[0]}"
    return f"{len(broken)} of {count} {verb} affected{first}."
