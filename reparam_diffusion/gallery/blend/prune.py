"""Magnitude prune: keep the largest entries of each change, sum.  Han et al. 2015, arXiv:1506.02626."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from reparam_diffusion.gallery.blend.method import BlendMethod, Layer, Made, Options, add_changes, register
from reparam_diffusion.maths.change import entrywise
from reparam_diffusion.maths.sparse import largest


class PruneOptions(Options):
    density: float = Field(0.5, gt=0, le=1)
    """Share of each change's entries that is kept, the largest ones."""


def blend_prune(layers: Sequence[Layer], options: PruneOptions) -> Made:
    def combine(matrices: list[Tensor]) -> Tensor:
        return torch.stack([largest(matrix, options.density) for matrix in matrices]).sum(0)

    return entrywise([layer.wanted for layer in layers], combine)


register(
    BlendMethod(
        name="prune",
        title="Magnitude prune",
        summary="The sum of what each adapter is surest of: small entries, mostly noise, are left out.",
        paper="Han et al. 2015, arXiv:1506.02626",
        blend=blend_prune,
        lossless=add_changes,
        options=PruneOptions,
    )
)
