"""LyCORIS 4.1.3, PEFT 0.21.2 and diffusers 0.42.1 as the other side of the format tests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from formats_tiny import output
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.config import spec_of
from reparam_diffusion.formats.names import kohya_key, layout_of, spellings
from reparam_diffusion.targets import build_adapters, plan_sites

# Its own presets raise for Stable Diffusion ("duplicated lora name"), so this one is ours.
PRESET = {
    "enable_conv": True,
    "unet_target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
    "unet_target_name": ["conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_1"],
    "text_encoder_target_module": ["CLIPAttention", "CLIPMLP"],
    "text_encoder_target_name": [],
}
FOLDERS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}
WIDE = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def adapters_for(
    parts: Mapping[str, nn.Module], method: str, *, convolutions: bool = True, **spec
) -> dict[str, Adapter]:
    """Our adapters with every parameter random."""
    unet = "all" if convolutions else "attention+mlp"
    targets = {part: unet if part == "unet" else "attention+mlp" for part in parts}
    adapters = build_adapters(parts, plan_sites(parts, targets, spec_of(method, **spec)), seed=1)
    chance = torch.Generator().manual_seed(5)
    for adapter in adapters.values():
        for name, parameter in adapter.named_parameters():
            draw = torch.randn(parameter.shape, generator=chance)
            parameter.data.copy_(parameter * (1 + 0.3 * draw) if name == "magnitude" else 0.3 * draw)
    return adapters


def _encoders(parts: Mapping[str, nn.Module]) -> nn.Module | list[nn.Module]:
    return [parts["te1"], parts["te2"]] if "te2" in parts else parts["te1"]


def _network(parts: Mapping[str, nn.Module], **settings):
    from lycoris.kohya import LycorisNetworkKohya
    from lycoris.logging import logger

    logger.setLevel(logging.ERROR)
    LycorisNetworkKohya.apply_preset(PRESET)
    settings = {"lora_dim": 4, "conv_lora_dim": 3, "alpha": 6.0, "conv_alpha": 2.0, **settings}
    return LycorisNetworkKohya(
        _encoders(parts), parts["unet"], bypass_mode=False, warn_on_unmatched=False, **settings
    )  # fmt: skip


def lycoris_file(parts: Mapping[str, nn.Module], file: Path, **settings) -> Tensor:
    """Let LyCORIS write a file with every tensor random; returns the output that it gives."""
    network = _network(parts, **settings)
    network.apply_to(_encoders(parts), parts["unet"], True, True)
    chance = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        draw = torch.randn(parameter.shape, generator=chance)
        if name.endswith("dora_scale"):
            parameter.data.mul_(1 + 0.3 * draw)
        elif name.endswith("rescale"):
            parameter.data.copy_(1 + 0.3 * draw)
        elif settings.get("network_module") == "full":  # holds W + ΔW once applied
            parameter.data.add_(0.2 * draw * parameter.abs().mean().clamp_min(0.05))
        else:
            # A plain product with large factors makes the tiny network chaotic: rounding alone would show.
            parameter.data.copy_((0.3 if "network_module" in settings else 0.15) * draw)
    theirs = output(parts)
    save_file({key: tensor.detach().contiguous().clone() for key, tensor in network.state_dict().items()}, file)
    network.restore()
    return theirs


def lycoris_reads(parts: Mapping[str, nn.Module], file: Path, family: str) -> Tensor:
    """The output with our file read by LyCORIS, which only knows the live model's own names."""
    from lycoris.kohya import create_network_from_weights

    _network(parts)  # sets the preset
    layout = layout_of(parts)
    prefixes = {"unet": "lora_unet_", "te1": "lora_te1_" if "te2" in parts else "lora_te_", "te2": "lora_te2_"}
    names = {
        kohya_key(site, family=family, layout=layout): prefixes[site.partition(".")[0]]
        + site.partition(".")[2].replace(".", "_")
        for site in spellings(parts).values()
    }
    tensors = {
        f"{names[key.partition('.')[0]]}.{key.partition('.')[2]}": tensor for key, tensor in load_file(file).items()
    }
    renamed = file.with_name("renamed.safetensors")
    save_file(tensors, renamed)
    encoders = _encoders(parts)
    network, _ = create_network_from_weights(1.0, str(renamed), None, encoders, parts["unet"])
    assert len(network.unet_loras) + len(network.text_encoder_loras) == len({key.partition(".")[0] for key in tensors})
    network.apply_to(encoders, parts["unet"], True, True)
    theirs = output(parts)
    network.restore()
    return theirs


def peft_folder(
    parts: Mapping[str, nn.Module],
    folder: Path,
    config: Callable[[list[str]], object],
    targets: Sequence[str],
    *,
    std: float = 0.3,
    merged: bool = False,
) -> Tensor:
    """Let PEFT write a folder for each part with every tensor random; returns the output. `parts` are used up."""
    from peft import get_peft_model

    chance = torch.Generator().manual_seed(5)
    models = {}
    for part, module in parts.items():
        model = get_peft_model(module, config(list(targets) if part == "unet" else TEXT)).eval()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            draw = torch.randn(parameter.shape, generator=chance)
            if "magnitude" in name:
                parameter.data.mul_(1 + 0.3 * draw)
            elif "ia3_l" in name or "boft_s" in name:
                parameter.data.copy_(1 + 0.3 * draw)
            else:
                parameter.data.copy_((1.0 if "lora_E" in name else std) * draw)
        if merged:
            model.merge_adapter()
        models[part] = model
    theirs = output({part: model.base_model.model for part, model in models.items()})
    for part, model in models.items():
        if merged:
            model.unmerge_adapter()
        model.save_pretrained(folder / FOLDERS[part])
    return theirs


def peft_reads(parts: Mapping[str, nn.Module], folder: Path) -> Tensor:
    """The output with our folders read by PEFT. `parts` are used up."""
    from peft import PeftModel

    models = {part: PeftModel.from_pretrained(module, folder / FOLDERS[part]).eval() for part, module in parts.items()}
    return output({part: model.base_model.model for part, model in models.items()})


def pipeline_of(parts: Mapping[str, nn.Module]):
    """A diffusers pipeline with these parts and nothing else."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    rest = {"vae": None, "tokenizer": None, "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False)}
    own = {"unet": parts["unet"], "text_encoder": parts["te1"]}
    if "te2" in parts:
        return StableDiffusionXLPipeline(**rest, **own, text_encoder_2=parts["te2"], tokenizer_2=None)
    return StableDiffusionPipeline(
        **rest, **own, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def diffusers_reads(parts: Mapping[str, nn.Module], file: Path) -> Tensor:
    """The output with our file read by a diffusers pipeline. `parts` are used up."""
    pipeline_of(parts).load_lora_weights(file.parent, weight_name=file.name)
    return output(parts)
