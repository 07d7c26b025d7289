"""TIES: trim each change to its largest entries, elect a sign an entry, average those that agree.

Yadav et al. 2023, arXiv:2306.01708, algorithm 1; trimmed layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from reparam_diffusion.gallery.blend.method import BlendMethod, Layer, Made, Options, register
from reparam_diffusion.maths.change import entrywise
from reparam_diffusion.maths.sparse import largest


class TiesOptions(Options):
    density: float = Field(0.5, gt=0, le=1)
    """Share of each change's entries that is kept, the largest ones."""


def blend_ties(layers: Sequence[Layer], options: TiesOptions) -> Made:
    def combine(matrices: list[Tensor]) -> Tensor:
        kept = torch.stack([largest(matrix, options.density) for matrix in matrices])
        agreeing = kept * (kept.sign() == kept.sum(0).sign())
        return agreeing.sum(0) / (agreeing != 0).sum(0).clamp_min(1)

    return entrywise([layer.wanted for layer in layers], combine)


register(
    BlendMethod(
        name="ties",
        title="TIES",
        summary="Many adapters that would cancel each other: where they disagree in sign, the stronger side wins.",
        paper="Yadav et al. 2023, arXiv:2306.01708",
        blend=blend_ties,
        options=TiesOptions,
    )
)
