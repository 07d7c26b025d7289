"""A diffusers pipeline over parts that are loaded already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from reparam_diffusion.models.quiet import quiet


def pipeline_over(
    parts: Mapping[str, nn.Module],
    *,
    vae: Any = None,
    tokenizers: Sequence[Any] = (None, None),
    scheduler: Any = None,
    from_picture: bool = False,
) -> Any:
    """The pipeline of the parts' family, or the one that begins from a picture.

    Without a VAE it can carry adapters and draw nothing.

    Any: diffusers' and transformers' classes are not imported here.
    """
    import diffusers

    rest: dict[str, Any] = {
        "vae": vae,
        "tokenizer": tokenizers[0],
        "scheduler": scheduler or diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        "unet": parts["unet"],
        "text_encoder": parts.get("te1"),
    }
    with quiet():
        if "te2" in parts:
            kind = diffusers.StableDiffusionXLImg2ImgPipeline if from_picture else diffusers.StableDiffusionXLPipeline
            second = {"text_encoder_2": parts["te2"], "tokenizer_2": tokenizers[1]}
            return kind(**rest, **second, add_watermarker=False)
        kind = diffusers.StableDiffusionImg2ImgPipeline if from_picture else diffusers.StableDiffusionPipeline
        return kind(**rest, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
