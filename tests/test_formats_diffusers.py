"""Our files in a diffusers 0.42.1 pipeline, and its files here: the same output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from formats_oracles import adapters_for, diffusers_reads, pipeline_of
from formats_tiny import assert_equal, output, parts_like, with_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.peft import write_diffusers
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import write_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torchvision.*:UserWarning"),
]
NAME = "pytorch_lora_weights.safetensors"
FORMS = {
    "lora": ("lora", {"rank": 3, "alpha": 5.0}),
    "lora of many ranks": ("lora", {"rank": 9, "alpha": 5.0, "conv_rank": 4, "conv_alpha": 2.0}),
    "adalora": ("adalora", {"init_rank": 4, "alpha": 7.0}),
}
FAMILIES = ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_diffusers_gives_the_same_output_with_our_file(names: str, family: str, form: str, tmp_path: Path) -> None:
    parts = parts_like(family)
    base = output(parts)
    method, spec = FORMS[form]
    adapters = adapters_for(parts, method, **spec)
    ours = with_adapters(parts, adapters)
    if names == "kohya":
        file = write_adapter(tmp_path / NAME, adapters, parts=parts, family=family, precision="fp32")
    else:
        file = write_diffusers(tmp_path / NAME, adapters, parts=parts)
    back, unmatched = read_adapter(file).match(parts)
    assert unmatched == []
    assert_equal(with_adapters(parts, back), ours, base)
    assert_equal(diffusers_reads(parts, file), ours, base)


@pytest.mark.parametrize("left_out", [("out_proj",), ("out_proj", "k_proj", "v_proj", "fc1", "fc2")])
def test_text_encoder_layers_without_out_proj_are_not_lost_in_diffusers(left_out: tuple, tmp_path: Path) -> None:
    parts = parts_like("sd1")
    base = output(parts)
    adapters = adapters_for(parts, "lora", rank=3, alpha=5.0)
    adapters = {site: adapter for site, adapter in adapters.items() if not site.endswith(left_out)}
    ours = with_adapters(parts, adapters)
    file = write_adapter(tmp_path / NAME, adapters, parts=parts, family="sd1", precision="fp32")
    assert set(read_adapter(file).match(parts)[0]) == set(adapters), "the padding is for others"
    assert_equal(diffusers_reads(parts, file), ours, base)


def test_dora_reaches_diffusers_through_its_own_file(tmp_path: Path) -> None:
    parts = parts_like("sd1")
    base = output(parts)
    adapters = adapters_for(parts, "lora", rank=3, alpha=5.0, weight_decompose=True)
    plain = adapters_for(parts, "lora", rank=3, alpha=5.0)
    adapters |= {site: adapter for site, adapter in plain.items() if "mid_block" in site}
    ours = with_adapters(parts, adapters)
    file = write_diffusers(tmp_path / NAME, adapters, parts=parts)
    assert_equal(diffusers_reads(parts, file), ours, base)


@pytest.mark.parametrize("has_metadata", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_diffusers_saves_gives_the_same_output_here(family: str, has_metadata: bool, tmp_path: Path) -> None:
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    parts = parts_like(family)
    base = output(parts)
    pipeline = pipeline_of(parts)
    alpha = 5 if has_metadata else 3  # without metadata diffusers takes alpha as the rank
    wide = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    text = ["q_proj", "k_proj", "v_proj", "out_proj"]
    chance = torch.Generator().manual_seed(5)
    saved = {}
    for part, model in parts.items():
        model.add_adapter(LoraConfig(r=3, lora_alpha=alpha, target_modules=wide if part == "unet" else text))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=chance))
        key = {"unet": "unet_lora_layers", "te1": "text_encoder_lora_layers", "te2": "text_encoder_2_lora_layers"}[part]
        saved[key] = get_peft_model_state_dict(model)
    told = _collate_lora_metadata(
        {{"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}[part]: model for part, model in parts.items()}
    )
    theirs = output(parts)
    pipeline.save_lora_weights(tmp_path, **saved, **(told if has_metadata else {}))
    fresh = parts_like(family)
    adapters, unmatched = read_adapter(tmp_path / NAME).match(fresh)
    assert unmatched == []
    assert_equal(with_adapters(fresh, adapters), theirs, base)


def test_the_old_names_of_diffusers_are_read(tmp_path: Path) -> None:
    parts = parts_like("sd1")
    adapters = adapters_for(parts, "lora", rank=3, alpha=3.0)
    adapters = {site: a for site, a in adapters.items() if site.endswith(("to_q", "to_out.0", "q_proj", "out_proj"))}
    file = write_diffusers(tmp_path / NAME, adapters, parts=parts)
    old = {}
    for key, tensor in load_file(file).items():
        half = "down" if "lora_A" in key else "up"
        path = key.rpartition(".lora_")[0]
        if key.startswith("unet."):
            path = path.removesuffix(".0") if path.endswith("to_out.0") else path
            block, _, name = path.rpartition(".")
            old[f"{block}.processor.{name}_lora.{half}.weight"] = tensor
        else:
            old[f"{path}.lora_linear_layer.{half}.weight"] = tensor
    save_file(old, file)
    back, unmatched = read_adapter(file).match(parts)
    assert unmatched == []
    assert_equal(with_adapters(parts, back), with_adapters(parts, adapters), output(parts))


def test_the_metadata_says_no_more_than_other_versions_understand(tmp_path: Path) -> None:
    parts = parts_like("sd1")
    file = write_diffusers(tmp_path / NAME, adapters_for(parts, "lora", rank=3), parts=parts)
    with safe_open(str(file), "pt") as opened:
        told = json.loads(opened.metadata()["lora_adapter_metadata"])
        keys = list(opened.keys())
    assert {key.partition(".")[2] for key in told} == {"r", "lora_alpha", "rank_pattern", "use_dora", "target_modules"}
    assert all(key.startswith(("unet.", "text_encoder.text_model.encoder.")) for key in keys)


def test_what_diffusers_cannot_open_is_refused(tmp_path: Path) -> None:
    parts = parts_like("sd1")
    with pytest.raises(UserError, match="diffusers opens nothing else"):
        write_diffusers(tmp_path / NAME, adapters_for(parts, "loha", rank=2), parts=parts)
