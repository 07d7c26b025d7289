"""Blends of adapters, on the changes themselves: one file a method. Importing the package registers them, in order."""

from reparam_diffusion.gallery.blend import (  # noqa: F401  (each registers itself)  # isort: skip
    sum,
    average,
    concat,
    slerp,
    ties,
    dare,
    prune,
    svd,
    rotations,
)
from reparam_diffusion.gallery.blend.method import BLENDS, BlendMethod, Layer, Options

__all__ = ["BLENDS", "BlendMethod", "Layer", "Options"]
