"""A loaded Stable Diffusion model (1.x, 2.x, XL): from the starter, a diffusers folder, a single file or a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.folder import load_pipeline
from reparam_diffusion.models.habits import Habits
from reparam_diffusion.models.precision import pick_device, pick_precision
from reparam_diffusion.models.quiet import quiet
from reparam_diffusion.models.schedulers import down_to_noise
from reparam_diffusion.models.single_file import load_checkpoint, load_vae
from reparam_diffusion.models.source import find_source
from reparam_diffusion.models.words import Speech

Family = Literal["sd1", "sd2", "sdxl"]


@dataclass
class Model:
    """A base model's parts. Any: diffusers' and transformers' classes are not imported here."""

    name: str
    unet: Any
    vae: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler: Any
    device: torch.device
    dtype: torch.dtype
    habits: Habits = field(default_factory=Habits)
    folder: Path | None = None
    speech: Speech | None = None
    """The new words that are on it; `models.words.set_words` changes them."""
    _idle: list[nn.Module] = field(default_factory=list)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What adapters attach to: "unet", "te1" and, for SDXL, "te2"."""
        return {"unet": self.unet} | {f"te{n}": encoder for n, encoder in enumerate(self.text_encoders, 1)}

    def cast(self, dtype: torch.dtype) -> None:
        """Change the number format of the UNet and the text encoders."""
        with quiet():
            for module in self.parts.values():
                module.to(dtype)
        self.dtype = dtype

    @contextmanager
    def parked(self, *, text: bool) -> Iterator[None]:
        """While the body runs, the VAE (and with `text` the text encoders) leave a GPU; `awake` fetches them back."""
        idle = [self.vae, *(self.text_encoders if text else [])]
        if self.device.type == "cpu":
            idle = []
        self._idle = idle
        for module in idle:
            module.to("cpu")
        try:
            yield
        finally:
            self._idle = []
            for module in idle:
                module.to(self.device)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While the body runs, parked parts are on the device again."""
        for module in self._idle:
            module.to(self.device)
        try:
            yield
        finally:
            for module in self._idle:
                module.to("cpu")

    @property
    def family(self) -> Family:
        """Which naming of files the model belongs to."""
        if self.unet.config.addition_embed_type == "text_time":
            return "sdxl"
        return "sd2" if self.unet.config.cross_attention_dim == 1024 else "sd1"

    @property
    def pixels_per_latent(self) -> int:
        """The VAE's reduction, 8 for Stable Diffusion."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size(self) -> int:
        """The side of the model's own square picture, in pixels."""
        sample = self.unet.config.sample_size
        return int(sample if isinstance(sample, int) else sample[0]) * self.pixels_per_latent

    @property
    def size_step(self) -> int:
        """Sides of pictures must be multiples of this, in pixels: the VAE's and the UNet's reductions together."""
        return int(self.pixels_per_latent * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def prediction_type(self) -> str:
        """ "epsilon" or "v_prediction"."""
        return str(self.scheduler.config.prediction_type)


def load_model(
    path_or_id: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    vae: str | Path = "",
    prediction_type: str = "auto",
    zero_terminal_snr: bool = False,
) -> Model:
    """A base model, ready to draw and to carry adapters; its weights are frozen.

    `path_or_id` is "starter", a diffusers folder, a .safetensors checkpoint or a hub id. `dtype` None is fp32 on a CPU
    and bf16 (or fp16) on a GPU; the VAE is fp32 always, as half of it overflows. `vae` is a VAE to use instead of the
    model's own, `prediction_type` overrides what was detected, `zero_terminal_snr` lets its noise end in pure noise.
    Raises UserError when it cannot be read.
    """
    place = device if isinstance(device, torch.device) else pick_device(device)
    if dtype is None:
        dtype = pick_precision("auto", place)
    source = find_source(path_or_id)
    with quiet():
        if source.checkpoint is not None:
            parts = load_checkpoint(source.checkpoint, dtype)
        else:
            parts = load_pipeline(source, dtype)
        if str(vae):
            parts.vae = load_vae(Path(vae).expanduser(), source.configs)
        if prediction_type != "auto":
            kind = type(parts.scheduler)
            parts.scheduler = kind.from_config(parts.scheduler.config, prediction_type=prediction_type)
        if zero_terminal_snr:
            parts.scheduler = down_to_noise(parts.scheduler)
    model = Model(
        name=source.name,
        unet=parts.unet,
        vae=parts.vae,
        text_encoders=parts.text_encoders,
        tokenizers=parts.tokenizers,
        scheduler=parts.scheduler,
        device=place,
        dtype=dtype,
        habits=source.habits,
        folder=source.folder,
    )
    _check_channels(model)
    for module in (*model.parts.values(), model.vae):
        module.requires_grad_(False).eval().to(place)
    if place.type == "cuda":
        model.unet.to(memory_format=torch.channels_last)
    return model


def _check_channels(model: Model) -> None:
    """Raise UserError for a UNet that reads something else than the VAE's latents."""
    reads, latent = model.unet.config.in_channels, model.vae.config.latent_channels
    why = f"Its UNet reads {reads} channels, not {latent}."
    if reads != latent == model.unet.config.out_channels:
        do = "Train on the plain version of the model."
        raise UserError(f"{model.name} is an inpainting or editing model.", why, do)
    if reads != latent:
        raise UserError(f"{model.name} does not go with this VAE.", why, "Choose one of its family.", place="model.vae")
