"""What each method promises: files and state come back, and the algebra that gives it its name."""

from __future__ import annotations

import pytest
import torch
from drawn import Layer, adapter_for, layers, specs
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from reparam_diffusion.adapters import METHODS, Adapter
from reparam_diffusion.adapters.adalora import AdaloraSpec
from reparam_diffusion.adapters.loha import LohaSpec
from reparam_diffusion.adapters.lokr import LokrSpec
from reparam_diffusion.adapters.lora import LoraSpec
from reparam_diffusion.adapters.oft import Oft, OftSpec

SQUARE = Layer("linear", 24, 24, True)


def of_file(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Adapter:
    """The adapter that exactly one method recognises in a file's leaves."""
    found = [method for method in METHODS.values() if method.recognises(frozenset(tensors))]
    assert len(found) == 1, (sorted(tensors), [method.name for method in found])
    return found[0].adapter.from_tensors(tensors, shape)


def delta(adapter: Adapter, layer: Layer) -> Tensor:
    return adapter.delta(layer.build().weight).detach()


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_a_file_gives_back_the_same_delta(method: str, data: st.DataObject) -> None:
    layer, spec = data.draw(layers()), data.draw(specs(method))
    adapter = adapter_for(layer, spec, dtype=torch.float32)
    tensors = adapter.tensors()
    assert all(t.dtype == torch.float32 and t.is_contiguous() and not t.requires_grad for t in tensors.values())
    back = of_file({name: t.clone() for name, t in tensors.items()}, adapter.shape)
    wanted = delta(adapter, layer)
    torch.testing.assert_close(delta(back, layer), wanted, rtol=2e-5, atol=2e-5 * (1 + wanted.abs().max().item()))


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_state_gives_back_every_number(method: str, data: st.DataObject) -> None:
    layer, spec = data.draw(layers()), data.draw(specs(method))
    adapter = adapter_for(layer, spec)
    state = adapter.state()
    kept = delta(adapter, layer)
    twin = adapter_for(layer, spec, random=False)
    twin.load_state(state)
    assert torch.equal(delta(twin, layer), kept)
    for parameter in adapter.parameters():
        parameter.data.zero_()
    assert torch.equal(delta(twin, layer), kept), "the state is a copy"
    assert twin.state().keys() == state.keys()


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_a_plan_that_settles_something_says_so(method: str, data: st.DataObject) -> None:
    layer, spec = data.draw(layers()), data.draw(specs(method))
    plan = METHODS[method].plan(spec, tuple(layer.build().weight.shape), layer.groups)
    asked = getattr(spec, "block_size", None) or getattr(spec, "init_rank", None)
    got = getattr(plan, "block_size", None) or getattr(plan, "rank", None)
    if asked and got and asked != got:
        assert str(got) in plan.note
        assert str(asked) in plan.note


@given(rank=st.integers(1, 64), out=st.sampled_from((3, 8)), entry=st.sampled_from((5, 8)))
def test_a_rank_above_the_layers_is_cut_and_its_scale_kept(rank: int, out: int, entry: int) -> None:
    plan = METHODS["lora"].plan(LoraSpec(rank=rank, alpha=3.0), (out, entry), 1)
    assert plan.rank == min(rank, out, entry)
    assert plan.alpha / plan.rank == pytest.approx(3.0 / rank)
    assert bool(plan.note) == (plan.rank < rank)


@given(layer=layers(), rank=st.integers(1, 4), axis=st.sampled_from(("output", "input")), s=st.sampled_from((1.0, 0.3)))
def test_dora_is_the_direction_times_the_magnitude(layer: Layer, rank: int, axis: str, s: float) -> None:
    adapter = adapter_for(layer, LoraSpec(rank=rank, alpha=2.0, weight_decompose=True))
    weight = layer.build().weight
    fresh = adapter_for(layer, LoraSpec(rank=rank), random=False)
    fresh.decompose(weight, axis)
    assert fresh.double().delta(weight).abs().max() < 1e-6, "DoRA begins at no change, on either axis"
    adapter.decompose(weight, axis)
    adapter.double()
    magnitude = adapter.magnitude.data.uniform_(0.5, 2.0)
    whole = weight + adapter.update(weight)
    axes = [a for a in range(weight.ndim) if a != (0 if axis == "output" else 1)]
    norm = whole.square().sum(axes, keepdim=True).sqrt()
    assume(norm.min() > 1e-3)
    dora = whole * magnitude / norm
    torch.testing.assert_close(weight + s * adapter.delta(weight), weight + s * (dora - weight), rtol=2e-4, atol=2e-4)


def test_a_loha_of_rank_r_exceeds_rank_2r() -> None:
    adapter = adapter_for(SQUARE, LohaSpec(rank=3))
    assert torch.linalg.matrix_rank(delta(adapter, SQUARE)) == 9


@given(spec=specs("lokr"), layer=layers())
def test_the_rank_of_a_kronecker_product_is_the_product_of_the_ranks(spec: LokrSpec, layer: Layer) -> None:
    assume(layer.kind == "linear")
    adapter = adapter_for(layer, spec)
    ranks = [int(torch.linalg.matrix_rank(f)) for f in (adapter.small_factor(), adapter.large_factor())]
    assert torch.linalg.matrix_rank(delta(adapter, layer)) == ranks[0] * ranks[1]


@given(layer=layers(), size=st.integers(2, 6), limit=st.sampled_from((0.0, 0.01)))
def test_a_rotation_is_orthogonal(layer: Layer, size: int, limit: float) -> None:
    for side in ("output", "input"):
        adapter = adapter_for(layer, OftSpec(block_size=size, side=side, constraint=limit))
        assert isinstance(adapter, Oft)
        rotation = adapter.turn() + torch.eye(adapter.plan.block_size, dtype=torch.float64)
        eye = torch.eye(adapter.plan.block_size, dtype=torch.float64).expand_as(rotation)
        torch.testing.assert_close(rotation.mT @ rotation, eye)


@given(layer=layers(), size=st.integers(2, 6))
def test_output_rotation_keeps_the_gram_of_each_blocks_rows(layer: Layer, size: int) -> None:
    """W_bᵀ W_b for the rows W_b of each block: what goes in is weighed as before."""
    adapter, weight = adapter_for(layer, OftSpec(block_size=size, side="output")), layer.build().weight
    turned = weight + adapter.delta(weight)
    for before, after in zip(
        weight.flatten(1).split(adapter.plan.block_size), turned.flatten(1).split(adapter.plan.block_size), strict=True
    ):
        torch.testing.assert_close(after.T @ after, before.T @ before)


@given(layer=layers(), size=st.integers(2, 6))
def test_input_rotation_keeps_the_angles_between_neurons(layer: Layer, size: int) -> None:
    """W Wᵀ within a group of a convolution: the cosines between the rows of W."""
    adapter, weight = adapter_for(layer, OftSpec(block_size=size, side="input")), layer.build().weight
    turned = weight + adapter.delta(weight)
    for before, after in zip(weight.flatten(1).chunk(layer.groups), turned.flatten(1).chunk(layer.groups), strict=True):
        torch.testing.assert_close(after @ after.T, before @ before.T)


@given(limit=st.sampled_from((0.001, 0.01, 0.1)), grow=st.sampled_from((0.01, 1.0, 30.0)))
def test_a_constraint_bounds_the_rotation(limit: float, grow: float) -> None:
    adapter = adapter_for(SQUARE, OftSpec(block_size=4, constraint=limit))
    free = adapter_for(SQUARE, OftSpec(block_size=4))
    adapter.triangle.data *= grow
    free.triangle.data *= grow
    assert adapter.skew().norm() <= limit * SQUARE.out * (1 + 1e-9)
    if free.skew().norm() <= limit * SQUARE.out:
        torch.testing.assert_close(adapter.skew(), free.skew())


def test_a_fresh_constrained_rotation_learns() -> None:
    adapter = adapter_for(SQUARE, OftSpec(block_size=4, constraint=0.1), random=False)
    adapter.delta(SQUARE.build().weight).sum().backward()
    assert adapter.triangle.grad.isfinite().all()
    assert adapter.triangle.grad.abs().max() > 0


@pytest.mark.parametrize("small", [1e-3, 1e-6])
def test_a_small_rotation_is_not_lost_in_rounding(small: float) -> None:
    """A turn of 1e-6 in fp32 keeps six digits, which R − I taken after R would not."""
    adapter = adapter_for(SQUARE, OftSpec(block_size=4), dtype=torch.float32)
    adapter.triangle.data *= small
    exact = adapter_for(SQUARE, OftSpec(block_size=4))
    exact.triangle.data = adapter.triangle.data.double()
    error = (adapter.turn().double() - exact.turn()).norm() / exact.turn().norm()
    assert error < 1e-6


def test_rank_stabilized_scale_is_alpha_over_root_rank() -> None:
    plan = METHODS["lora"].plan(LoraSpec(rank=4, alpha=6.0, rank_stabilized=True), (24, 24), 1)
    assert plan.alpha / plan.rank == pytest.approx(3.0)


def test_an_adalora_file_is_the_lora_of_its_live_ranks() -> None:
    adapter = adapter_for(SQUARE, AdaloraSpec(init_rank=5, alpha=2.0), dtype=torch.float32)
    adapter.values.data[[1, 3]] = 0.0
    tensors = adapter.tensors()
    assert tensors["lora_down.weight"].shape[0] == 3
    assert float(tensors["alpha"]) == 1.0
    torch.testing.assert_close(delta(of_file(tensors, adapter.shape), SQUARE), delta(adapter, SQUARE))
    adapter.values.data.zero_()
    adapter.alive.zero_()
    assert adapter.tensors() == {}, "a layer without a rank is left out of the file"


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_explained(method: str) -> None:
    fields = METHODS[method].spec.model_fields
    assert METHODS[method].spec().method == method
    assert METHODS[method].title
    assert METHODS[method].summary
    assert [name for name, field in fields.items() if name != "method" and not field.description] == []
