"""Randomness is a function of what it is for: masks do not depend on when, where or how often they are drawn."""

from __future__ import annotations

import pytest
import torch
from drawn import Layer, adapter_for
from torch import nn
from torch.utils.checkpoint import checkpoint

from reparam_diffusion.adapters.lora import LoraSpec
from reparam_diffusion.inject import attach
from reparam_diffusion.maths.chance import Draw, generator, seed_of

LAYERS = (Layer("linear", 12, 8, True), Layer("conv", 4, 6, True, lead=(5, 6), kernel=(3, 3), stride=2))
KINDS = ("dropout", "rank_dropout", "module_dropout")


def draw(step: int = 3, indices: tuple[int, ...] = (0, 1), seed: int = 7) -> Draw:
    return Draw(seed, step, list(indices))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.kind)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_draw_drops_the_same(layer: Layer, kind: str) -> None:
    module, x = nn.Sequential(layer.build()), layer.input()
    adapter = adapter_for(layer, LoraSpec(rank=4, **{kind: 0.5}))
    with attach({"m": module}, {"m.0": adapter}) as injection:
        plain = module(x)
        outputs = {}
        for name, each in {"a": draw(), "again": draw(), "step": draw(step=4), "seed": draw(seed=8)}.items():
            injection.set_draw(each)
            outputs[name] = module(x)
        adapter.site = "m.other"
        injection.set_draw(draw())
        outputs["site"] = module(x)
        injection.set_draw(None)
        torch.testing.assert_close(module(x), plain)
    assert torch.equal(outputs["a"], outputs["again"])
    others = [outputs[name] for name in ("step", "seed", "site")]
    assert any(not torch.equal(outputs["a"], other) for other in others)
    assert not torch.equal(outputs["a"], plain)


def test_a_picture_drops_the_same_in_any_batch() -> None:
    layer = LAYERS[0]
    module, x = nn.Sequential(layer.build()), layer.input()
    adapter = adapter_for(layer, LoraSpec(rank=4, dropout=0.3, rank_dropout=0.3, module_dropout=0.3))
    with attach({"m": module}, {"m.0": adapter}) as injection:
        injection.set_draw(draw(indices=(4, 5)))
        both = module(x)
        injection.set_draw(draw(indices=(5,)))
        torch.testing.assert_close(module(x[1:]), both[1:])


def test_masks_keep_the_mean() -> None:
    mask = draw(indices=tuple(range(64))).keep_mask("m", "dropout", (64,), drop=0.3)
    assert mask.mean().item() == pytest.approx(1.0, abs=0.03)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.kind)
def test_gradient_checkpointing_draws_the_same_mask(layer: Layer) -> None:
    module, x = nn.Sequential(layer.build()), layer.input()
    adapter = adapter_for(layer, LoraSpec(rank=4, dropout=0.3, rank_dropout=0.3))
    with attach({"m": module}, {"m.0": adapter}) as injection:
        injection.set_draw(draw())
        found = []
        for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
            loss = run(x).square().sum()
            found.append(torch.autograd.grad(loss, [x, *adapter.parameters()]))
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_seeds_differ_by_every_name() -> None:
    names = [(0, 1, "a"), (0, 1, "b"), (0, 2, "a"), (1, 0, "a"), (0, "1", "a"), (0, 1)]
    assert len({seed_of(*each) for each in names}) == len(names)
    assert torch.equal(torch.rand(4, generator=generator(5, "x")), torch.rand(4, generator=generator(5, "x")))
