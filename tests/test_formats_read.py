"""Odd spellings, old forms, broken and partial files: read right, or explained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formats_oracles import adapters_for
from formats_tiny import assert_equal, output, parts_like, with_adapters
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.names import layout_of, ldm_path
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import write_adapter
from reparam_diffusion.inject import find_module, merged

SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = SITE.replace("unet.", "lora_unet_").replace(".", "_")
CONV = "unet.mid_block.resnets.0.conv1"
CONV_KEY = "lora_unet_mid_block_resnets_0_conv1"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    return parts_like("sd1")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weight_at(parts: dict[str, nn.Module], site: str) -> Tensor:
    return find_module(parts, site).weight.detach()


def delta_of(parts: dict[str, nn.Module], tensors: Tensors, folder: Path, site: str = SITE, **header: str) -> Tensor:
    """ΔW of one site of a file with these tensors."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "a.safetensors", header or None)
    adapters, unmatched = read_adapter(folder / "a.safetensors").match(parts)
    assert unmatched == []
    return adapters[site].delta(weight_at(parts, site))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


# --- one file in every spelling ---------------------------------------------------------------------------------------
def as_lycoris(key: str) -> str:
    return key.replace("lora_unet_", "lycoris_").replace("lora_te_text_model_", "lycoris_")


def as_flat_text(key: str) -> str:
    return key.replace("lora_te_text_model_", "lora_te_")


def as_te1(key: str) -> str:
    return key.replace("lora_te_", "lora_te1_")


@pytest.mark.parametrize("rename", [as_lycoris, as_flat_text, as_te1])
@pytest.mark.parametrize(("method", "spec"), [("lora", {"rank": 2, "alpha": 3.0}), ("lokr", {"factor": 4})])
def test_prefixes_of_every_program_lead_to_the_same_layers(
    rename: Callable[[str], str], method: str, spec: dict, parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    adapters = adapters_for(parts, method, **spec)
    file = write_adapter(tmp_path / "a.safetensors", adapters, parts=parts, family="sd1", precision="fp32")
    save_file({rename(key): tensor for key, tensor in load_file(file).items()}, tmp_path / "b.safetensors")
    back, unmatched = read_adapter(tmp_path / "b.safetensors").match(parts)
    assert unmatched == []
    assert set(back) == set(adapters)
    for site, adapter in adapters.items():
        close(back[site].delta(weight_at(parts, site)), adapter.delta(weight_at(parts, site)).detach())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("style", ["lora_unet_", "diffusion_model.", "oft_unet_"])
def test_ldm_names_are_read_for_every_base(style: str, family: str, tmp_path: Path) -> None:
    parts = {"unet": parts_like(family)["unet"]}
    method = ("oft", {"block_size": 4}) if style == "oft_unet_" else ("lora", {"rank": 2, "alpha": 3.0})
    adapters = adapters_for(parts, method[0], **method[1])
    tensors = {}
    for site, adapter in adapters.items():
        path = ldm_path(site.removeprefix("unet."), layout_of(parts))
        assert path is not None
        name = f"{style}{path}" if "." in style else f"{style}{path.replace('.', '_')}"
        tensors |= {f"{name}.{leaf}": tensor.clone() for leaf, tensor in adapter.tensors().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    back, unmatched = read_adapter(tmp_path / "a.safetensors").match(parts)
    assert unmatched == []
    assert set(back) == set(adapters)
    for site in adapters:
        close(back[site].delta(weight_at(parts, site)), adapters[site].delta(weight_at(parts, site)).detach())


# --- alpha and shapes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (None, 1.0),
        (torch.tensor(6.0), 2.0),
        (torch.tensor([6.0]), 2.0),
        (torch.tensor(6), 2.0),
        (torch.tensor(6.0, dtype=torch.float16), 2.0),
        (torch.tensor(6.0, dtype=torch.bfloat16), 2.0),
        (torch.tensor(0.0), 0.0),
    ],
)
def test_alpha_of_any_kind_means_the_same(alpha: Tensor | None, scale: float, parts: dict, tmp_path: Path) -> None:
    down, up = draw(3, 16), draw(16, 3)
    tensors = {f"{KEY}.lora_down.weight": down, f"{KEY}.lora_up.weight": up}
    if alpha is not None:
        tensors[f"{KEY}.alpha"] = alpha
    close(delta_of(parts, tensors, tmp_path), scale * up @ down)


def test_factors_are_multiplied_in_fp32(parts: dict, tmp_path: Path) -> None:
    down, up = draw(3, 16).half(), draw(16, 3).half()
    tensors = {f"{KEY}.lora_down.weight": down, f"{KEY}.lora_up.weight": up}
    close(delta_of(parts, tensors, tmp_path), up.float() @ down.float())


def test_pointwise_factors_may_be_matrices_or_convolutions_on_either_kind_of_layer(parts: dict, tmp_path: Path) -> None:
    down, up = draw(3, 16), draw(16, 3)
    pointwise = "unet.mid_block.attentions.0.proj_in"
    assert weight_at(parts, pointwise).ndim == 4
    name = pointwise.replace("unet.", "lora_unet_").replace(".", "_")
    matrix = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    close(delta_of(parts, matrix, tmp_path, pointwise), (up @ down)[:, :, None, None])
    four = {f"{KEY}.lora_down.weight": down[:, :, None, None], f"{KEY}.lora_up.weight": up[:, :, None, None]}
    close(delta_of(parts, four, tmp_path), up @ down)
    whole = draw(16, 16)
    close(delta_of(parts, {f"{name}.diff": whole}, tmp_path, pointwise), whole[:, :, None, None])


def test_whole_lokr_factors_ignore_an_infinite_alpha(parts: dict, tmp_path: Path) -> None:
    small, large = draw(4, 2), draw(4, 8)
    tensors = {f"{KEY}.lokr_w1": small, f"{KEY}.lokr_w2": large, f"{KEY}.alpha": torch.tensor(float("inf")).half()}
    close(delta_of(parts, tensors, tmp_path), torch.kron(small, large))


def test_dora_of_a_square_layer_goes_by_the_place_of_the_one(parts: dict, tmp_path: Path) -> None:
    down, up, weight = draw(3, 16), draw(16, 3), weight_at(parts, SITE)
    whole = weight + up @ down
    for scale, axis in ((draw(16, 1).abs(), 1), (draw(1, 16).abs(), 0), (draw(16).abs(), 1)):
        tensors = {f"{KEY}.lora_down.weight": down, f"{KEY}.lora_up.weight": up, f"{KEY}.dora_scale": scale}
        factor = scale.reshape(16, 1) if axis == 1 else scale
        expected = whole * factor / whole.norm(dim=axis, keepdim=True) - weight
        close(delta_of(parts, tensors, tmp_path), expected)


# --- old and rare forms -----------------------------------------------------------------------------------------------
def test_a_factor_kept_apart_belongs_to_the_update(parts: dict, tmp_path: Path) -> None:
    down, up = draw(3, 16), draw(16, 3)
    tensors = {f"{KEY}.lora_down.weight": down, f"{KEY}.lora_up.weight": up, f"{KEY}.scalar": torch.tensor(0.7)}
    close(delta_of(parts, tensors, tmp_path), 0.7 * up @ down)


@pytest.mark.parametrize("is_old", [False, True])
def test_glora_old_and_new_have_their_roles_swapped(is_old: bool, parts: dict, tmp_path: Path) -> None:
    site = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    name = site.replace("unet.", "lora_unet_").replace(".", "_")
    weight = weight_at(parts, site)
    out, entry = weight.shape
    a, b, up, down = draw(entry, 3), draw(3, entry), draw(out, 3), draw(3, entry, seed=9)
    names = ("a2", "a1", "b2", "b1") if is_old else ("a1", "a2", "b1", "b2")
    tensors = {
        f"{name}.{leaf}.weight": tensor for leaf, tensor in zip(names, (a, b, up, down), strict=True)
    } | {f"{name}.alpha": torch.tensor(6.0)}  # fmt: skip
    close(delta_of(parts, tensors, tmp_path, site), 2.0 * (weight @ a @ b + up @ down))


def test_old_diag_oft_stores_the_rotation_itself(parts: dict, tmp_path: Path) -> None:
    rotation, weight = draw(4, 4, 4), weight_at(parts, SITE)
    expected = torch.block_diag(*rotation).T @ weight - weight
    close(delta_of(parts, {f"{KEY}.oft_diag": rotation}, tmp_path), expected)


@pytest.mark.parametrize("module", ["networks.oft", "lycoris.kohya"])
def test_alpha_zero_is_no_rotation_for_kohya_and_no_limit_for_lycoris(module: str, parts: dict, tmp_path: Path) -> None:
    blocks, weight = draw(4, 4, 4), weight_at(parts, SITE)
    skew = blocks - blocks.transpose(1, 2)
    eye = torch.eye(4)
    rotation = torch.block_diag(*((eye + skew) @ (eye - skew).inverse()))
    expected = torch.zeros(16, 16) if module == "networks.oft" else rotation.T @ weight - weight
    tensors = {f"{KEY}.oft_blocks": blocks, f"{KEY}.alpha": torch.tensor(0.0)}
    close(delta_of(parts, tensors, tmp_path, ss_network_module=module), expected)


def test_kohyas_constraint_holds_over_the_whole_tensor(parts: dict, tmp_path: Path) -> None:
    blocks, weight = draw(4, 4, 4), weight_at(parts, SITE)
    skew = blocks - blocks.transpose(1, 2)
    skew = skew * (0.05 * 16 / skew.norm())
    eye = torch.eye(4)
    rotation = torch.block_diag(*((eye + skew) @ (eye - skew).inverse()))
    key = KEY.replace("lora_unet", "oft_unet")
    tensors = {f"{key}.oft_blocks": blocks, f"{key}.alpha": torch.tensor(0.05)}
    found = delta_of(parts, tensors, tmp_path, ss_network_module="networks.oft")
    close(found, rotation.T @ weight - weight)


def test_a_bias_beside_a_lora_is_added_when_attached_and_when_merged(parts: dict, tmp_path: Path) -> None:
    tensors = {
        "lora_unet_conv_out.lora_down.weight": draw(2, 8, 3, 3),
        "lora_unet_conv_out.lora_up.weight": draw(4, 2, 1, 1),
        "lora_unet_conv_out.diff_b": draw(4),
        f"{KEY}.diff": draw(16, 16),
        f"{KEY}.diff_b": 9 * draw(16),  # the layer has no bias of its own
    }
    save_file(tensors, tmp_path / "a.safetensors")
    file = read_adapter(tmp_path / "a.safetensors")
    adapters, unmatched = file.match(parts)
    assert unmatched == []
    base = output(parts)
    attached = with_adapters(parts, adapters)
    with merged(parts, [(adapters, lambda site: 1.0)]):
        assert_equal(output(parts), attached, base)
    assert torch.equal(output(parts), base)
    assert find_module(parts, SITE).bias is None
    without = {site: tensor for site, tensor in tensors.items() if "diff_b" not in site}
    save_file(without, tmp_path / "b.safetensors")
    plain = with_adapters(parts, read_adapter(tmp_path / "b.safetensors").match(parts)[0])
    assert (attached - plain).norm() > 0.01 * plain.norm()


# --- facts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("header", "family", "trigger"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}, "sdxl", ""),
        ({"ss_base_model_version": "sd_v2_v", "ss_v2": "True"}, "sd2", ""),
        ({"ss_base_model_version": "sd_v1", "ss_trigger_words": "sks"}, "sd1", "sks"),
        (
            {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.trigger_phrase": "a b"},
            "sdxl",
            "a b",
        ),
        ({"ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10}})}, "sd1", "sks dog"),
        ({"ss_dataset_dirs": "nonsense"}, "sd1", ""),
        ({}, "sd1", ""),
    ],
)
def test_the_base_and_the_trigger_are_told_by_header_or_width(
    header: dict[str, str], family: str, trigger: str, tmp_path: Path
) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": draw(2, 768), f"{name}.lora_up.weight": draw(16, 2)}
    save_file(tensors, tmp_path / "a.safetensors", header or None)
    file = read_adapter(tmp_path / "a.safetensors")
    assert (file.base, file.trigger, file.method, file.ranks) == (family, trigger, "lora", {f"unet.{name[10:]}": 2})


def test_a_file_can_be_looked_at_without_a_model(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": draw(2, 16),
        "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": draw(16, 2),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": draw(20, 3),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.hada_w1_b": draw(3, 12),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.hada_w2_a": draw(20, 3),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.hada_w2_b": draw(3, 12),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    file = read_adapter(tmp_path / "a.safetensors")
    assert sorted(file.sites) == ["te2.encoder_layers_0_mlp_fc1", "unet.down_blocks_1_attentions_0_proj_in"]
    assert (file.method, file.base) == ("mixed", "sdxl")
    found = file.delta("unet.down_blocks_1_attentions_0_proj_in", torch.zeros(16, 16))
    close(found, tensors["lora_unet_input_blocks_4_1_proj_in.lora_up.weight"] @ draw(2, 16))
    with pytest.raises(UserError, match="does not change"):
        file.delta("unet.conv_in", torch.zeros(1, 1))
    with pytest.raises(UserError, match="does not fit"):
        file.delta("unet.down_blocks_1_attentions_0_proj_in", torch.zeros(8, 16))


# --- what is left out, and why ----------------------------------------------------------------------------------------
def test_layers_that_do_not_fit_are_named_and_the_others_kept(parts: dict, tmp_path: Path) -> None:
    tensors = {
        f"{KEY}.lora_down.weight": draw(3, 16),
        f"{KEY}.lora_up.weight": draw(16, 3),
        f"{KEY}.bias_values": draw(4),
        f"{CONV_KEY}.lora_down.weight": draw(3, 99),
        f"{CONV_KEY}.lora_up.weight": draw(16, 3),
        "lora_unet_down_blocks_9_attentions_0_proj_in.lora_down.weight": draw(3, 16),
        "lora_unet_down_blocks_9_attentions_0_proj_in.lora_up.weight": draw(16, 3),
        "lora_te2_text_projection.lora_down.weight": draw(3, 16),
        "lora_te2_text_projection.lora_up.weight": draw(16, 3),
        "lora_unet_conv_out.alpha": torch.tensor(1.0),
        "lora_unet_conv_in.lokr_w1": draw(4),
        "lora_unet_conv_in.lokr_w2": draw(4),
        "lora_unet_mid_block_resnets_1_conv1.diff": torch.full((16, 16, 3, 3), float("nan")),
        "lora_unet_mid_block_resnets_1_conv2.lora_down.weight": torch.zeros(0, 16, 3, 3),
        "lora_unet_mid_block_resnets_1_conv2.lora_up.weight": torch.zeros(16, 0, 1, 1),
        "who_knows": draw(2),
        "emb_params": draw(2, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapters, unmatched = read_adapter(tmp_path / "a.safetensors").match(parts)
    assert list(adapters) == [SITE]
    why = dict(unmatched)
    assert "no reader uses" in why[f"{KEY}.bias_values"]
    assert "does not fit a weight of (16, 16, 3, 3)" in why[CONV_KEY]
    assert "no such layer" in why["lora_unet_down_blocks_9_attentions_0_proj_in"]
    assert "no second text encoder" in why["lora_te2_text_projection"]
    assert "no known kind" in why["lora_unet_conv_out"]
    assert "do not fit" in why["lora_unet_conv_in"]
    assert "not numbers" in why["lora_unet_mid_block_resnets_1_conv1"]
    assert "empty" in why["lora_unet_mid_block_resnets_1_conv2"]
    assert "none that adapter files use" in why["who_knows"]
    assert len(unmatched) == 10


def test_a_layer_under_two_names_is_taken_once(parts: dict, tmp_path: Path) -> None:
    ldm = ldm_path(SITE.removeprefix("unet."), layout_of(parts))
    assert ldm is not None
    tensors = {}
    for name in (KEY, f"lora_unet_{ldm.replace('.', '_')}"):
        tensors |= {f"{name}.lora_down.weight": draw(3, 16), f"{name}.lora_up.weight": draw(16, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapters, unmatched = read_adapter(tmp_path / "a.safetensors").match(parts)
    assert list(adapters) == [SITE]
    assert [why for _, why in unmatched] == ["the file has this layer twice, under two names"]


REFUSED = {
    "a full model": {"model.diffusion_model.input_blocks.0.0.weight": (2, 2), "first_stage_model.x.weight": (2, 2)},
    "own weights": {"down_blocks.0.resnets.0.conv1.weight": (2, 2), "conv_in.weight": (2, 2), "mid.x": (1,)},
    "textual inversion": {"emb_params": (3, 8)},
    "no adapter format": {"a.b.c": (1,), "d.e.f": (1,), "g.h.i": (1,), "j.k.l": (1,)},
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_no_adapter_is_said_to_be_something_else(word: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(shape) for key, shape in REFUSED[word].items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=word) as caught:
        read_adapter(tmp_path / "a.safetensors")
    assert caught.value.do


def test_files_that_cannot_be_opened_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no adapter"):
        read_adapter(tmp_path / "missing.safetensors")
    for name in ("a.pt", "b.ckpt", "c.bin"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(UserError, match="Convert it to"):
            read_adapter(tmp_path / name)
    for content in (b"", b"abc", b"\xff" * 64, (10**9).to_bytes(8, "little") + b"{}"):
        (tmp_path / "d.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="not a whole"):
            read_adapter(tmp_path / "d.safetensors")
    save_file({}, tmp_path / "e.safetensors")
    with pytest.raises(UserError, match="no tensors"):
        read_adapter(tmp_path / "e.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no adapter folder"):
        read_adapter(tmp_path / "folder")


def test_a_truncated_file_is_refused_at_every_length(parts: dict, tmp_path: Path) -> None:
    adapters = {SITE: adapters_for(parts, "lora", rank=2)[SITE]}
    whole = write_adapter(tmp_path / "a.safetensors", adapters, parts=parts, family="sd1").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "b.safetensors").write_bytes(whole[:length])
        with pytest.raises(UserError, match="cannot be read"):
            read_adapter(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("config", "weights", "word"),
    [
        ("{", True, "not JSON"),
        ("[]", True, "not a JSON object"),
        ("{}", False, "missing"),
        ('{"peft_type": "VERA"}', True, "VERA"),
    ],
)
def test_broken_peft_folders_are_explained(config: str, weights: bool, word: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    if weights:
        save_file({"base_model.model.x.lora_A.weight": draw(1, 1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=word):
        read_adapter(tmp_path)


LEAVES = {
    "lora": {"lora_down.weight": (3, 16), "lora_up.weight": (16, 3), "alpha": (), "dora_scale": (16, 1)},
    "tucker": {"lora_down.weight": (3, 16, 1, 1), "lora_mid.weight": (3, 3, 1, 1), "lora_up.weight": (16, 3, 1, 1)},
    "loha": {"hada_w1_a": (16, 3), "hada_w1_b": (3, 16), "hada_w2_a": (16, 3), "hada_w2_b": (3, 16), "alpha": ()},
    "lokr": {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4), "alpha": ()},
    "oft": {"oft_blocks": (4, 4, 4), "alpha": (), "rescale": (16, 1)},
    "boft": {"oft_blocks": (2, 4, 4, 4), "alpha": ()},
    "ia3": {"weight": (16,), "on_input": ()},
    "glora": {"a1.weight": (16, 3), "a2.weight": (3, 16), "b1.weight": (16, 3), "b2.weight": (3, 16), "alpha": ()},
    "full": {"diff": (16, 16), "diff_b": (16,), "scalar": ()},
    "old oft": {"oft_diag": (4, 4, 4)},
}
PEFT_LEAVES = {
    "LORA": {"lora_A.weight": (3, 16), "lora_B.weight": (16, 3), "lora_B.bias": (16,), "lora_magnitude_vector": (16,)},
    "ADALORA": {"lora_A": (3, 16), "lora_E": (3, 1), "lora_B": (16, 3)},
    "OFT": {"oft_R.weight": (4, 6)},
    "BOFT": {"boft_R": (1, 4, 4, 4), "boft_s": (16, 1)},
    "IA3": {"ia3_l": (16, 1)},
}
ODD = [(), (0,), (7,), (2, 0), (1, 1), (5, 3), (2, 2, 2), (1, 2, 3, 4), (1, 1, 1, 1, 1)]


@pytest.mark.parametrize("form", [*LEAVES, *PEFT_LEAVES])
def test_tensors_of_any_odd_shape_are_read_or_explained(form: str, parts: dict, tmp_path: Path) -> None:
    leaves = {**LEAVES, **PEFT_LEAVES}[form]
    start = f"base_model.model.{SITE.removeprefix('unet.')}" if form in PEFT_LEAVES else KEY
    if form in PEFT_LEAVES:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": form}))
    file = tmp_path / "adapter_model.safetensors"
    for leaf in leaves:
        for shape in (leaves[leaf], *ODD):
            tensors = {f"{start}.{name}": draw(*(shape if name == leaf else own)) for name, own in leaves.items()}
            save_file(tensors, file)
            try:
                opened = read_adapter(file)
            except UserError:
                assert shape != leaves[leaf]
                continue
            assert isinstance(opened.ranks, dict)
            assert isinstance(opened.base, str)
            adapters, unmatched = opened.match(parts)
            if shape == leaves[leaf]:
                assert list(adapters) == [SITE], unmatched
            else:
                assert adapters or unmatched
            for site, adapter in adapters.items():
                assert adapter.delta(weight_at(parts, site)).shape == (16, 16)


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "LORA", "lora_alpha": None},
        {"peft_type": "LORA", "lora_alpha": "much"},
        {"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": {"(": 2}},
        {"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": {"to_q": "x"}},
    ],
)
def test_a_configuration_that_makes_no_sense_is_told(config: dict, parts: dict, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    start = f"base_model.model.{SITE.removeprefix('unet.')}"
    tensors = {f"{start}.lora_A.weight": draw(3, 16), f"{start}.lora_B.weight": draw(16, 3)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="makes no sense"):
        read_adapter(tmp_path)
