"""Which layers carry adapters: sets, globs and rules, on the bundled model and on Stable Diffusion's real topology."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reparam_diffusion.adapters.loha import LohaSpec
from reparam_diffusion.adapters.lokr import LokrSpec
from reparam_diffusion.adapters.lora import LoraSpec
from reparam_diffusion.errors import UserError
from reparam_diffusion.targets import build_adapters, can_carry, count_parameters, file_bytes, plan_sites, sites_of


@pytest.fixture(scope="module")
def sd15() -> nn.Module:
    """Stable Diffusion 1.5's UNet without memory: diffusers' defaults are its shape but for the cross-attention."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


def test_the_sets_of_stable_diffusion_1_have_the_known_sizes(sd15: nn.Module) -> None:
    everything = [path for path, module in sd15.named_modules() if can_carry(module)]
    assert len(everything) == 282
    assert len(sites_of("unet", sd15, "all")) == 282
    assert len(sites_of("unet", sd15, "attention")) == 128  # 16 transformers x 2 attentions x 4 projections
    assert len(sites_of("unet", sd15, "attention+mlp")) == 192  # + 2 feed-forward and 2 proj each, as kohya does
    assert sites_of("unet", sd15, "none") == []


def test_the_sets_are_nested_and_stay_inside_the_transformers(starter_unet: nn.Module) -> None:
    attention, mlp, everything = (
        sites_of("unet", starter_unet, name) for name in ("attention", "attention+mlp", "all")
    )
    assert set(attention) < set(mlp) < set(everything)
    assert all(site.endswith(("to_q", "to_k", "to_v", "to_out.0")) for site in attention)
    assert all(".attentions." in site for site in mlp)
    assert any(site.endswith("proj_in") for site in mlp)
    assert "unet.conv_in" in everything
    assert "unet.time_embedding.linear_1" in everything


def test_the_text_encoders_sets(starter_text_encoder: nn.Module) -> None:
    count = starter_text_encoder.config.num_hidden_layers
    attention = sites_of("te1", starter_text_encoder, "attention")
    assert len(attention) == 4 * count
    assert len(sites_of("te1", starter_text_encoder, "attention+mlp")) == 6 * count
    assert {site.rsplit(".", 1)[1] for site in attention} == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_layers_after_the_one_used_are_left_out(starter_text_encoder: nn.Module) -> None:
    first = sites_of("te1", starter_text_encoder, "attention+mlp", last_layer=0)
    assert len(first) == 6
    assert all("layers.0." in site for site in first)


def test_a_projection_after_the_text_encoder_is_never_trained() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.text_projection = nn.Linear(2, 2), nn.Linear(2, 2)

    assert sites_of("te2", Encoder(), "attention+mlp") == ["te2.q_proj"]


def test_globs_name_sites(starter_unet: nn.Module) -> None:
    cross = sites_of("unet", starter_unet, "unet.*.attn2.*")
    assert cross
    assert all(".attn2." in site for site in cross)
    both = sites_of("unet", starter_unet, ["unet.*.attn2.*", "unet.conv_in"])
    assert set(both) == {*cross, "unet.conv_in"}


@pytest.mark.parametrize(
    ("asked", "nearest"), [("atention", "attention"), ("unet.conv_inn", "unet.conv_in"), ([], None)]
)
def test_a_target_that_matches_nothing_names_the_nearest(starter_unet: nn.Module, asked, nearest: str | None) -> None:
    with pytest.raises(UserError) as caught:
        plan_sites({"unet": starter_unet}, {"unet": asked}, LoraSpec())
    assert caught.value.place.startswith("targets")
    assert nearest is None or f'"{nearest}"' in str(caught.value)


def test_one_glob_of_several_that_matches_nothing_is_an_error(starter_unet: nn.Module) -> None:
    with pytest.raises(UserError, match=r"unet\.nowhere"):
        plan_sites({"unet": starter_unet}, {"unet": ["unet.conv_in", "unet.nowhere"]}, LoraSpec())


def test_the_first_rule_that_matches_wins(starter_unet: nn.Module) -> None:
    rules = [("unet.*.attn2.*", LokrSpec(factor=4)), ("unet.*attn*", LohaSpec(rank=2))]
    plans = plan_sites({"unet": starter_unet}, {"unet": "attention+mlp"}, LoraSpec(rank=3), rules)
    for planned in plans:
        wanted = "lokr" if ".attn2." in planned.site else "loha" if "attn" in planned.site else "lora"
        assert planned.method == wanted, planned.site
    assert {planned.method for planned in plans} == {"lokr", "loha", "lora"}


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ([("te1.*", LoraSpec())], "targets name"),
        ([("unet.*", LoraSpec()), ("unet.*.attn2.*", LohaSpec())], "Earlier rules"),
    ],
)
def test_a_rule_without_a_layer_is_an_error(starter_unet: nn.Module, rules, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        plan_sites({"unet": starter_unet}, {"unet": "attention"}, LoraSpec(), rules)
    assert caught.value.place == f"targets.rules.{len(rules) - 1}.match"


def test_no_part_trained_is_an_error(starter_unet: nn.Module) -> None:
    with pytest.raises(UserError, match="No layer"):
        plan_sites({"unet": starter_unet}, {"unet": "none"}, LoraSpec())


def test_sites_draw_apart_and_the_same_seed_draws_the_same(starter_unet: nn.Module) -> None:
    parts = {"unet": starter_unet}
    few = plan_sites(parts, {"unet": "unet.*.attn2.to_q"}, LoraSpec(rank=4))
    many = plan_sites(parts, {"unet": "attention"}, LoraSpec(rank=4))
    alone, among, other = build_adapters(parts, few, seed=1), build_adapters(parts, many, seed=1), None
    other = build_adapters(parts, few, seed=2)
    for site, adapter in alone.items():
        assert torch.equal(adapter.down, among[site].down)
        assert not torch.equal(adapter.down, other[site].down)


def test_parameters_are_counted_without_building(sd15: nn.Module, starter_unet: nn.Module) -> None:
    plans = plan_sites({"unet": sd15}, {"unet": "attention"}, LoraSpec(rank=16))
    assert count_parameters(plans) == sum(16 * (p.shape[0] + p.shape[1]) for p in plans) == 3_188_736
    for spec in (LoraSpec(rank=4, weight_decompose=True), LokrSpec(), LohaSpec()):
        plans = plan_sites({"unet": starter_unet}, {"unet": "all"}, spec)
        adapters = build_adapters({"unet": starter_unet}, plans, seed=0)
        assert count_parameters(plans) == sum(p.numel() for a in adapters.values() for p in a.parameters())
        assert file_bytes(plans) > 2 * count_parameters(plans)
