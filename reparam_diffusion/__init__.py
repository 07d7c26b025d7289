"""Train, try and export LoRA, LoHa, LoKr, OFT and AdaLoRA adapters for Stable Diffusion models.

The stable names below load what they need when first used, so that importing this package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reparam_diffusion.adapters import METHODS
    from reparam_diffusion.apply import Applied, apply_adapter, generate
    from reparam_diffusion.config import TrainConfig, settle
    from reparam_diffusion.errors import UserError
    from reparam_diffusion.formats.export import export_adapter
    from reparam_diffusion.formats.read import read_adapter
    from reparam_diffusion.gallery.bake import bake
    from reparam_diffusion.gallery.blend.blending import blend_files
    from reparam_diffusion.gallery.blend.forms import Form
    from reparam_diffusion.gallery.blend.sources import Source
    from reparam_diffusion.gallery.doctor import diagnose
    from reparam_diffusion.gallery.extract import extract
    from reparam_diffusion.models.load import Model, load_model
    from reparam_diffusion.training.loop import train

__version__ = "0.1.0"

_HOMES = {
    "METHODS": "adapters",
    "Source": "gallery.blend.sources",
    "Form": "gallery.blend.forms",
    "blend_files": "gallery.blend.blending",
    "export_adapter": "formats.export",
    "bake": "gallery.bake",
    "extract": "gallery.extract",
    "diagnose": "gallery.doctor",
    "Applied": "apply",
    "apply_adapter": "apply",
    "generate": "apply",
    "TrainConfig": "config",
    "settle": "config",
    "UserError": "errors",
    "read_adapter": "formats.read",
    "Model": "models.load",
    "load_model": "models.load",
    "train": "training.loop",
}

__all__ = [
    "METHODS",
    "Applied",
    "Form",
    "Model",
    "Source",
    "TrainConfig",
    "UserError",
    "apply_adapter",
    "bake",
    "blend_files",
    "diagnose",
    "export_adapter",
    "extract",
    "generate",
    "load_model",
    "read_adapter",
    "settle",
    "train",
]


def __getattr__(name: str) -> Any:  # Any: whichever public name is asked for
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
