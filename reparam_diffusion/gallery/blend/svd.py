"""SVD: the sum, re-compressed to the nearest change of lower rank.  Eckart and Young 1936."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from reparam_diffusion.gallery.blend.method import BlendMethod, Layer, Made, Options, add_changes, register
from reparam_diffusion.maths.change import Change
from reparam_diffusion.maths.lowrank import rank_for_energy, shared, svd


class SvdOptions(Options):
    rank: int = Field(32, ge=1, le=4096)
    """Most ranks that a layer may keep."""
    energy: float = Field(1.0, gt=0, le=1)
    """Share of each layer's energy (Σσ²) that is enough; 1 keeps all ranks up to the limit."""


def blend_svd(layers: Sequence[Layer], options: SvdOptions) -> Made:
    change = add_changes(layers)
    left, values, right = svd(change, most=options.rank if options.energy == 1 else 0)
    rank = min(options.rank, rank_for_energy(values, options.energy))
    up, down = shared(left, values, right, rank)
    return Change(change.shape, up=up, down=down, bias=change.bias)


register(
    BlendMethod(
        name="svd",
        title="SVD",
        summary="The sum in a small LoRA: the nearest one of a rank you choose.",
        paper="Eckart and Young 1936",
        blend=blend_svd,
        lossless=add_changes,
        options=SvdOptions,
    )
)
