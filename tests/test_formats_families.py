"""Which base an adapter file is for, how other programs spell its names, and what is odd in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.adapters.foreign import FORMS as READ_ONLY
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.families import FAMILY_TITLES, OTHERS
from reparam_diffusion.formats.keys import FUSED_TEXT, THIRD_TEXT, Key, adapter_name, parse_key, short
from reparam_diffusion.formats.programs import FORMS, UNKNOWN_FORM, readers, traits_of
from reparam_diffusion.formats.read import AdapterFile, read_adapter
from reparam_diffusion.gallery.doctor import diagnose, diagnosis_lines, repair
from reparam_diffusion.gallery.report import report_lines, report_of
from reparam_diffusion.models.skeleton import skeleton

Tensors = dict[str, Tensor]
CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
FC1 = "encoder_layers_0_mlp_fc1"


def lora(key: str, wide: int, tall: int, down: str = "lora_down.weight", up: str = "lora_up.weight") -> Tensors:
    return {f"{key}.{down}": torch.ones(2, wide), f"{key}.{up}": torch.ones(tall, 2)}


def opened(tensors: Tensors, folder: Path, header: dict[str, str] | None = None) -> AdapterFile:
    save_file(tensors, folder / "a.safetensors", header)
    return read_adapter(folder / "a.safetensors")


# --- names of other programs -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("start", "part"),
    [
        ("clip_l.", "te1"), ("clip_l.transformer.", "te1"), ("text_encoders.clip_l.transformer.", "te1"),
        ("text_encoder_1.", "te1"), ("te1.", "te1"), ("te.", "te1"), ("cond_stage_model.transformer.", "te1"),
        ("conditioner.embedders.0.transformer.", "te1"), ("base_model.model.clip_l.", "te1"), ("transformer.", "te1"),
        ("clip_g.", "te2"), ("clip_g.transformer.", "te2"), ("text_encoders.clip_g.transformer.", "te2"),
        ("te2.", "te2"), ("text_encoder_2.", "te2"), ("conditioner.embedders.1.model.", "te2"),
    ],
)  # fmt: skip
def test_text_encoders_have_one_name_whichever_program_wrote_it(start: str, part: str) -> None:
    key = parse_key(f"{start}text_model.encoder.layers.0.mlp.fc1.lora_down.weight")
    assert isinstance(key, Key)
    assert (key.part, key.flat, key.leaf) == (part, FC1, "lora_down.weight")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("mlp.c_fc", "mlp_fc1"), ("mlp.c_proj", "mlp_fc2"), ("attn.out_proj", "self_attn_out_proj")],
)
@pytest.mark.parametrize(
    ("start", "part"), [("conditioner.embedders.1.model.", "te2"), ("cond_stage_model.model.", "te1")]
)
def test_open_clip_names_are_those_of_transformers(start: str, part: str, theirs: str, ours: str) -> None:
    key = parse_key(f"{start}transformer.resblocks.3.{theirs}.lora_up.weight")
    assert isinstance(key, Key)
    assert (key.part, key.flat) == (part, f"encoder_layers_3_{ours}")


def test_what_cannot_be_read_is_named_with_its_own_reason(tmp_path: Path) -> None:
    assert parse_key("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj.lora_up.weight") == FUSED_TEXT
    assert parse_key("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.lora_up.weight") == THIRD_TEXT
    file = opened(lora("clip_g.text_projection", 1280, 1280), tmp_path)
    assert file.match(skeleton("sd1"))[1] == [("clip_g.text_projection", "the model has no second text encoder")]
    assert list(file.match(skeleton("sdxl"))[0]) == ["te2.text_projection"]


@pytest.mark.parametrize("name", ["default", "style", "my-adapter_2"])
@pytest.mark.parametrize(
    ("key", "leaf"),
    [
        ("lora_A.{}.weight", "lora_down.weight"), ("lora_B.{}.weight", "lora_up.weight"), ("lora_E.{}", "lora_E"),
        ("lora_magnitude_vector.{}.weight", "magnitude"), ("hada_w1_a.{}", "hada_w1_a"), ("lokr_w1.{}", "lokr_w1"),
        ("oft_R.{}.weight", "oft_R.weight"), ("ia3_l.{}", "ia3_l"),
    ],
)  # fmt: skip
def test_an_adapters_own_name_in_a_peft_key_is_no_part_of_the_layer(key: str, leaf: str, name: str) -> None:
    found = parse_key(f"base_model.model.mid_block.attentions.0.proj_in.{key.format(name)}")
    assert isinstance(found, Key)
    assert (found.flat, found.leaf) == ("mid_block_attentions_0_proj_in", leaf)


def test_keys_without_an_adapters_name_have_none() -> None:
    for key in (
        "unet.a.b.lora_A.weight",
        "a.b.lora_A",
        "lora_unet_a.lora_up.weight",
        "a.oft_R.weight",
        "a.lora_B.bias",
    ):
        assert adapter_name(key) == ""


def test_of_several_adapters_in_one_file_the_others_are_named(tmp_path: Path) -> None:
    start = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    file = opened(
        lora(start, 8, 8, "lora_A.one.weight", "lora_B.one.weight")
        | lora(start, 8, 8, "lora_A.two.weight", "lora_B.two.weight"),
        tmp_path,
    )
    assert len(file.sites) == 1
    assert [why for _, why in file.unmatched] == ['the file holds several PEFT adapters; only "one" is read'] * 2


# --- the family ------------------------------------------------------------------------------------------------------
def dotted(key: str, wide: int, tall: int) -> Tensors:
    return lora(key, wide, tall, "lora_A.weight", "lora_B.weight")


@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        (lora("lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216), "flux1"),
        (lora("lora_unet_single_blocks_0_linear1", 3072, 21504), "flux1"),
        (dotted("transformer.single_transformer_blocks.0.attn.to_k", 3072, 3072), "flux1"),
        (lora("lora_transformer_single_transformer_blocks_0_attn_to_k", 3072, 3072), "flux1"),
        (lora("lora_unet_single_blocks_0_linear1", 3072, 27648), "flux2"),
        (dotted("diffusion_model.double_blocks.0.img_attn.qkv", 4096, 12288), "flux2"),
        (dotted("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 3072, 27648), "flux2"),
        (dotted("diffusion_model.blocks.0.cross_attn.k", 5120, 5120), "wan"),
        (dotted("diffusion_model.blocks.0.ffn.0", 5120, 13824), "wan"),
        (lora("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536, 4608), "sd3"),
        (dotted("transformer.transformer_blocks.0.attn.add_k_proj", 1536, 1536), "sd3"),
        (dotted("diffusion_model.layers.0.attention.to_q", 3840, 3840), "z-image"),
        (dotted("diffusion_model.layers.0.attention.qkv", 2304, 3840), "lumina2"),
        (dotted("transformer.transformer_blocks.0.img_mlp.net.0.proj", 3072, 12288), "qwen-image"),
        (dotted("transformer.transformer_blocks.59.attn.to_q", 3072, 3072), "qwen-image"),
        (lora("lora_unet_double_blocks_0_img_mlp_fc1", 3072, 12288), "hunyuan-video"),
        (dotted("diffusion_model.distilled_guidance_layer.in_proj", 64, 5120), "chroma"),
        (dotted("diffusion_model.blocks.0.attn.wq", 6144, 6144), "krea2"),
        (dotted("diffusion_model.blocks.0.self_attn.q_proj", 2048, 2048), "anima"),
        (dotted("transformer.transformer_blocks.0.attn1.to_q", 1152, 1152), "pixart"),
        (dotted("transformer.transformer_blocks.0.attn1.to_q", 777, 777), "transformer"),
        (lora(CROSS, 768, 320), "sd1"),
        (lora(CROSS, 1024, 320), "sd2"),
        (lora("lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q", 1280, 1280), "sdxl"),
        ({f"{CROSS}.lokr_w1": torch.ones(8, 8), f"{CROSS}.lokr_w2": torch.ones(40, 96)}, "sd1"),
        ({f"{CROSS}.hada_w1_a": torch.ones(320, 2), f"{CROSS}.hada_w1_b": torch.ones(2, 1024),
          f"{CROSS}.hada_w2_a": torch.ones(320, 2), f"{CROSS}.hada_w2_b": torch.ones(2, 1024)}, "sd2"),
        ({f"{CROSS}.oft_blocks": torch.ones(80, 4, 4)}, "sd1-or-sd2"),
        ({f"{CROSS}.weight": torch.ones(320), f"{CROSS}.on_input": torch.tensor(False)}, "sd1-or-sd2"),
        ({f"{CROSS}.weight": torch.ones(768), f"{CROSS}.on_input": torch.tensor(True)}, "sd1"),
        (lora("lora_te_text_model_encoder_layers_0_mlp_fc1", 768, 3072), "sd1"),
        (lora("lora_te_text_model_encoder_layers_0_mlp_fc1", 1024, 4096), "sd2"),
        (lora("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280, 5120), "sdxl"),
        (lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 768, 3072), "unknown"),
    ],
)  # fmt: skip
def test_names_and_shapes_tell_the_family_of_a_file_without_a_header(
    tensors: Tensors, family: str, tmp_path: Path
) -> None:
    file = opened(tensors, tmp_path)
    assert (file.base, file.base_conflict) == (family, "")
    assert family == "unknown" or FAMILY_TITLES[family] in "\n".join(report_lines(report_of(file.file)))


@pytest.mark.parametrize(
    ("header", "family"),
    [
        ({"ss_base_model_version": "flux1"}, "flux1"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux1"),
        ({"modelspec.architecture": "flux.2-klein/lora"}, "flux2"),
        ({"modelspec.architecture": "stable-diffusion-v3-medium/lora"}, "sd3"),
        ({"ss_base_model_version": "zimage"}, "z-image"),
        ({"modelspec.architecture": "qwen-image/lora"}, "qwen-image"),
        ({"modelspec.architecture": "wan2.1/lora"}, "wan"),
        ({"ss_network_module": "networks.lora_wan"}, "wan"),
        ({"ss_base_model_version": "sd_1.5"}, "sd1"),
        ({"ss_base_model_version": "sdxl_1.0"}, "sdxl"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd2"),
    ],
)
def test_headers_of_every_program_tell_the_family(header: dict[str, str], family: str, tmp_path: Path) -> None:
    assert opened(lora("lora_unet_mid_block_attentions_0_proj_in", 6, 6), tmp_path, header).base == family


@pytest.mark.parametrize(
    ("key", "wide", "header", "family"),
    [
        ("lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k", 2048, "sd_v1", "sdxl"),
        (CROSS, 768, "sdxl_base_v1-0", "sd1"),
        (CROSS, 768, "flux1", "sd1"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, "sd_v1", "flux1"),
    ],
)
def test_where_header_and_shapes_differ_the_shapes_win_and_it_is_shown(
    key: str, wide: int, header: str, family: str, tmp_path: Path
) -> None:
    file = opened(lora(key, wide, 1280), tmp_path, {"ss_base_model_version": header})
    assert file.base == family
    assert FAMILY_TITLES[family] in file.base_conflict
    assert file.base_conflict in "\n".join(report_lines(report_of(file.file)))


def test_a_header_that_the_shapes_allow_is_believed(tmp_path: Path) -> None:
    header = {"modelspec.architecture": "chroma/lora"}
    file = opened(lora("lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216), tmp_path, header)
    assert (file.base, file.base_conflict) == ("chroma", "")


def test_an_error_says_what_the_adapter_is_for(tmp_path: Path) -> None:
    file = opened(lora("lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216), tmp_path)
    _, left = file.match(skeleton("sd1"))
    assert file.misfit(left, "sd1") == "It is for FLUX.1; the model is Stable Diffusion 1.x."


# --- the doctor ------------------------------------------------------------------------------------------------------
def test_a_file_is_not_measured_against_a_model_that_it_is_not_for(tmp_path: Path) -> None:
    from reparam_diffusion.models.load import load_model

    file = opened(lora(CROSS, 768, 320), tmp_path).file
    found = diagnose(file, load_model("starter", device="cpu"))
    assert (found.family, found.layers, found.fitting) == ("sd1", 1, 1)
    assert "not checked against that" in found.certainty


def test_a_file_of_another_family_is_checked_without_a_base_and_that_is_said(tmp_path: Path) -> None:
    tensors = lora("lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216)
    tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"][0, 0] = torch.nan
    file = opened(tensors, tmp_path, {"ss_base_model_version": "flux1"}).file
    found = diagnose(file)
    assert (found.family, found.is_checked, found.is_healthy) == ("flux1", False, False)
    assert "checked without a base" in "\n".join(diagnosis_lines(found))
    json.dumps(found.to_dict())
    with pytest.raises(UserError, match=r"FLUX\.1"):
        list(repair(file, tmp_path / "b.safetensors"))
    assert not (tmp_path / "b.safetensors").exists()


# --- who opens it ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", sorted({*METHODS, *(form.name for form in READ_ONLY), "full"}))
def test_every_method_is_in_the_table(kind: str) -> None:
    assert kind in FORMS
    traits = traits_of(kind, {"alpha": torch.tensor(1.0)})
    assert kind in traits
    assert UNKNOWN_FORM not in traits


def test_who_opens_an_unlisted_method_is_unknown() -> None:
    assert traits_of("toy", {"toy": torch.ones(1)}) == {UNKNOWN_FORM}
    verdicts = readers({UNKNOWN_FORM}, "kohya")
    assert {verdict.answer for verdict in verdicts} == {"unknown"}
    assert not any(verdict.opens for verdict in verdicts)
    with_word = {v.program: v.answer for v in readers({UNKNOWN_FORM, "a learned word"}, "kohya")}
    assert (with_word["A1111"], with_word["diffusers"]) == ("unknown", "no")


# --- oddities --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("leaf", "tensor", "word"),
    [
        ("lora_up.weight", torch.ones(320, 2, dtype=torch.int32), "int32"),
        ("lora_up.weight", torch.ones(320, 2, dtype=torch.bool), "bool"),
        ("lora_down.weight", torch.ones(2, 768, dtype=torch.uint8), "uint8"),
        ("alpha", torch.ones(320), "320 values"),
        ("alpha", torch.ones(0), "0 values"),
        ("alpha", torch.tensor(True), "bool"),
    ],
)
def test_numbers_that_are_no_weights_are_refused_in_a_sentence(
    leaf: str, tensor: Tensor, word: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=word) as caught:
        opened(lora(CROSS, 768, 320) | {f"{CROSS}.{leaf}": tensor}, tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("leaf", "tensor"),
    [
        ("alpha", torch.tensor(float("nan"))), ("lora_down.weight", torch.ones(0, 768)),
        ("lora_up.weight", torch.ones(())), ("lora_down.weight", torch.ones(768)),
        ("lora_down.weight", torch.ones([1] * 40 + [2, 768])),
    ],
)  # fmt: skip
def test_tensors_of_no_use_are_named_and_not_used(leaf: str, tensor: Tensor, tmp_path: Path) -> None:
    file = opened(lora(CROSS, 768, 320) | {f"{CROSS}.{leaf}": tensor}, tmp_path)
    found, left = file.match(skeleton("sd1"))
    assert not found
    assert all(len(key) + len(why) < 500 for key, why in left)


def test_half_floats_of_eight_bits_are_read(tmp_path: Path) -> None:
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in lora(CROSS, 768, 320).items()}
    found, left = opened(tensors, tmp_path).match(skeleton("sd1"))
    assert len(found) == 1
    assert not left


@pytest.mark.parametrize("key", ["lora_unet_" + "x" * 1_000_000, "y" * 1_000_000, "lora_unet_\x1b[31mred", "a\x07.b"])
def test_a_message_repeats_a_key_in_bounded_length_and_without_control_characters(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        opened(lora(key, 8, 8), tmp_path)
    told = str(caught.value)
    assert len(told) < 600
    assert told.isprintable()
    file = opened(lora(key, 8, 8) | lora(CROSS, 768, 320), tmp_path)
    assert len(file.sites) == 1
    assert all(len(name) <= 120 and name.isprintable() for name, _ in file.unmatched)


def test_control_characters_of_a_header_reach_no_terminal(tmp_path: Path) -> None:
    header = {"modelspec.trigger_phrase": "\x1b[31msks\x07", "ss_sd_model_name": "a\x9bb"}
    file = opened(lora(CROSS, 768, 320), tmp_path, header)
    assert all(line.isprintable() for line in report_lines(report_of(file.file)))
    assert len(opened(lora(CROSS, 768, 320), tmp_path, {"trigger_words": "x" * 100_000}).trigger) <= 500
    assert short("a" * 500) == "a" * 119 + "…"


def test_families_have_titles() -> None:
    assert {*OTHERS, "sd1", "sd2", "sdxl"} <= set(FAMILY_TITLES)
