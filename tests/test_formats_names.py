"""Names of layers, against tables taken from the real SD1.5, SD2.1 and SDXL (282, 282, 794 layers and their norms)."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

import pytest
from torch import nn

from reparam_diffusion.formats.keys import Key, parse_key
from reparam_diffusion.formats.names import (
    STANDARD,
    Layout,
    canonical,
    diffusers_name,
    flat_name,
    kohya_key,
    layout_of,
    ldm_path,
    spellings,
)
from reparam_diffusion.models.skeleton import skeleton

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("sd1", "sd2", "sdxl")


@cache
def golden(family: str) -> dict:
    """{"unet": [[path, class, shape, LDM path]], "text_encoders": [[prefix, [[path, class, shape]]]]}"""
    return json.loads(gzip.decompress((GOLDEN / f"keymap_{family}.json.gz").read_bytes()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_unet_path_has_its_ldm_path(family: str) -> None:
    rows = golden(family)["unet"]
    layout = Layout.of(path for path, *_ in rows)
    assert {path: ldm_path(path, layout) for path, *_ in rows} == {path: ldm for path, _, _, ldm in rows}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_flat_ldm_name_leads_back_without_a_model(family: str) -> None:
    for path, _, _, ldm in golden(family)["unet"]:
        assert diffusers_name(ldm.replace(".", "_")) == path.replace(".", "_")
        assert diffusers_name(path.replace(".", "_")) == path.replace(".", "_")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_model_accepts_both_spellings_of_every_golden_layer(family: str) -> None:
    parts = skeleton(family)
    table = spellings(parts)
    rows = golden(family)
    for path, _, shape, ldm in rows["unet"]:
        for name in (path, ldm):
            assert table[f"unet.{name.replace('.', '_')}"] == f"unet.{path}"
        assert list(parts["unet"].get_submodule(path).weight.shape) == shape
    for part, (_, layers) in zip(("te1", "te2"), rows["text_encoders"], strict=False):
        for path, _, shape in layers:
            site = table[f"{part}.{flat_name(path)}"]
            assert list(parts[part].get_submodule(site.partition(".")[2]).weight.shape) == shape
    assert len(set(table.values())) == len(rows["unet"]) + sum(len(layers) for _, layers in rows["text_encoders"])


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_written_with_the_names_that_other_programs_read(family: str) -> None:
    parts = skeleton(family)
    layout = layout_of(parts)
    rows = golden(family)
    wanted = {
        f"lora_unet_{(ldm if family == 'sdxl' else path).replace('.', '_')}" for path, _, _, ldm in rows["unet"]
    } | {f"{prefix}{path.replace('.', '_')}" for prefix, layers in rows["text_encoders"] for path, *_ in layers}
    assert {kohya_key(site, family=family, layout=layout) for site in spellings(parts).values()} == wanted


def test_a_unet_with_one_layer_a_block_counts_its_own_blocks(starter_unet: nn.Module) -> None:
    layout = layout_of({"unet": starter_unet})
    assert layout == Layout(down=(1, 1, 1), up=(2, 2, 2), up_attention=(True, True, False))
    assert ldm_path("down_blocks.1.resnets.0.conv1", layout) == "input_blocks.3.0.in_layers.2"
    assert ldm_path("up_blocks.0.upsamplers.0.conv", layout) == "output_blocks.1.2.conv"
    assert ldm_path("up_blocks.2.resnets.1.conv2", layout) == "output_blocks.5.0.out_layers.3"


def test_a_live_site_has_one_canonical_name_whatever_transformers_calls_it() -> None:
    assert canonical("te1.encoder.layers.0.mlp.fc1") == "te1.encoder_layers_0_mlp_fc1"
    assert canonical("te2.text_model.encoder.layers.0.mlp.fc1") == "te2.encoder_layers_0_mlp_fc1"
    assert kohya_key("te2.text_projection", family="sdxl", layout=STANDARD) == "lora_te2_text_projection"


LAYER = "encoder_layers_0_mlp_fc1"
OLD_TEXT = "text_encoder.text_model.encoder.layers.0"


@pytest.mark.parametrize(
    ("key", "site", "leaf"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.alpha", "unet.mid_block_attentions_0_proj_in", "alpha"),
        ("lora_unet_input_blocks_4_1_proj_in.alpha", "unet.input_blocks_4_1_proj_in", "alpha"),
        ("oft_unet_conv_in.oft_blocks", "unet.conv_in", "oft_blocks"),
        (f"lora_te_text_model_{LAYER}.hada_w1_a", f"te1.{LAYER}", "hada_w1_a"),
        (f"lora_te_{LAYER}.hada_w1_a", f"te1.{LAYER}", "hada_w1_a"),
        (f"lora_te1_text_model_{LAYER}.alpha", f"te1.{LAYER}", "alpha"),
        ("lora_te2_text_projection.lora_down.weight", "te2.text_projection", "lora_down.weight"),
        ("lycoris_conv_in.lokr_w1", "unet.conv_in", "lokr_w1"),
        ("unet.conv_in.lora_A.weight", "unet.conv_in", "lora_down.weight"),
        ("unet.conv_in.lora.up.weight", "unet.conv_in", "lora_up.weight"),
        ("unet.mid_block.attn1.processor.to_q_lora.up.weight", "unet.mid_block_attn1_to_q", "lora_up.weight"),
        ("mid_block.attn1.processor.to_out_lora.up.weight", "unet.mid_block_attn1_to_out_0", "lora_up.weight"),
        (f"{OLD_TEXT}.self_attn.to_k_lora.up.weight", "te1.encoder_layers_0_self_attn_k_proj", "lora_up.weight"),
        (f"{OLD_TEXT}.mlp.fc1.lora_linear_layer.up.weight", f"te1.{LAYER}", "lora_up.weight"),
        ("text_encoder_2.text_projection.lora_B.weight", "te2.text_projection", "lora_up.weight"),
        ("base_model.model.conv_in.lora_B.default.weight", "unet.conv_in", "lora_up.weight"),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_E", f"te1.{LAYER}", "lora_E"),
        ("diffusion_model.input_blocks.4.1.proj_in.lora_A.weight", "unet.input_blocks_4_1_proj_in", "lora_down.weight"),
        ("unet.conv_in.alpha", "unet.conv_in", "alpha"),
        ("unet.conv_in.oft_R.weight", "unet.conv_in", "oft_R.weight"),
    ],
)
def test_a_files_key_says_part_layer_and_leaf(key: str, site: str, leaf: str) -> None:
    parsed = parse_key(key)
    assert isinstance(parsed, Key)
    assert (f"{parsed.part}.{parsed.flat}", parsed.leaf) == (site, leaf)


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("bundle_emb.x.string_to_param.*", "textual inversion"),
        ("lora_te3_encoder_block_0.lora_up.weight", "third text encoder"),
        ("model.diffusion_model.input_blocks.0.0.weight", "none that adapter files use"),
        ("conv_in.lora_embedding_A", "none that adapter files use"),
        ("lora_unet_conv_in", "no piece"),
    ],
)
def test_a_strange_key_is_explained(key: str, word: str) -> None:
    parsed = parse_key(key)
    assert isinstance(parsed, str)
    assert word in parsed
