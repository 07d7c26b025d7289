"""Loading a folder in diffusers' layout, or a hub id, through diffusers' own pipelines, whose parts we take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.parts import Parts
from reparam_diffusion.models.source import Source


def load_pipeline(source: Source, dtype: torch.dtype) -> Parts:
    """The parts of a folder or a hub model, the VAE in fp32. Raises UserError when they cannot be loaded."""
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    options: dict[str, Any] = {"dtype": {"vae": torch.float32, "default": dtype}, "use_safetensors": True}
    if not (source.configs / "text_encoder_2" / "config.json").is_file():  # SD 1.x and 2.x come with more than we want
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    where = source.name
    if source.folder is not None:
        options["variant"] = _variant(source.folder)
        where = str(source.folder)
    try:
        pipe = DiffusionPipeline.from_pretrained(where, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        do = "Check the id and the connection, or download it and give its folder."
        if source.folder is not None:
            do = "Check the path, or get the model again."
        raise UserError(f'The model "{source.name}" could not be loaded.', reason, do) from error
    seconds = [getattr(pipe, name, None) for name in ("text_encoder_2", "tokenizer_2")]
    return Parts(
        unet=pipe.unet,
        vae=pipe.vae,
        text_encoders=[part for part in (pipe.text_encoder, seconds[0]) if part is not None],
        tokenizers=[part for part in (pipe.tokenizer, seconds[1]) if part is not None],
        scheduler=pipe.scheduler,
    )


def import_pipelines() -> None:
    """Import what loading a model imports: seconds, once a process."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    assert all((StableDiffusionPipeline, StableDiffusionXLPipeline, CLIPTokenizer))


def _variant(folder: Path) -> str | None:
    """None for plain weights, else the variant that the UNet's weights come in, such as "fp16"."""
    files = [file.name for file in (folder / "unet").glob("diffusion_pytorch_model*.safetensors")]
    if not files:
        raise UserError(
            f"{folder.name} has no .safetensors weights in unet/.",
            "Pickled weights can run code and are never opened.",
            "Get the model's safetensors version.",
        )
    variants = {_variant_of(name) for name in files}
    return None if None in variants else sorted(name for name in variants if name)[0]


def _variant_of(name: str) -> str | None:
    """The "fp16" in diffusion_pytorch_model.fp16.safetensors, also of a weight in pieces."""
    word = name.removeprefix("diffusion_pytorch_model").removesuffix(".safetensors").split("-")[0].strip(".")
    return word or None
