"""NaN and infinity in a model's weights, and in what it generates: named, never written as a black image."""

from __future__ import annotations

import torch
from torch import Tensor

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.load import Model


def find_broken_layers(model: Model) -> tuple[list[str], int]:
    """The layers of a model ("unet.conv_in", "vae.decoder.conv_in") with NaN or infinity, and how many it has."""
    broken: dict[str, None] = {}
    layers: set[str] = set()
    for part, module in (*model.parts.items(), ("vae", model.vae)):
        for key, tensor in () if module is None else module.state_dict().items():
            name = f"{part}.{key.rpartition('.')[0]}"
            layers.add(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                broken[name] = None
    return list(broken), len(layers)


def require_weights(model: Model) -> None:
    """Raise UserError, with the model, the first layer and how many there are, where weights are NaN or infinity."""
    broken, count = find_broken_layers(model)
    if broken:
        raise UserError(
            f"{model.name} holds values that are not numbers (NaN or infinity).",
            _describe(broken, count),
            "Download or copy the model again.",
        )


def require_image(model: Model, latents: Tensor, decoded: Tensor) -> None:
    """Raise UserError, with the cause, where a generated image is NaN or infinity instead of a black image."""
    if bool(torch.isfinite(decoded).all()):
        return
    what = "The image could not be generated: its values are not numbers (NaN or infinity)."
    broken, count = find_broken_layers(model)
    if broken:
        why = f"{model.name}, with its adapters, has the fault: {_describe(broken, count)}"
        raise UserError(what, why, "Use another copy of the model, or leave out the adapter.")
    if bool(torch.isfinite(latents).all()):
        dtype = str(model.vae.dtype).removeprefix("torch.")
        raise UserError(what, f"The VAE overflows in {dtype}.", "Use a VAE that is made for fp16, or fp32.")
    dtype = str(model.dtype).removeprefix("torch.")
    raise UserError(
        what,
        f"The values overflow while sampling in {dtype}.",
        "Lower the adapters' strength or the guidance, or fp32.",
    )


def _describe(broken: list[str], count: int) -> str:
    first = f"the first is {broken[0]}" if len(broken) > 1 else broken[0]
    return f"{len(broken)} of {count} layers {'are' if len(broken) > 1 else 'is'} affected: {first}."
