"""Models in the original Stable Diffusion's names, written the other way round than our reader reads them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reparam_diffusion.models.checkpoint import TEXT, UNET, VAE, Kind

GOLDEN = Path(__file__).parent / "golden"
_VAE = (
    (r"\.down_blocks\.(\d)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d)\.resnets\.", lambda found: f".up.{3 - int(found[1])}.block."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0\.", lambda found: f".up.{3 - int(found[1])}.upsample."),
    (r"\.mid_block\.resnets\.(\d)", lambda found: f".mid.block_{int(found[1]) + 1}"),
    (r"\.mid_block\.attentions\.0\.group_norm", ".mid.attn_1.norm"),
    (r"\.mid_block\.attentions\.0\.to_([qkv])", r".mid.attn_1.\1"),
    (r"\.mid_block\.attentions\.0\.to_out\.0", ".mid.attn_1.proj_out"),
    (r"\.conv_shortcut", ".nin_shortcut"),
    (r"\.conv_norm_out", ".norm_out"),
)
_OPENCLIP = (
    ("text_model.", ""),
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm.", "ln_final."),
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
)


def original_state(kind: Kind, parts: Any, *, text: bool = True) -> dict[str, Tensor]:
    """All tensors of a model's parts, real or on the meta device, as the original file of that kind has them."""
    state = {f"{UNET}{name}": tensor for name, tensor in _unet(kind, parts.unet).items()}
    state |= {f"{VAE}{name}": tensor for name, tensor in _vae(parts.vae).items()}
    for encoder, prefix in zip(parts.text_encoders, TEXT[kind] if text else (), strict=True):
        state |= {f"{prefix}{name}": tensor for name, tensor in _text(encoder, prefix).items()}
    return state


def _unet(kind: Kind, unet: Any) -> dict[str, Tensor]:
    """Names from the golden tables, which ComfyUI, kohya and diffusers agree on."""
    table = json.loads(gzip.decompress((GOLDEN / f"keymap_{kind[:4].rstrip('-')}.json.gz").read_bytes()))
    names = {path: original for path, _, _, original in table["unet"]}
    state = {}
    for key, tensor in unet.state_dict().items():
        path, _, leaf = key.rpartition(".")
        state[f"{names[path]}.{leaf}"] = tensor
    return state


def _vae(vae: Any) -> dict[str, Tensor]:
    state = {}
    for key, tensor in vae.state_dict().items():
        name = f".{key}"
        for pattern, new in _VAE:
            name = re.sub(pattern, new, name)
        if ".mid.attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # 1x1 convolutions there
        state[name.removeprefix(".")] = tensor
    return state


def _text(encoder: Any, prefix: str) -> dict[str, Tensor]:
    state = encoder.state_dict()
    if not prefix.endswith(".model."):
        return {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in state.items()}
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key
        for old, new in _OPENCLIP:
            name = name.replace(old, new)
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif ".self_attn.q_proj." in name:
            both = [state[key.replace("q_proj", other)] for other in ("q_proj", "k_proj", "v_proj")]
            found[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(both)
        elif "_proj." not in name or "out_proj" in name or "c_proj" in name:
            found[name] = tensor
    if "text_projection" not in found:  # a 2.x file has one layer more than is used, and a projection
        layers = encoder.config.num_hidden_layers
        last = [name for name in found if f"resblocks.{layers - 1}." in name]
        found |= {name.replace(f".{layers - 1}.", f".{layers}."): found[name].clone() for name in last}
        found["text_projection"] = torch.empty(
            encoder.config.hidden_size, encoder.config.hidden_size, device=tensor.device
        )
        found["logit_scale"] = torch.empty((), device=tensor.device)
    return found
