"""Loading a Stable Diffusion model (1.x, 2.x, XL) from the starter, a diffusers folder, a single file or a hub id."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.habits import Habits, read_habits
from reparam_diffusion.models.precision import pick_device

ASSETS = Path(__file__).resolve().parents[2] / "assets"
STARTER = ASSETS / "starter-model"

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
    path_or_id: str | Path, *, device: str | torch.device = "auto", dtype: torch.dtype | None = None
) -> Model:
    """A base model, ready to draw and to carry adapters; its weights are frozen.

    `path_or_id` is "starter", a diffusers folder, a .safetensors checkpoint or a hub id. `dtype` None is fp32 on a CPU
    and bf16 (or fp16) on a GPU; the VAE is fp32 always. Raises UserError when it cannot be read.
    """
    place = device if isinstance(device, torch.device) else pick_device(device)
    if dtype is None:
        bf16 = place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.float32 if place.type != "cuda" else torch.bfloat16 if bf16 else torch.float16
    source = STARTER if str(path_or_id) == "starter" else Path(path_or_id).expanduser()
    with quiet():
        pipe = _pipeline(source, str(path_or_id), dtype)
    encoders = [pipe.text_encoder] + (
        [pipe.text_encoder_2] if getattr(pipe, "text_encoder_2", None) is not None else []
    )
    tokenizers = [pipe.tokenizer] + ([pipe.tokenizer_2] if getattr(pipe, "tokenizer_2", None) is not None else [])
    if pipe.vae.dtype != torch.float32:  # half a VAE overflows, and it runs once a picture
        pipe.vae.to(torch.float32)
    model = Model(
        name=source.name if source.exists() else str(path_or_id),
        unet=pipe.unet,
        vae=pipe.vae,
        text_encoders=encoders,
        tokenizers=tokenizers,
        scheduler=pipe.scheduler,
        device=place,
        dtype=dtype,
        habits=read_habits(source if source.is_dir() else None),
        folder=source if source.is_dir() else None,
    )
    if model.unet.config.in_channels != model.vae.config.latent_channels:
        raise UserError(
            f"{model.name} is an inpainting or editing model.",
            f"Its UNet reads {model.unet.config.in_channels} channels, not {model.vae.config.latent_channels}.",
            "Train on the plain version of the model.",
        )
    if source.is_file():
        model.cast(dtype)
    for module in (*model.parts.values(), model.vae):
        module.requires_grad_(False).eval().to(place)
    if place.type == "cuda":
        model.unet.to(memory_format=torch.channels_last)
    return model


def _pipeline(source: Path, asked: str, dtype: torch.dtype) -> Any:
    """The diffusers pipeline, whose parts we take."""
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    kind = ""
    options: dict[str, Any] = {"dtype": {"vae": torch.float32, "default": dtype}, "use_safetensors": True}
    if source.is_file():
        return _single_file(source)
    if source.is_dir():
        index = source / "model_index.json"
        if not index.is_file():
            raise UserError(
                f"{source} is not a Stable Diffusion model.",
                "It has no model_index.json.",
                "Give a diffusers folder or a .safetensors checkpoint.",
            )
        kind = _kind_of(source.name, _json(index))
        if not list((source / "unet").glob("diffusion_pytorch_model*.safetensors")):
            raise UserError(
                f"{source.name} has no .safetensors weights in unet/.",
                "Pickled weights can run code and are never opened.",
                "Get the model's safetensors version.",
            )
        if not (source / "unet" / "diffusion_pytorch_model.safetensors").is_file() and list(
            (source / "unet").glob("*.fp16.safetensors")
        ):
            options["variant"] = "fp16"
    elif asked.count("/") != 1 or asked.startswith((".", "/", "~")):
        raise UserError(f'There is no model at "{asked}".', do='Check the path, or use "starter".')
    try:
        if not source.exists():
            kind = _kind_of(asked, DiffusionPipeline.load_config(asked))  # before gigabytes come
        if kind == "StableDiffusionPipeline":
            options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return DiffusionPipeline.from_pretrained(str(source) if source.exists() else asked, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        do = (
            "Check the path."
            if source.exists()
            else "Check the id and the connection, or download it and give its folder."
        )
        raise UserError(f'The model "{asked}" could not be loaded.', reason, do) from error


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged.", f"It is not JSON: {error}.", "Download the model again.") from None


def _kind_of(name: str, index: Any) -> str:
    """The pipeline's class in a model_index.json, when it is one of ours."""
    kind = index.get("_class_name", "") if isinstance(index, dict) else ""
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise UserError(
            f"{name} is {f'a {kind}' if kind else 'no pipeline'}.", do="Give a Stable Diffusion 1.x, 2.x or XL model."
        )
    return str(kind)


def _single_file(source: Path) -> Any:
    """A checkpoint in the original Stable Diffusion key names."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors import SafetensorError, safe_open

    if source.suffix != ".safetensors":
        raise UserError(
            f"{source.name} is not a .safetensors file.",
            "Pickled checkpoints can run code and are never opened.",
            "Convert it to safetensors first.",
        )
    try:
        with safe_open(str(source), "pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{source.name} cannot be read.", str(error), "Download it again.") from None
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise UserError(f"{source.name} is not a Stable Diffusion checkpoint.", "It has no UNet inside.")
    kind = StableDiffusionXLPipeline if any(key.startswith("conditioner.") for key in keys) else StableDiffusionPipeline
    try:
        return kind.from_single_file(str(source), dtype=torch.float32)  # cast by the caller, the VAE stays
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source.name} could not be loaded.",
            f"diffusers needs the model's configuration from the hub: {str(error).strip().splitlines()[0]}",
            "Connect once, or give the model as a diffusers folder.",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Load without the notes that do not concern a person: torchvision is not needed here."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    level = diffusers_log.get_verbosity(), transformers_log.get_verbosity()
    diffusers_log.set_verbosity_error()
    transformers_log.set_verbosity_error()
    diffusers_log.disable_progress_bar()
    transformers_log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torchvision.*")
            yield
    finally:
        diffusers_log.set_verbosity(level[0])
        transformers_log.set_verbosity(level[1])


logging.getLogger("diffusers").addFilter(lambda record: "torchvision" not in record.getMessage())
