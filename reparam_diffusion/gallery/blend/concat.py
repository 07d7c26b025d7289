"""Concatenation: the sum, with the factors of all files side by side: [s₁U₁ s₂U₂][D₁; D₂]. Ranks add up.

Nothing is lost. Scaling U alone keeps s; programs that scale both factors by s make it s².
"""

from __future__ import annotations

from collections.abc import Sequence

from reparam_diffusion.gallery.blend.forms import as_product
from reparam_diffusion.gallery.blend.method import BlendMethod, Layer, Made, Options, register
from reparam_diffusion.maths.change import total


def blend_concat(layers: Sequence[Layer], options: Options) -> Made:
    """A LoRA also where whole differences would be smaller; norm layers have no product."""
    change = total([layer.wanted.product() for layer in layers], side_by_side=True)
    return change if len(change.shape) == 1 else as_product(change) or change


register(
    BlendMethod(
        name="concat",
        title="Concatenation",
        summary="The sum as one plain LoRA with all ranks side by side. Large where an adapter is no low-rank product.",
        paper="",
        blend=blend_concat,
    )
)
