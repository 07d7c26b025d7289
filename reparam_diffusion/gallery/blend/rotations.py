"""Product of rotations, for OFT only: R = cayley(s₁Q₁) · cayley(s₂Q₂) · …, the first file's acting first.

Each rotation goes its own way round: s is an angle, not a share of the change, so the result is orthogonal at every
strength, where W + s·ΔW is not. With one file it is that adapter at strength s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reparam_diffusion.adapters.oft import Oft, OftPlan
from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.blend.method import BlendMethod, Layer, Made, Options, register
from reparam_diffusion.maths.change import total
from reparam_diffusion.maths.orthogonal import cayley, inverse_cayley, triangle_from_skew


def blend_rotations(layers: Sequence[Layer], options: Options) -> Made:
    acting = [(layer.adapter, layer.strength) for layer in layers if layer.adapter is not None and layer.strength != 0]
    if not acting:
        return total([layer.wanted for layer in layers])
    rotations = [_rotation(adapter, layers[0].site) for adapter, _ in acting]
    if len(rotations) == 1:
        return at_angle(rotations[0], acting[0][1])
    first = rotations[0].plan
    if len({(one.plan.side, one.plan.block_size, one.plan.blocks) for one in rotations}) > 1:
        raise UserError(
            f"The rotations of {layers[0].site} do not multiply.",
            "Their blocks differ in size or side.",
            "Take sum, which is exact for every mix.",
        )
    # Outputs: Rᵀ = cayley(−Q) meets W's rows from the left. Inputs: W' = W R₁ᵀ R₂ᵀ with Rᵀ = cayley(Q).
    sign = -1.0 if first.side == "output" else 1.0
    product = torch.eye(first.block_size, dtype=torch.float64)
    for rotation, (_, strength) in zip(rotations, acting, strict=True):
        turned = cayley(sign * strength * rotation.skew().detach().double())
        product = turned @ product if first.side == "output" else product @ turned
    result = Oft(rotations[0].shape, OftPlan(first.block_size, first.blocks, first.side, 0.0))
    result.triangle.data = triangle_from_skew(sign * inverse_cayley(product)).float()
    return result


def _rotation(adapter: object, site: str) -> Oft:
    if not isinstance(adapter, Oft) or adapter.rescale is not None or adapter.magnitude is not None:
        raise UserError(
            f"{site} is no plain rotation in one of the files.", "Only OFT adapters multiply.", "Take sum instead."
        )
    return adapter


def at_angle(adapter: Oft, strength: float) -> Oft:
    """The same rotation, turned `strength` times as far: Cayley of s·Q."""
    result = Oft(adapter.shape, OftPlan(adapter.plan.block_size, adapter.plan.blocks, adapter.plan.side, 0.0))
    result.triangle.data = strength * triangle_from_skew(adapter.skew().detach())
    return result


register(
    BlendMethod(
        name="rotations",
        title="Product of rotations",
        summary="OFT adapters one after the other; the result is a rotation again, at every strength.",
        paper="Qiu et al. 2023, arXiv:2306.07280",
        blend=blend_rotations,
    )
)
