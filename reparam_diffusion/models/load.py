"""A loaded Stable Diffusion model (1.x, 2.x, XL): from the starter, a diffusers folder, a single file or a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.eightbit import to_8bit
from reparam_diffusion.models.folder import load_pipeline
from reparam_diffusion.models.habits import Habits
from reparam_diffusion.models.ledger import bytes_of
from reparam_diffusion.models.precision import pick_device, pick_precision, vae_dtype
from reparam_diffusion.models.quiet import quiet
from reparam_diffusion.models.resting import Offload, Rest
from reparam_diffusion.models.room import give_back, memory_of
from reparam_diffusion.models.schedulers import down_to_noise
from reparam_diffusion.models.single_file import load_checkpoint, load_vae
from reparam_diffusion.models.source import find_source
from reparam_diffusion.models.tiles import reduction_of
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
    _resting: dict[int, Rest] = field(default_factory=dict)
    _offload: Offload | None = None

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What adapters attach to: "unet", "te1" and, for SDXL, "te2"."""
        return {"unet": self.unet} | {f"te{n}": encoder for n, encoder in enumerate(self.text_encoders, 1)}

    def stage(self, *, block_offload: bool = False) -> None:
        """From now on the parts rest where they are and are on the device only while `using` them.

        With `block_offload` the UNet's blocks come one at a time even then.
        """
        if block_offload:
            self._offload = Offload(self.unet, self.device)
        blocks = self._offload.blocks if self._offload is not None else []
        self._resting = {
            id(part): Rest(part, self.device, but=blocks) for part in (self.unet, self.vae, *self.text_encoders)
        }
        if self.device.type == "cuda":
            for rest in (*self._resting.values(), *(self._offload.rests if self._offload is not None else [])):
                rest.pin()

    def unstage(self) -> None:
        """The inverse of `stage`."""
        self._resting = {}
        if self._offload is not None:
            self._offload.end()
            self._offload = None

    @property
    def is_staged(self) -> bool:
        """Whether parts rest in host memory when they are not in use."""
        return bool(self._resting)

    @contextmanager
    def using(self, *parts: nn.Module) -> Iterator[None]:
        """While the body runs, these parts are on the device; parts that are not staged always are."""
        with ExitStack() as stack:
            for part in parts:
                rest = self._resting.get(id(part))
                if rest is not None:
                    stack.enter_context(rest.visiting())
            yield

    @contextmanager
    def without(self, part: nn.Module) -> Iterator[None]:
        """While the body runs, a staged part that is in use makes room for another."""
        rest = self._resting.get(id(part))
        if rest is None or not rest.is_here:
            yield
            return
        rest.leave()
        try:
            yield
        finally:
            rest.fetch()

    @property
    def family(self) -> Family:
        """Which naming of files the model belongs to."""
        if self.unet.config.addition_embed_type == "text_time":
            return "sdxl"
        return "sd2" if self.unet.config.cross_attention_dim == 1024 else "sd1"

    @property
    def pixels_per_latent(self) -> int:
        """The VAE's reduction, 8 for Stable Diffusion."""
        return reduction_of(self.vae)

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
    base_8bit: bool = False,
    block_offload: bool = False,
    staged: bool | None = None,
) -> Model:
    """A base model, ready to draw and to carry adapters; its weights are frozen.

    `path_or_id` is "starter", a diffusers folder, a .safetensors checkpoint or a hub id. `dtype` None is fp32 on a CPU
    and bf16 (or fp16) on a GPU; the VAE is fp32, unless it is one made for fp16. `vae` is a VAE to use instead of the
    model's own, `prediction_type` overrides what was detected, `zero_terminal_snr` lets its noise end in pure noise.
    `base_8bit` keeps the UNet's linear layers in 8 bits; nothing can be merged into them. `staged` leaves the parts in
    host memory between uses (None: where a CUDA card's is short), `block_offload` the UNet's blocks as well.
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
    modules = (*model.parts.values(), model.vae)
    for module in modules:
        module.requires_grad_(False).eval()
    with quiet():
        model.vae.to(vae_dtype(model.vae.config, place))
    if base_8bit:
        to_8bit(model.unet)
        give_back()
    if place.type == "cuda":
        model.unet.to(memory_format=torch.channels_last)
    if place.type == "cuda" and (block_offload or (is_short(model) if staged is None else staged)):
        model.stage(block_offload=block_offload)
    else:
        for module in modules:
            module.to(place)
    return model


def is_short(model: Model) -> bool:
    """Whether the parts together take more than half of the device's memory: too little is left to work in."""
    return 2 * sum(bytes_of(part) for part in (*model.parts.values(), model.vae)) > memory_of(model.device)


def _check_channels(model: Model) -> None:
    """Raise UserError for a UNet that reads something else than the VAE's latents."""
    reads, latent = model.unet.config.in_channels, model.vae.config.latent_channels
    why = f"Its UNet reads {reads} channels, not {latent}."
    if reads != latent == model.unet.config.out_channels:
        do = "Train on the plain version of the model."
        raise UserError(f"{model.name} is an inpainting or editing model.", why, do)
    if reads != latent:
        raise UserError(f"{model.name} does not go with this VAE.", why, "Choose one of its family.", place="model.vae")
