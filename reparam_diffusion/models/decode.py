"""Latents to pictures, and early looks at a picture that is still being drawn."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reparam_diffusion.models.finite import require_image
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.room import free_on
from reparam_diffusion.models.tiles import tile_side, tiled

if TYPE_CHECKING:
    from PIL.Image import Image

_LOOK = {"cpu": 16}
_LOOK_ON_GPU = 64


def decode(model: Model, latents: Tensor, *, room: int | None = None) -> list[Image]:
    """Latents to pictures in the VAE's own number format, which the pipelines do not always do.

    In tiles where a whole picture needs more than `room` bytes (None: what is free on the device). Raises UserError
    where the values are NaN or infinity.
    """
    from diffusers.image_processor import VaeImageProcessor

    config = model.vae.config
    latents = latents.to(model.vae.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
    height, width = (side * model.pixels_per_latent for side in latents.shape[-2:])
    with model.using(model.vae):
        room = free_on(model.device) if room is None else room
        side = tile_side(model.vae, "decode", height, width, room=room, device=model.device.type)
        with tiled(model.vae, side):
            # one by one: it is the largest part
            decoded = [model.vae.decode(one[None], return_dict=False)[0] for one in latents]
    images = torch.cat(decoded)
    require_image(model, latents, images)
    pictures: list[Image] = VaeImageProcessor().postprocess(images, output_type="pil")
    return pictures


def look(model: Model, clean: Tensor) -> list[Image]:
    """Small pictures of expected latents: on a CPU at most 16 latents a side, a sixteenth of a 512-pixel decoding."""
    most = _LOOK.get(model.device.type, _LOOK_ON_GPU)
    side = max(clean.shape[-2:])
    if side > most:
        clean = F.interpolate(clean.float(), scale_factor=most / side, mode="area")
    return decode(model, clean)


class Watcher:
    """Stands before a scheduler's step and keeps the clean latents that the model expects: x₀ of x_t and its output."""

    def __init__(self, scheduler: Any) -> None:  # Any: diffusers' classes
        self.clean: Tensor | None = None
        plain = scheduler.step

        @wraps(plain)  # the pipelines read its signature
        def step(output: Tensor, timestep: Any, sample: Tensor, *rest: Any, **named: Any) -> Any:
            self.clean = expected(scheduler, output, timestep, sample)
            return plain(output, timestep, sample, *rest, **named)

        scheduler.step = step


def expected(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    """x₀ = (x − √(1−ᾱ) ε) / √ᾱ, or √ᾱ x − √(1−ᾱ) v, with x as the UNet saw it."""
    bars = scheduler.alphas_cumprod
    bar = bars[min(max(round(float(timestep)), 0), len(bars) - 1)].to(output)
    x = scheduler.scale_model_input(sample, timestep)
    if scheduler.config.prediction_type == "v_prediction":
        return bar.sqrt() * x - (1 - bar).sqrt() * output
    return (x - (1 - bar).sqrt() * output) / bar.sqrt().clamp(min=0.01)
