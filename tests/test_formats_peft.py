"""PEFT 0.21.2 folders read by us, and ours read by PEFT: the same output."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from formats_oracles import CONVOLUTIONS, WIDE, adapters_for, peft_folder, peft_reads
from formats_tiny import assert_equal, output, parts_like, with_adapters

from reparam_diffusion.adapters.foreign import read_peft_boft
from reparam_diffusion.adapters.oft import Oft
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.peft import write_peft
from reparam_diffusion.formats.read import read_adapter

pytestmark = [  # what PEFT says of settings that are meant
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .default.. .*LoRA tensor.s. have invalid shape"),  # a bias is 1-D
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unmerge result:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

LORA = {"r": 3, "lora_alpha": 5}
PATTERNS = {"rank_pattern": {"to_q": 5, r"fc\d": 2}, "alpha_pattern": {"attn2.to_k": 1, "fc1": 9}}
LOKR = {"r": 1, "alpha": 3, "rank_pattern": {"to_k": 2}}
OFT = {"r": 0, "oft_block_size": 4}
BOTH = WIDE + CONVOLUTIONS
WRITTEN = {
    "lora": (peft.LoraConfig, LORA, BOTH),
    "lora with rank-stabilised scale": (peft.LoraConfig, LORA | {"use_rslora": True}, BOTH),
    "lora with patterns": (peft.LoraConfig, LORA | PATTERNS, BOTH),
    "lora with patterns and rslora": (peft.LoraConfig, LORA | PATTERNS | {"use_rslora": True}, BOTH),
    "lora with bias": (peft.LoraConfig, LORA | {"lora_bias": True}, WIDE),
    "dora": (peft.LoraConfig, LORA | {"use_dora": True}, BOTH),
    "loha": (peft.LoHaConfig, {"r": 3, "alpha": 5, "alpha_pattern": {"to_q": 2}}, BOTH),
    "loha tucker": (peft.LoHaConfig, {"r": 3, "alpha": 5, "use_effective_conv2d": True}, BOTH),
    "lokr": (peft.LoKrConfig, LOKR, BOTH),
    "lokr both": (peft.LoKrConfig, LOKR | {"decompose_both": True}, BOTH),
    "lokr tucker": (peft.LoKrConfig, LOKR | {"use_effective_conv2d": True}, BOTH),
    "lokr whole": (peft.LoKrConfig, {"r": 32, "alpha": 60}, BOTH),
    "lokr factor": (peft.LoKrConfig, LOKR | {"decompose_factor": 4}, BOTH),
    "oft exact": (peft.OFTConfig, OFT | {"use_cayley_neumann": False}, WIDE),
    "oft neumann": (peft.OFTConfig, OFT, WIDE),
    "oft neumann of 2": (peft.OFTConfig, OFT | {"num_cayley_neumann_terms": 2}, WIDE),
    "oft neumann of 3": (peft.OFTConfig, OFT | {"num_cayley_neumann_terms": 3}, WIDE),
    "oft neumann of 7": (peft.OFTConfig, OFT | {"num_cayley_neumann_terms": 7}, WIDE),
    "coft exact": (peft.OFTConfig, OFT | {"coft": True, "eps": 0.6, "use_cayley_neumann": False}, WIDE),
    "coft neumann": (peft.OFTConfig, OFT | {"coft": True, "eps": 0.6}, WIDE),
    "oft shared": (peft.OFTConfig, OFT | {"block_share": True}, WIDE),
    "oft shared exact": (peft.OFTConfig, OFT | {"block_share": True, "use_cayley_neumann": False}, WIDE),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4}, BOTH),
    "ia3": (peft.IA3Config, {"feedforward_modules": ["to_k", "fc1", "ff.net.2", "conv2"]}, BOTH),
    "adalora": (
        peft.AdaLoraConfig,
        {"init_r": 4, "target_r": 2, "lora_alpha": 7, "total_step": 9, "tinit": 1, "tfinal": 1},
        WIDE,
    ),
}
OURS = {
    "lora": ("lora", {"rank": 3, "alpha": 5.0}, True),
    "lora of many ranks": ("lora", {"rank": 9, "alpha": 5.0, "conv_rank": 4, "conv_alpha": 2.0}, True),
    "dora": ("lora", {"rank": 3, "alpha": 5.0, "weight_decompose": True}, True),
    "loha": ("loha", {"rank": 3, "alpha": 5.0}, True),
    "lokr": ("lokr", {"factor": 4}, False),
    "lokr low": ("lokr", {"factor": 4, "low_rank": True, "rank": 1, "alpha": 2.0}, False),
    "lokr both low": ("lokr", {"factor": -1, "low_rank": True, "rank": 1, "alpha": 2.0, "decompose_both": True}, True),
    "adalora": ("adalora", {"init_rank": 4, "alpha": 7.0}, True),
    "oft on inputs": ("oft", {"block_size": 4, "side": "input"}, False),
}
SDXL = ("lora with patterns", "dora", "lokr both", "oft neumann", "adalora", "oft on inputs")
"""The forms tried on SDXL too: names and parts are what differs there, not the maths."""


def cases(forms: dict) -> list:
    """(form, family): every form on SD1, some on SDXL."""
    return [(form, "sd1") for form in forms] + [
        pytest.param(form, "sdxl", marks=pytest.mark.slow) for form in forms if form in SDXL
    ]


def _config(form: str):
    kind, settings, _ = WRITTEN[form]

    def make(targets: list[str]):
        ours = dict(settings)
        if "feedforward_modules" in ours:  # PEFT wants them among the targets
            ours["feedforward_modules"] = [name for name in ours["feedforward_modules"] if name in targets]
        return kind(target_modules=targets, **ours)

    return make


@pytest.mark.parametrize(("form", "family"), cases(WRITTEN))
def test_what_peft_writes_gives_the_same_output_here(form: str, family: str, tmp_path: Path) -> None:
    base = output(parts_like(family))
    std = 0.15 if form.startswith("lora") else 0.3
    theirs = peft_folder(parts_like(family), tmp_path, _config(form), WRITTEN[form][2], std=std)
    parts = parts_like(family)
    file = read_adapter(tmp_path)
    adapters, unmatched = file.match(parts)
    assert unmatched == []
    assert len(adapters) == len(file.sites) > 0
    assert_equal(with_adapters(parts, adapters), theirs, base)


def test_a_convolution_of_pefts_oft_is_read_by_its_merged_weight(tmp_path: Path) -> None:
    base = output(parts_like("sd1"))
    theirs = peft_folder(parts_like("sd1"), tmp_path, _config("oft exact"), BOTH, merged=True)
    parts = parts_like("sd1")
    assert_equal(with_adapters(parts, read_adapter(tmp_path).match(parts)[0]), theirs, base)


@pytest.mark.parametrize(("form", "family"), cases(OURS))
def test_what_we_write_gives_the_same_output_in_peft(form: str, family: str, tmp_path: Path) -> None:
    parts = parts_like(family)
    base = output(parts)
    method, spec, convolutions = OURS[form]
    adapters = adapters_for(parts, method, convolutions=convolutions, **spec)
    ours = with_adapters(parts, adapters)
    write_peft(tmp_path, adapters, parts=parts)
    back, unmatched = read_adapter(tmp_path).match(parts)
    assert unmatched == []
    assert_equal(with_adapters(parts, back), ours, base)
    assert_equal(peft_reads(parts, tmp_path), ours, base)


def test_a_pruned_adalora_keeps_its_initial_rank_in_the_scale(tmp_path: Path) -> None:
    base = output(parts_like("sd1"))
    config = lambda targets: peft.AdaLoraConfig(  # noqa: E731
        init_r=4, target_r=2, lora_alpha=7, total_step=9, tinit=1, tfinal=1, target_modules=targets
    )
    parts = parts_like("sd1")
    models = {"unet": peft.get_peft_model(parts["unet"], config(WIDE)).eval()}
    chance = torch.Generator().manual_seed(5)
    pattern = {}
    for name, parameter in models["unet"].named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=chance) * (1 if "lora_E" in name else 0.3))
        if "lora_E" in name:
            kept = torch.rand(4, generator=chance) > 0.4
            kept[0] = True
            parameter.data[~kept] = 0
            pattern[name.removeprefix("base_model.model.")] = kept.tolist()
    models["unet"].peft_config["default"].rank_pattern = pattern
    theirs = output({"unet": models["unet"].base_model.model, "te1": parts["te1"]})
    models["unet"].save_pretrained(tmp_path / "unet")
    saved = json.loads((tmp_path / "unet" / "adapter_config.json").read_text())
    assert saved["rank_pattern"]
    parts = parts_like("sd1")
    file = read_adapter(tmp_path)
    assert file.method == "adalora"
    assert 1 <= min(file.ranks.values()) < max(file.ranks.values()) <= 4
    assert_equal(with_adapters(parts, file.match(parts)[0]), theirs, base)


def test_an_exact_linear_oft_becomes_our_own_method(tmp_path: Path) -> None:
    peft_folder(parts_like("sd1"), tmp_path, _config("oft exact"), WIDE)
    adapters, _ = read_adapter(tmp_path / "unet").match(parts_like("sd1"))
    assert {type(adapter) for adapter in adapters.values()} == {Oft}


def test_stages_of_pefts_boft_follow_its_own_permutations() -> None:
    """Its CPU build has one stage only, so its permutation is asked for, and the product formed by hand."""
    from peft.tuners.boft.layer import BOFTLayer

    chance = torch.Generator().manual_seed(0)
    inputs, num, size, stages = 24, 6, 4, 2
    blocks = 0.4 * torch.randn(stages, num, size, size, generator=chance)
    scale = 1 + 0.3 * torch.randn(10, 1, generator=chance)
    weight = torch.randn(10, inputs, generator=chance)
    total = torch.eye(inputs)
    for stage in range(stages):
        order = BOFTLayer.block_butterfly_perm(None, inputs, num // 2**stage, size // 2, stages - 1)
        permutation = BOFTLayer.perm2mat(None, order)
        turned = torch.block_diag(*BOFTLayer.cayley_batch(None, blocks[stage]))
        total = permutation @ turned @ permutation.T @ total
    expected = scale * (weight @ total.T) - weight
    found = read_peft_boft({"boft_R": blocks, "boft_s": scale}, (10, inputs)).delta(weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "spec", "convolutions", "word"),
    [
        ("oft", {"block_size": 4}, False, "rotates outputs"),
        ("oft", {"block_size": 4, "side": "input"}, True, "3x3"),
        ("lokr", {"factor": 4, "unbalanced": True}, False, "one factor"),
    ],
)
def test_what_peft_cannot_express_is_refused_before_anything_is_written(
    method: str, spec: dict, convolutions: bool, word: str, tmp_path: Path
) -> None:
    parts = parts_like("sd1")
    with pytest.raises(UserError, match=word):
        write_peft(tmp_path / "out", adapters_for(parts, method, convolutions=convolutions, **spec), parts=parts)
    assert not (tmp_path / "out").exists()


def test_mixed_methods_and_input_side_dora_are_refused(tmp_path: Path) -> None:
    parts = parts_like("sd1")
    mixed = adapters_for(parts, "lora", rank=2)
    mixed |= {site: adapter for site, adapter in adapters_for(parts, "loha", rank=2).items() if "mid_block" in site}
    with pytest.raises(UserError, match="one method"):
        write_peft(tmp_path, mixed, parts=parts)
    sideways = adapters_for(parts, "lora", rank=2)
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    sideways[site].decompose(parts["unet"].get_submodule(site.removeprefix("unet.")).weight, axis="input")
    with pytest.raises(UserError, match="along its inputs"):
        write_peft(tmp_path, sideways, parts=parts)


def test_an_export_does_not_mix_with_an_older_one(tmp_path: Path) -> None:
    parts = parts_like("sd1")
    adapters = adapters_for(parts, "lora", rank=2)
    write_peft(tmp_path, adapters, parts=parts)
    write_peft(tmp_path, adapters, parts=parts)
    with pytest.raises(UserError, match="another adapter"):
        write_peft(tmp_path, {site: a for site, a in adapters.items() if site.startswith("unet.")}, parts=parts)


def test_a_peft_kind_that_we_do_not_know_is_named(tmp_path: Path) -> None:
    config = lambda targets: peft.VeraConfig(r=4, target_modules=["to_q"])  # noqa: E731
    model = peft.get_peft_model(parts_like("sd1")["unet"], config([]))
    model.save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="VERA"):
        read_adapter(tmp_path)
