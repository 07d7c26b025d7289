"""DARE: drop entries of each change at random, scale the rest by 1/(1 − p), sum.  Yu et al. 2023, arXiv:2311.03099."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from reparam_diffusion.gallery.blend.method import BlendMethod, Layer, Made, Options, add_changes, register
from reparam_diffusion.maths.chance import generator
from reparam_diffusion.maths.change import entrywise


class DareOptions(Options):
    drop: float = Field(0.3, ge=0, lt=1)
    """Chance that an entry is dropped. The expected change stays the sum."""
    seed: int = Field(0, ge=0, lt=2**63)
    """The same seed drops the same entries."""


def blend_dare(layers: Sequence[Layer], options: DareOptions) -> Made:
    def combine(matrices: list[Tensor]) -> Tensor:
        total = torch.zeros_like(matrices[0])
        for layer, matrix in zip(layers, matrices, strict=True):
            chance = generator(options.seed, "dare", layer.site, layer.source)
            keep = torch.rand(matrix.shape, generator=chance) >= options.drop
            total += keep * matrix / (1 - options.drop)
        return total

    return entrywise([layer.wanted for layer in layers], combine)


register(
    BlendMethod(
        name="dare",
        title="DARE",
        summary="Sparser adapters that get in each other's way less; the seed is part of the result.",
        paper="Yu et al. 2023, arXiv:2311.03099",
        blend=blend_dare,
        lossless=add_changes,
        options=DareOptions,
    )
)
