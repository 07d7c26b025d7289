"""A diffusers pipeline over parts that are loaded already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from reparam_diffusion.models.quiet import quiet


def pipeline_over(
    parts: Mapping[str, nn.Module],
    *,
    vae: Any = None,
    tokenizers: Sequence[Any] = (None, None),
    scheduler: Any = None,
    from_picture: bool = False,
    device: torch.device | None = None,
) -> Any:
    """The pipeline of the parts' family, or the one that begins from a picture.

    Without a VAE it can carry adapters and draw nothing.

    It works on `device`, or where its first part lies. Any: diffusers' and transformers' classes are not imported here.
    """
    import diffusers

    rest: dict[str, Any] = {
        "vae": vae,
        "tokenizer": tokenizers[0],
        "scheduler": scheduler or diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        "unet": parts["unet"],
        "text_encoder": parts.get("te1"),
    }
    kind: Any = diffusers.StableDiffusionImg2ImgPipeline if from_picture else diffusers.StableDiffusionPipeline
    more: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if "te2" in parts:
        kind = diffusers.StableDiffusionXLImg2ImgPipeline if from_picture else diffusers.StableDiffusionXLPipeline
        more = {"text_encoder_2": parts["te2"], "tokenizer_2": tokenizers[1], "add_watermarker": False}
    if device is not None:  # parts may rest elsewhere, and diffusers would take the first one's place for its own
        kind = type(kind.__name__, (kind,), {"device": property(lambda _: device)})
    with quiet():
        return kind(**rest, **more)
