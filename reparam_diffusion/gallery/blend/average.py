"""Average: Δ = Σ sⱼ·Δⱼ / Σ sⱼ. Wortsman et al. 2022, arXiv:2203.05482 (model soups)."""

from __future__ import annotations

from collections.abc import Sequence

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.blend.method import BlendMethod, Layer, Made, Options, register
from reparam_diffusion.maths.change import total


def blend_average(layers: Sequence[Layer], options: Options) -> Made:
    """A file that leaves the layer alone counts as one that changes nothing there."""
    weight = sum(layer.strength for layer in layers)
    if weight == 0:
        if all(layer.strength == 0 for layer in layers):
            return total([layer.wanted for layer in layers])
        raise UserError("The strengths add up to 0.", "An average divides by their sum.", "Change one, or take sum.")
    return total([layer.change.scaled(layer.strength / weight) for layer in layers])


register(
    BlendMethod(
        name="average",
        title="Average",
        summary="The middle of versions of the same thing, such as several runs on one subject.",
        paper="Wortsman et al. 2022, arXiv:2203.05482",
        blend=blend_average,
    )
)
