"""A diffusers pipeline over parts that are loaded already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from reparam_diffusion.models.quiet import quiet


def pipeline_over(
    parts: Mapping[str, nn.Module], *, vae: Any = None, tokenizers: Sequence[Any] = (None, None), scheduler: Any = None
) -> Any:
    """The pipeline of the parts' family; without a VAE it can carry adapters and draw nothing.

    Any: diffusers' and transformers' classes are not imported here.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    rest: dict[str, Any] = {
        "vae": vae,
        "tokenizer": tokenizers[0],
        "scheduler": scheduler or DDIMScheduler(steps_offset=1, clip_sample=False),
        "unet": parts["unet"],
        "text_encoder": parts.get("te1"),
    }
    with quiet():
        if "te2" in parts:
            second = {"text_encoder_2": parts["te2"], "tokenizer_2": tokenizers[1]}
            return StableDiffusionXLPipeline(**rest, **second, add_watermarker=False)
        return StableDiffusionPipeline(
            **rest, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
