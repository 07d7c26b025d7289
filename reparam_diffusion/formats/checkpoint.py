"""A whole model's weights under the original Stable Diffusion names, as single-file checkpoints have them.

SD 1: LDM's UNet and VAE, CLIP as transformers has it. SD 2: OpenCLIP instead. SDXL: CLIP and OpenCLIP as embedders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from reparam_diffusion.formats.names import Family, Layout, Parts, layout_of, ldm_path

Weights = Callable[[str], Tensor]
""""<part>.<state dict key>" -> the tensor to write, for instance with adapters merged in."""
Named = Iterator[tuple[str, Tensor]]

_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_names(parts: Parts, vae: nn.Module, family: Family, weights: Weights) -> Named:
    """Every tensor of a checkpoint with its name, one at a time."""
    layout = layout_of(parts)
    for key in parts["unet"].state_dict():
        yield f"model.diffusion_model.{_unet_name(key, layout)}", weights(f"unet.{key}")
    if family == "sd2":
        yield from _open_clip("cond_stage_model.model.", parts["te1"], lambda key: weights(f"te1.{key}"))
    else:
        prefix = "conditioner.embedders.0." if family == "sdxl" else "cond_stage_model."
        for key in parts["te1"].state_dict():
            yield f"{prefix}transformer.text_model.{key.removeprefix('text_model.')}", weights(f"te1.{key}")
    if family == "sdxl":
        yield from _open_clip("conditioner.embedders.1.model.", parts["te2"], lambda key: weights(f"te2.{key}"))
    blocks = sum(1 for _ in vae.get_submodule("decoder.up_blocks").children())
    for key, tensor in vae.state_dict().items():
        name = _vae_name(key, blocks)
        is_matrix = re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", name) is not None
        yield f"first_stage_model.{name}", tensor[:, :, None, None] if is_matrix and tensor.ndim == 2 else tensor


def _unet_name(key: str, layout: Layout) -> str:
    path, _, leaf = key.rpartition(".")
    module = path
    while module:  # the layers inside attention keep their names below the block that LDM numbers
        name = ldm_path(module, layout)
        if name is not None:
            return f"{name}{path[len(module) :]}.{leaf}"
        module = module.rpartition(".")[0]
    raise ValueError(f"{key} has no name in the original layout")


def _open_clip(prefix: str, encoder: nn.Module, weights: Weights) -> Named:
    """OpenCLIP's names: one matrix for q, k and v, and the projection transposed."""
    for key in encoder.state_dict():
        plain = key.removeprefix("text_model.")
        if plain in _OPEN_CLIP:
            yield prefix + _OPEN_CLIP[plain], weights(key)
        elif plain == "text_projection.weight":
            yield f"{prefix}text_projection", weights(key).T
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", plain):
            layer, inner, leaf = found.groups()
            start = f"{prefix}transformer.resblocks.{layer}."
            if inner == "self_attn.q_proj":
                three = [weights(key.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")]
                yield f"{start}attn.in_proj_{leaf}", torch.cat(three)
            elif inner in _OPEN_CLIP_LAYER:
                yield f"{start}{_OPEN_CLIP_LAYER[inner]}.{leaf}", weights(key)


def _vae_name(key: str, blocks: int) -> str:
    """LDM's name of a VAE tensor: up blocks are counted from the picture's side there."""
    if found := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(.+)", key):
        coder, side, number, rest = found.groups()
        place = int(number) if side == "down" else blocks - 1 - int(number)
        rest = re.sub(r"^resnets\.", "block.", rest).replace("conv_shortcut", "nin_shortcut")
        rest = re.sub(r"^(down|up)samplers\.0\.", r"\1sample.", rest)
        return f"{coder}.{side}.{place}.{rest}"
    if found := re.fullmatch(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)\.(weight|bias)", key):
        coder, kind, number, rest, leaf = found.groups()
        if kind == "resnets":
            return f"{coder}.mid.block_{int(number) + 1}.{rest.replace('conv_shortcut', 'nin_shortcut')}.{leaf}"
        return f"{coder}.mid.attn_1.{_VAE_ATTENTION[rest]}.{leaf}"
    return key.replace("conv_norm_out", "norm_out")


def live_weights(parts: Mapping[str, nn.Module]) -> Weights:
    """The parts' own tensors, by "<part>.<key>"."""
    states = {part: model.state_dict() for part, model in parts.items()}
    return lambda name: states[name.partition(".")[0]][name.partition(".")[2]]
