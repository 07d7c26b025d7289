"""Tiny but real models for the format tests, and how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.inject import attach

TOKENS = 6


def unet_like(family: str, *, seed: int = 0) -> nn.Module:
    """A UNet2DConditionModel with a family's layout: SD1 has 1x1 convolutions around attention, SDXL linear layers."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    more = {}
    if family == "sdxl":
        more = {
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 12 + 6 * 4,
        }
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=2 if family == "sdxl" else 1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=24 if family == "sdxl" else 12,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **more,
    )
    return unet.requires_grad_(False).eval()


def text_encoder_like(*, projected: bool = False, seed: int = 1) -> nn.Module:
    """A CLIP text encoder; `projected` is SDXL's second one, whose modules sit below text_model."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=8,
        projection_dim=12,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    return model.requires_grad_(False).eval()


def parts_like(family: str) -> dict[str, nn.Module]:
    """All trainable parts of a tiny model of a family ("sd1" or "sdxl"), with every parameter random."""
    parts = {"unet": unet_like(family), "te1": text_encoder_like()}
    if family == "sdxl":
        parts["te2"] = text_encoder_like(projected=True, seed=2)
    chance = torch.Generator().manual_seed(3)
    for model in parts.values():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=chance))
    return parts


@torch.no_grad()
def output(parts: Mapping[str, nn.Module]) -> Tensor:
    """What all parts of a model give for fixed inputs, in one vector."""
    chance = torch.Generator().manual_seed(7)
    unet = parts["unet"]
    x = torch.randn(2, 4, 8, 8, generator=chance)
    text = torch.randn(2, TOKENS, unet.config.cross_attention_dim, generator=chance)
    added = {"text_embeds": torch.randn(2, 12, generator=chance), "time_ids": torch.randn(2, 6, generator=chance)}
    more = {"added_cond_kwargs": added} if unet.config.addition_embed_type else {}
    pieces = [unet(x, torch.tensor([3, 500]), text, **more).sample.flatten()]
    tokens = torch.randint(2, 50, (2, TOKENS), generator=chance)
    for part in ("te1", "te2"):
        if part in parts:
            answer = parts[part](tokens, output_hidden_states=True)
            pieces.append(answer.last_hidden_state.flatten())
            if hasattr(answer, "text_embeds"):
                pieces.append(answer.text_embeds.flatten())
    return torch.cat(pieces)


def with_adapters(parts: Mapping[str, nn.Module], adapters: Mapping[str, Adapter]) -> Tensor:
    """The output with adapters attached."""
    with attach(parts, adapters):
        return output(parts)


def errors(ours: Tensor, theirs: Tensor, base: Tensor) -> tuple[float, float, float]:
    """(relative error of the output, relative error of the change, how far the adapter moves the output)."""
    change = (theirs - base).norm()
    wrong = (ours - theirs).norm()
    return (wrong / theirs.norm()).item(), (wrong / change).item(), (change / base.norm()).item()


def assert_equal(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    """The law of every reader and writer: 1e-5 of the output, 1e-4 of a change of at least a tenth."""
    of_output, of_change, moved = errors(ours, theirs, base)
    assert moved >= 0.1, f"the adapter moves the output by {moved:.2g} only, which proves nothing"
    assert of_output <= 1e-5, f"error of the output {of_output:.2g}"
    assert of_change <= 1e-4, f"error of the change {of_change:.2g}"
