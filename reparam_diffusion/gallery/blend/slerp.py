"""Slerp: on the arc from Δ₁ to Δ₂, (sin((1−t)Ω) Δ̂₁ + sin(tΩ) Δ̂₂)/sin Ω, sizes going along.  Shoemake 1985."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from reparam_diffusion.gallery.blend.method import BlendMethod, Layer, Made, Options, register
from reparam_diffusion.maths.change import total


class SlerpOptions(Options):
    t: float = Field(0.5, ge=0, le=1)
    """Where between the two: 0 is the first, 1 is the second."""


def blend_slerp(layers: Sequence[Layer], options: SlerpOptions) -> Made:
    """Directions turn at an even pace, layer by layer; unlike an average, half way is not weaker than the ends."""
    first, second = (layer.wanted for layer in layers)
    sizes = first.norm(), second.norm()
    near, far = 1 - options.t, options.t
    if min(sizes) > 0:
        angle = math.acos(max(-1.0, min(1.0, first.dot(second) / (sizes[0] * sizes[1]))))
        if math.sin(angle) > 1e-4:  # else they lie on one line, where the arc is that line
            size = near * sizes[0] + far * sizes[1]
            near = size * math.sin((1 - options.t) * angle) / (math.sin(angle) * sizes[0])
            far = size * math.sin(options.t * angle) / (math.sin(angle) * sizes[1])
    return total([first.scaled(near), second.scaled(far)])


register(
    BlendMethod(
        name="slerp",
        title="Slerp",
        summary="A point on the way from one adapter to another, with its full strength kept.",
        paper="Shoemake 1985, Animating rotation with quaternion curves",
        blend=blend_slerp,
        options=SlerpOptions,
        fewest=2,
        most=2,
    )
)
