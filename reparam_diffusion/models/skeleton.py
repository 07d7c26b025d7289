"""The standard models' layers without weights, for work on adapter files that needs only names and shapes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from reparam_diffusion.models.load import Family, quiet

_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd2": {
        "sample_size": 64,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # Any: options of diffusers' UNet
_ENCODERS = {"sd1": [(768, 3072, 12)], "sd2": [(1024, 4096, 23)], "sdxl": [(768, 3072, 12), (1280, 5120, 32)]}
"""(width, inner width, layers)"""


@cache
def skeleton(family: Family) -> dict[str, nn.Module]:
    """The parts of a family's standard model on torch's meta device."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with quiet(), torch.device("meta"):
        parts: dict[str, nn.Module] = {"unet": UNet2DConditionModel(**_UNETS[family])}
        for number, (width, inner, layers) in enumerate(_ENCODERS[family], 1):
            config = CLIPTextConfig(
                hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, projection_dim=width
            )
            parts[f"te{number}"] = (CLIPTextModelWithProjection if number == 2 else CLIPTextModel)(config)
    return {name: part.requires_grad_(False).eval() for name, part in parts.items()}
