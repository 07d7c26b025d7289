"""Beginning from a picture instead of from noise alone: all of it is drawn over, or only where a mask is white.

x_t = √ᾱ x₀ + √(1−ᾱ) ε with x₀ the picture's latents. Where the mask is black, x_t of the picture is put back after each
step, so that what is drawn fits what stays (RePaint, Lugmayr et al. 2022, arXiv:2201.09865, without its resampling).
Diffusers' own inpainting pipelines take 4 or 9 channels only, and their others encode in the UNet's number format;
hence the few lines here, for any number of latent channels.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.habits import DENOISE
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.room import free_on
from reparam_diffusion.models.tiles import tile_side, tiled

_FEATHER = 1 / 128
"""Width of a mask's soft inner edge, as a share of the longer side."""


@dataclass(frozen=True)
class Start:
    """A fitted RGB picture, what of it is drawn anew (grey, white is all; None is everywhere), and how much."""

    picture: Image.Image
    mask: Image.Image | None = None
    denoise: float = DENOISE

    def finish(self, drawn: Image.Image) -> Image.Image:
        """The drawn picture with the original's own pixels wherever the mask is black."""
        return drawn if self.mask is None else Image.composite(drawn, self.picture, self.mask)


def make_start(
    picture: Image.Image, mask: Image.Image | None, *, denoise: float, width: int, height: int, steps: int
) -> Start:
    """A picture of any size, scaled to cover `width` x `height` pixels and cropped around its middle; its mask too.

    Raises UserError for a mask of another shape, an empty one, and a change so small that no step is left of it.
    """
    if not 0 < denoise <= 1:
        raise UserError(f"A picture cannot change by {denoise:g}.", do="Take a number above 0, and at most 1.")
    if int(steps * denoise) < 1:
        raise UserError(
            f"With {steps} steps, a change of {denoise:g} leaves no step to draw.",
            do=f"Take at least {1 / steps:.2g}, or more steps.",
        )
    if mask is not None:
        mask = _fitted_mask(picture, mask, width=width, height=height)
    return Start(ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.LANCZOS), mask, denoise)


def _fitted_mask(picture: Image.Image, mask: Image.Image, *, width: int, height: int) -> Image.Image:
    """The mask with the picture's crop. Its edge is softened inwards: what is black stays black."""
    if abs(picture.width / picture.height * mask.height / mask.width - 1) > 0.02:
        raise UserError(
            "The mask has another shape than the picture.",
            f"It is {mask.width} x {mask.height} pixels, the picture {picture.width} x {picture.height}.",
            "Paint it over the picture itself.",
        )
    mask = ImageOps.fit(mask.convert("L").resize(picture.size), (width, height))
    if mask.getextrema()[1] == 0:
        raise UserError("The mask is empty.", "All of it is black.", "Paint white where something new is to be drawn.")
    soft = mask.filter(ImageFilter.GaussianBlur(max(width, height) * _FEATHER))
    return ImageChops.multiply(mask, soft)


def fitting_size(picture: tuple[int, int], *, side: int, step: int) -> tuple[int, int]:
    """The size to draw a picture at: its own where that can be, else near its proportions with about side² pixels.

    In multiples of `step`, and never longer than 1:3.
    """
    if all(value % step == 0 for value in picture) and side**2 / 2 <= picture[0] * picture[1] <= 4 * side**2:
        return picture
    root = math.sqrt(min(3.0, max(1 / 3, picture[0] / picture[1])))
    widths, heights = (_multiples(side * share, step) for share in (root, 1 / root))

    def misfit(size: tuple[int, int]) -> float:
        """What is cropped counts more than how many pixels there are."""
        width, height = size
        return abs(math.log(width / height / root**2)) + abs(math.log(width * height / side**2)) / 4

    return min(itertools.product(widths, heights), key=misfit)


def _multiples(value: float, step: int) -> tuple[int, int]:
    """The multiples of a step below and above a value, at least one step."""
    below = max(1, int(value / step))
    return below * step, (below + 1) * step


class Starter:
    """A start on its way through a pipeline: the latents to begin with, and what stays put back after each step."""

    def __init__(self, model: Model, start: Start, scheduler: Any) -> None:  # Any: diffusers' classes
        self.scheduler = scheduler
        self.clean = _encode(model, start.picture)
        self.mask = None if start.mask is None else _cells(start.mask, self.clean)
        self.noise = self.clean

    def prepare_latents(self, image: Any, timestep: Tensor, *rest: Any) -> Tensor:
        """In a pipeline's place: the noisy latents at its first timestep. Any: its own arguments, by position."""
        from diffusers.utils.torch_utils import randn_tensor

        _, _, dtype, device, generators = rest[:5]
        self.clean = self.clean.to(device, dtype)
        shape = (len(generators), *self.clean.shape[1:])
        self.noise = randn_tensor(shape, generator=generators, device=device, dtype=dtype)
        return self.scheduler.add_noise(self.clean.expand(shape), self.noise, timestep)

    def put_back(self, latents: Tensor, step: int, steps: int) -> Tensor:
        """The latents after this step, with the picture's own where nothing is drawn."""
        if self.mask is None:
            return latents
        kept = self.clean.expand_as(latents)
        if step + 1 < steps:
            timestep = self.scheduler.timesteps[step + 1 - steps]  # a pipeline goes through the last of them
            kept = self.scheduler.add_noise(kept, self.noise, timestep.reshape(1))
        return torch.lerp(kept, latents, self.mask.to(latents))


def _encode(model: Model, picture: Image.Image) -> Tensor:
    """(1, channels, height, width) latents, the middle of what the VAE sees in the picture."""
    from diffusers.image_processor import VaeImageProcessor

    pixels = VaeImageProcessor(do_resize=False).preprocess(picture).to(model.device, model.vae.dtype)
    config, height, width = model.vae.config, picture.height, picture.width
    with model.using(model.vae):
        side = tile_side(model.vae, "encode", height, width, room=free_on(model.device), device=model.device.type)
        with tiled(model.vae, side):
            latents: Tensor = model.vae.encode(pixels).latent_dist.mode()
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def _cells(mask: Image.Image, latents: Tensor) -> Tensor:
    """(1, 1, height, width): 1 for each cell of the latents that any white reaches, else 0."""
    from diffusers.image_processor import VaeImageProcessor

    white = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_grayscale=True).preprocess(mask)
    return F.adaptive_max_pool2d((white > 0).float(), latents.shape[-2:])
