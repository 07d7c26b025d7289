"""Sum: Δ = Σ sⱼ·Δⱼ, what the adapters do together when they are all applied."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from reparam_diffusion.adapters.adalora import Adalora
from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.adapters.loha import Loha
from reparam_diffusion.adapters.lokr import Lokr
from reparam_diffusion.adapters.lora import Lora
from reparam_diffusion.gallery.blend.method import BlendMethod, Layer, Made, Options, register
from reparam_diffusion.maths.change import total


def blend_sum(layers: Sequence[Layer], options: Options) -> Made:
    acting = [layer for layer in layers if layer.adapter is not None and layer.strength != 0]
    if len(acting) == 1 and acting[0].adapter is not None:
        alone = at_strength(acting[0].adapter, acting[0].strength)
        if alone is not None:
            return alone
    return total([layer.wanted for layer in layers])


def at_strength(adapter: Adapter, strength: float) -> Adapter | None:
    """s · Δ in the adapter's own form, where one factor can take s; None where none can, as in a rotation."""
    if strength == 1.0:
        return adapter
    factor = _FACTORS.get(type(adapter))
    if factor is None or adapter.magnitude is not None:
        return None
    scaled = copy.deepcopy(adapter)
    name = next(name for name in factor if hasattr(scaled, name))
    getattr(scaled, name).data *= strength
    return scaled


_FACTORS: dict[type[Adapter], tuple[str, ...]] = {
    Lora: ("up",),
    Loha: ("up_1",),
    Lokr: ("small", "small_up"),
    Adalora: ("left",),
}


register(
    BlendMethod(
        name="sum",
        title="Sum",
        summary="Everything that each adapter does, at its strength: the same as applying them all at once.",
        paper="",
        blend=blend_sum,
    )
)
