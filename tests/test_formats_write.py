"""What we write: read back exactly, in any precision, whole or not at all, with a header that others understand."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from formats_oracles import adapters_for
from formats_tiny import assert_equal, output, parts_like, with_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reparam_diffusion import files
from reparam_diffusion.adapters import METHODS
from reparam_diffusion.adapters.adalora import Adalora
from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.container import TensorFile, data_hash
from reparam_diffusion.formats.header import SetFacts, TrainingFacts, build_header
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import AdapterWriter, write_adapter
from reparam_diffusion.inject import find_module

SPECS = {
    "lora": ("lora", {"rank": 3, "alpha": 5.0, "conv_rank": 2, "conv_alpha": 7.0}),
    "dora": ("lora", {"rank": 3, "alpha": 5.0, "weight_decompose": True}),
    "loha": ("loha", {"rank": 3, "alpha": 5.0}),
    "lokr": ("lokr", {"factor": 4}),
    "lokr low": ("lokr", {"factor": 4, "low_rank": True, "rank": 1, "alpha": 2.0}),
    "lokr unbalanced": ("lokr", {"factor": 2, "unbalanced": True}),
    "oft": ("oft", {"block_size": 4}),
    "oft constrained": ("oft", {"block_size": 4, "constraint": 0.1}),
    "oft on inputs": ("oft", {"block_size": 4, "side": "input"}),
    "oft on inputs constrained": ("oft", {"block_size": 4, "side": "input", "constraint": 0.1}),
    "adalora": ("adalora", {"init_rank": 4, "alpha": 7.0}),
}
FACTS = TrainingFacts(
    name="{teddy}",
    method="lokr",
    family="sdxl",
    rank=8,
    alpha=4.0,
    network_args={"factor": 8},
    base_model="starter",
    resolution=(1024, 768),
    clip_skip=1,
    steps=120,
    epochs=1.5,
    sets=(SetFacts("sks", "toy", 6, 10, {"a sks toy": 4, "on grass, ü": 2}),),
    buckets={(64, 128): 4, (128, 64): 2},
    started_at=1_700_000_000.0,
    finished_at=1_700_000_600.5,
    config_toml="title = 'x'\n",
)


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    return parts_like("sd1")


def header_of(file: Path) -> dict[str, str]:
    with safe_open(str(file), "pt") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("form", SPECS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_method_comes_back_as_it_was(form: str, family: str, tmp_path: Path) -> None:
    parts = parts_like(family)
    base = output(parts)
    method, spec = SPECS[form]
    adapters = adapters_for(parts, method, **spec)
    path = write_adapter(tmp_path / "a.safetensors", adapters, parts=parts, family=family, precision="fp32")
    file = read_adapter(path)
    back, unmatched = file.match(parts)
    assert unmatched == []
    assert set(back) == set(adapters)
    assert file.method == ("lora" if method == "adalora" else method)
    assert all(type(adapter) is METHODS[file.method].adapter for adapter in back.values())
    assert file.base == family
    assert_equal(with_adapters(parts, back), with_adapters(parts, adapters), base)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])  # sdxl: LDM names, with one layer a block
def test_the_starter_models_adapters_come_back_as_they_were(
    family: str, starter_unet: nn.Module, starter_text_encoder: nn.Module, tmp_path: Path
) -> None:
    parts = {"unet": starter_unet, "te1": starter_text_encoder}
    for method in METHODS:
        adapters = adapters_for(parts, method)
        file = read_adapter(
            write_adapter(tmp_path / "a.safetensors", adapters, parts=parts, family=family, precision="fp32")
        )
        back, unmatched = file.match(parts)
        assert unmatched == []
        assert set(back) == set(adapters)
        for site in list(adapters)[::17]:
            weight = find_module(parts, site).weight
            exact = adapters[site].delta(weight).detach()
            assert (back[site].delta(weight) - exact).norm() <= 1e-6 * exact.norm(), site


def test_every_registered_method_is_among_the_forms_above() -> None:
    assert {method for method, _ in SPECS.values()} == set(METHODS)


@pytest.mark.parametrize(("precision", "allowed"), [("fp16", 5e-3), ("bf16", 4e-2)])
def test_smaller_precisions_are_as_close_as_they_can_be(
    precision: str, allowed: float, parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    for method in METHODS:
        adapters = adapters_for(parts, method)
        path = write_adapter(
            tmp_path / f"{method}.safetensors", adapters, parts=parts, family="sd1", precision=precision
        )
        wanted = torch.float16 if precision == "fp16" else torch.bfloat16
        assert {t.dtype for key, t in load_file(path).items() if not key.endswith("alpha")} == {wanted}
        back, _ = read_adapter(path).match(parts)
        for site, adapter in adapters.items():
            weight = find_module(parts, site).weight
            exact = adapter.delta(weight).detach()
            assert (back[site].delta(weight) - exact).norm() <= allowed * exact.norm(), site


def test_foreign_forms_and_input_rotations_can_be_written_as_whole_differences(parts: dict, tmp_path: Path) -> None:
    base = output(parts)
    adapters = adapters_for(parts, "oft", block_size=4, side="input")
    path = write_adapter(
        tmp_path / "a.safetensors", adapters, parts=parts, family="sd1", precision="fp32", as_diff=True
    )
    file = read_adapter(path)
    assert file.method == "full"
    full, _ = file.match(parts)
    assert_equal(with_adapters(parts, full), with_adapters(parts, adapters), base)
    again = write_adapter(tmp_path / "b.safetensors", full, parts=parts, family="sd1", precision="fp32")
    assert_equal(with_adapters(parts, read_adapter(again).match(parts)[0]), with_adapters(parts, adapters), base)


def test_norms_and_biases_survive_a_rewrite(parts: dict, tmp_path: Path) -> None:
    chance = torch.Generator().manual_seed(0)
    site = "unet.mid_block.attentions.0.norm"
    tensors = {
        "lora_unet_mid_block_attentions_0_norm.w_norm": torch.randn(16, generator=chance),
        "lora_unet_mid_block_attentions_0_norm.b_norm": torch.randn(16, generator=chance),
        "lora_unet_mid_block_resnets_0_conv1.diff": torch.randn(16, 16, 3, 3, generator=chance),
        "lora_unet_mid_block_resnets_0_conv1.diff_b": torch.randn(16, generator=chance),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapters, _ = read_adapter(tmp_path / "a.safetensors").match(parts)
    assert site in adapters
    path = write_adapter(tmp_path / "b.safetensors", adapters, parts=parts, family="sd1", precision="fp32")
    again = load_file(path)
    assert set(again) == set(tensors)
    for key, tensor in tensors.items():
        torch.testing.assert_close(again[key], tensor)


# --- what other programs need -----------------------------------------------------------------------------------------
def test_all_lora_layers_share_one_alpha(parts: dict, tmp_path: Path) -> None:
    mixed = adapters_for(parts, "lora", rank=3, alpha=5.0, conv_rank=2, conv_alpha=7.0)
    mixed |= {site: a for site, a in adapters_for(parts, "adalora", init_rank=4).items() if "mid_block" in site}
    path = write_adapter(tmp_path / "a.safetensors", mixed, parts=parts, family="sd1", precision="fp32")
    alphas = {float(tensor) for key, tensor in load_file(path).items() if key.endswith(".alpha")}
    assert alphas == {5.0}
    back, _ = read_adapter(path).match(parts)
    for site, adapter in mixed.items():
        weight = find_module(parts, site).weight
        torch.testing.assert_close(back[site].delta(weight), adapter.delta(weight).detach(), rtol=1e-5, atol=1e-6)


def test_oft_is_written_in_the_form_that_all_readers_agree_on(parts: dict, tmp_path: Path) -> None:
    adapters = adapters_for(parts, "oft", block_size=4, constraint=0.1)
    tensors = load_file(
        write_adapter(tmp_path / "a.safetensors", adapters, parts=parts, family="sd1", precision="fp32")
    )
    for key, tensor in tensors.items():
        if key.endswith("alpha"):
            assert float(tensor) == 1000.0
        else:
            assert torch.equal(tensor, torch.triu(tensor, 1))
            assert tensor.shape[1] <= tensor.shape[0] or tensor.shape[0] == 1


def test_every_module_with_a_rank_has_a_plain_alpha(parts: dict, tmp_path: Path) -> None:
    for method in ("lora", "loha", "lokr", "oft", "adalora"):
        path = write_adapter(tmp_path / "a.safetensors", adapters_for(parts, method), parts=parts, family="sd1")
        tensors = load_file(path)
        for name in {key.partition(".")[0] for key in tensors}:
            assert tensors[f"{name}.alpha"].shape == ()
            assert math.isfinite(float(tensors[f"{name}.alpha"]))


def _take_all_ranks(adapter: Adapter) -> None:
    assert isinstance(adapter, Adalora)
    adapter.values.data.zero_()
    adapter.alive.zero_()


def test_an_adalora_site_without_ranks_is_left_out(parts: dict, tmp_path: Path) -> None:
    adapters = adapters_for(parts, "adalora", init_rank=4)
    empty = [site for site in adapters if "attn2" in site]
    for site in empty:
        _take_all_ranks(adapters[site])
    path = write_adapter(tmp_path / "a.safetensors", adapters, parts=parts, family="sd1")
    assert set(read_adapter(path).match(parts)[0]) == set(adapters) - set(empty)
    for adapter in adapters.values():
        _take_all_ranks(adapter)
    with pytest.raises(UserError, match="nothing to write"):
        write_adapter(path, adapters, parts=parts, family="sd1")


# --- failures ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("value", "precision", "word"), [(1e6, "fp16", "bf16"), (math.nan, "fp32", "diverged")])
def test_values_that_a_file_cannot_hold_are_refused_by_layer(
    value: float, precision: str, word: str, parts: dict, tmp_path: Path
) -> None:
    adapters = adapters_for(parts, "lora", rank=2)
    site = next(site for site in adapters if "attn2" in site)
    adapters[site].up.data[0, 0] = value  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match=word) as caught:
        write_adapter(tmp_path / "a.safetensors", adapters, parts=parts, family="sd1", precision=precision)
    assert site in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_whole(parts: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapters_for(parts, "lora", rank=2)
    path = write_adapter(tmp_path / "a.safetensors", adapters, parts=parts, family="sd1")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_adapter(path, adapters, parts=parts, family="sd1", precision="fp32")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(parts: dict, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_adapter(tmp_path / "file" / "a.safetensors", adapters_for(parts, "lora"), parts=parts, family="sd1")


# --- the header -------------------------------------------------------------------------------------------------------
def test_the_header_tells_a1111_and_the_managers_what_they_ask_for(parts: dict, tmp_path: Path) -> None:
    header = build_header(FACTS)
    path = write_adapter(
        tmp_path / "a.safetensors", adapters_for(parts, "lokr"), parts=parts, family="sdxl", metadata=header
    )
    told = header_of(path)
    assert all(isinstance(value, str) for value in told.values())
    assert header.items() <= told.items()
    assert told["ss_base_model_version"].startswith("sdxl_")
    assert told["ss_v2"] == "False"
    assert not told["ss_output_name"].startswith("{")
    assert told["ss_network_module"] == "lycoris.kohya"
    assert json.loads(told["ss_network_args"]) == {"algo": "lokr", "factor": "8"}
    assert (told["ss_network_dim"], told["ss_network_alpha"], told["ss_clip_skip"]) == ("8", "4", "2")
    assert json.loads(told["ss_dataset_dirs"]) == {"10_sks toy": {"n_repeats": 10, "img_count": 6}}
    assert json.loads(told["ss_tag_frequency"]) == {"10_sks toy": dict(FACTS.sets[0].tags)}
    assert json.loads(told["ss_bucket_info"])["buckets"]["0"] == {"resolution": [64, 128], "count": 4}
    assert float(told["ss_training_started_at"]) == 1_700_000_000.0
    assert told["ss_resolution"] == "(1024, 768)"
    assert told["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert told["modelspec.resolution"] == "1024x768"
    assert told["modelspec.trigger_phrase"] == "sks toy"
    assert told["modelspec.date"] == "2023-11-14T22:23:20"
    assert told["reparam_config"] == FACTS.config_toml
    file = read_adapter(path)
    assert (file.base, file.trigger, file.metadata["reparam_method"]) == ("sdxl", "sks toy", "lokr")


def test_the_header_tells_every_set_once() -> None:
    sets = (
        SetFacts("sks", "toy", 6, 10, {"a": 6}),
        SetFacts("zwx", "dog", 4, 1),
        SetFacts("", "toy", 20, 1),
        SetFacts("sks", "toy", 2, 10),
    )
    header = build_header(TrainingFacts(name="a", method="lora", family="sd1", sets=sets))
    assert json.loads(header["ss_dataset_dirs"]) == {
        "10_sks toy": {"n_repeats": 10, "img_count": 6},
        "1_zwx dog": {"n_repeats": 1, "img_count": 4},
        "1_toy": {"n_repeats": 1, "img_count": 20},
        "10_sks toy 2": {"n_repeats": 10, "img_count": 2},
    }
    assert json.loads(header["ss_tag_frequency"])["10_sks toy"] == {"a": 6}
    assert header["ss_num_train_images"] == "104"
    assert header["ss_trigger_words"] == "sks, zwx"
    assert header["modelspec.trigger_phrase"] == "sks toy, zwx dog"


@pytest.mark.parametrize(
    ("family", "is_v", "version", "v2"),
    [("sd1", False, "sd_v1", "False"), ("sd2", False, "sd_v2", "True"), ("sd2", True, "sd_v2_v", "True")],
)
def test_the_base_models_family_is_where_a1111_looks(family: str, is_v: bool, version: str, v2: str) -> None:
    header = build_header(TrainingFacts(name="a", method="lora", family=family, is_v_prediction=is_v))
    assert (header["ss_base_model_version"], header["ss_v2"]) == (version, v2)
    assert header["ss_network_module"] == "networks.lora"
    assert header["modelspec.prediction_type"] == ("v" if is_v else "epsilon")


def test_hashes_are_those_of_the_bytes_whatever_the_header(parts: dict, tmp_path: Path) -> None:
    adapters = adapters_for(parts, "lora", rank=4)
    for number, metadata in enumerate((None, build_header(FACTS))):
        path = write_adapter(
            tmp_path / f"{number}.safetensors", adapters, parts=parts, family="sd1", precision="fp32", metadata=metadata
        )
        content = path.read_bytes()
        data = content[8 + int.from_bytes(content[:8], "little") :]
        assert header_of(path)["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
        assert header_of(path)["sshs_legacy_hash"] == "e3b0c442"  # less than 1 MiB: the hash of nothing


def test_the_legacy_hash_covers_64_kib_after_the_first_mebibyte(tmp_path: Path) -> None:
    """The legacy hash of a file over 1 MiB, by kohya's rule: bytes 1 MiB to 1 MiB + 64 KiB of the ss_-only file."""
    tensors: dict[str, Tensor] = {
        "x.lora_up.weight": torch.randn(600, 600, generator=torch.Generator().manual_seed(0)),
        "x.alpha": torch.tensor(2.0),
        "a.lora_up.weight": torch.ones(3, 5).half(),
    }
    with TensorFile(tmp_path / "ours.safetensors") as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
        file.finish({"ss_a": "ü", "modelspec.title": "left out"})
    save_file(tensors, tmp_path / "a.safetensors", {"ss_a": "ü"})
    content = (tmp_path / "a.safetensors").read_bytes()
    told = header_of(tmp_path / "ours.safetensors")
    assert told["sshs_legacy_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert told["sshs_model_hash"] == hashlib.sha256(data).hexdigest() == data_hash(tmp_path / "ours.safetensors")
    back = load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "ours.safetensors"]


def test_a_file_that_is_not_finished_leaves_nothing(parts: dict, tmp_path: Path) -> None:
    adapters = adapters_for(parts, "lora", rank=2)
    with AdapterWriter(tmp_path / "a.safetensors", parts=parts, family="sd1", precision="fp16") as writer:
        for site, adapter in adapters.items():
            writer.add(site, adapter)
    assert list(tmp_path.iterdir()) == []
