"""One law for everything: a forward with adapters is the host's own operation with W + Σ s·Δ(W)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from drawn import STRENGTHS, Layer, adapter_for, layers, specs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reparam_diffusion.adapters import METHODS, Adapter, Host, Plan
from reparam_diffusion.inject import attach, merged

PATHS = {"chosen": None, "fast": lambda host, rows: True, "dense": lambda host, rows: False}


def expected(module: nn.Module, x: Tensor, weighted: Sequence[tuple[Adapter, float]]) -> Tensor:
    """The definition, term by term."""
    host = Host(module)
    weight, bias = host.weight, host.bias
    for adapter, strength in weighted:
        weight = weight + strength * adapter.delta(host.weight)
        added = adapter.delta_bias(host.bias)
        bias = bias if added is None else bias + strength * added
    return host.apply(x, weight, bias)


def gradients(y: Tensor, x: Tensor, adapters: Sequence[Adapter]) -> list[Tensor]:
    """Of a random mixture of the outputs, for the input and for every parameter."""
    mixture = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    wanted = [x, *(p for adapter in adapters for p in adapter.parameters() if p.numel())]
    found = torch.autograd.grad((y * mixture).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def assert_law(module: nn.Module, x: Tensor, weighted: Sequence[tuple[Adapter, float]]) -> None:
    adapters = [adapter for adapter, _ in weighted]
    reference = expected(module, x, weighted)
    injections = [attach({"m": nn.Sequential(module)}, {"m.0": a}, strength=s) for a, s in weighted]
    found = module(x)
    assert found.shape == reference.shape
    torch.testing.assert_close(found, reference, rtol=1e-8, atol=1e-8)
    wanted = gradients(reference, x, adapters)
    for name, (here, there) in enumerate(zip(gradients(found, x, adapters), wanted, strict=True)):
        torch.testing.assert_close(here, there, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"gradient {n}: {m}")
    for injection in injections:
        injection.remove()


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_every_path_of_a_method_is_the_hosts_operation_with_its_delta(method: str, data: st.DataObject) -> None:
    layer, spec = data.draw(layers()), data.draw(specs(method))
    path = data.draw(st.sampled_from(tuple(PATHS)))
    adapter = adapter_for(layer, spec)
    if PATHS[path] is not None:
        adapter.is_cheap = PATHS[path]
    assert_law(layer.build(), layer.input(), [(adapter, data.draw(st.sampled_from(STRENGTHS)))])


@given(data=st.data(), layer=layers())
def test_adapters_of_different_methods_on_one_module_add_up(data: st.DataObject, layer: Layer) -> None:
    methods = data.draw(st.lists(st.sampled_from(tuple(METHODS)), min_size=2, max_size=3))
    weighted = [
        (adapter_for(layer, data.draw(specs(method))), data.draw(st.sampled_from(STRENGTHS))) for method in methods
    ]
    assert_law(layer.build(), layer.input(), weighted)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_half_precision_hosts_get_full_precision_gradients(method: str, data: st.DataObject) -> None:
    layer, spec = data.draw(layers()), data.draw(specs(method))
    module, x = layer.build(torch.bfloat16), layer.input(torch.bfloat16)
    adapter = adapter_for(layer, spec, dtype=torch.float32)
    with attach({"m": nn.Sequential(module)}, {"m.0": adapter}):
        y = module(x)
    assert y.dtype == torch.bfloat16
    wide = module.float()
    reference = expected(wide, x.float(), [(adapter, 1.0)])
    scale = reference.abs().max() + 1
    assert (y.float() - reference).abs().max() / scale < 0.04
    y.sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is None or parameter.grad.dtype == torch.float32, name


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_a_fresh_adapter_changes_nothing(method: str, data: st.DataObject) -> None:
    layer, spec = data.draw(layers()), data.draw(specs(method))
    module, x = layer.build(), layer.input()
    fresh = adapter_for(layer, spec, random=False)
    before = module(x)
    with attach({"m": nn.Sequential(module)}, {"m.0": fresh}):
        torch.testing.assert_close(module(x), before, rtol=1e-6, atol=1e-6)
    assert fresh.delta(module.weight).abs().max() < 1e-6


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_merged_is_attached_and_leaves_the_weights_bit_for_bit(method: str, data: st.DataObject) -> None:
    layer, spec = data.draw(layers()), data.draw(specs(method))
    module, x = layer.build(), layer.input()
    adapter, strength = adapter_for(layer, spec), data.draw(st.sampled_from(STRENGTHS))
    parts = {"m": nn.Sequential(module)}
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with attach(parts, {"m.0": adapter}, strength=strength):
        attached = module(x)
    with merged(parts, [({"m.0": adapter}, lambda site: strength)]):
        torch.testing.assert_close(module(x), attached, rtol=1e-8, atol=1e-8)
    with pytest.raises(ZeroDivisionError), merged(parts, [({"m.0": adapter}, lambda site: 1.0)]):
        raise ZeroDivisionError
    assert all(torch.equal(tensor, kept[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_norm_layers_take_a_dense_delta_and_a_bias(kind: str) -> None:
    class Shift(Adapter):
        def __init__(self, size: int) -> None:
            super().__init__((size,), Plan())
            self.change = nn.Parameter(torch.randn(size, dtype=torch.float64))

        def update(self, weight: Tensor) -> Tensor:
            return self.change

        def delta_bias(self, bias: Tensor | None) -> Tensor | None:
            return 2 * self.change

    module: nn.Module = nn.LayerNorm(6) if kind == "layer" else nn.GroupNorm(2, 6)
    x = torch.randn((2, 3, 6) if kind == "layer" else (2, 6, 3, 4), dtype=torch.float64, requires_grad=True)
    assert_law(module.double(), x, [(Shift(6), 0.5), (Shift(6), -2.0)])
    parts, adapter = {"m": nn.Sequential(module)}, Shift(6)
    reference = expected(module, x, [(adapter, 0.5)])
    with merged(parts, [({"m.0": adapter}, lambda site: 0.5)]):
        torch.testing.assert_close(module(x), reference)


@pytest.mark.parametrize("method", METHODS)
def test_a_copied_model_has_adapters_of_its_own(method: str) -> None:
    layer = Layer("linear", 8, 12, True)
    module = nn.Sequential(layer.build())
    adapter = adapter_for(layer, METHODS[method].spec())
    with attach({"m": module}, {"m.0": adapter}):
        twin = copy.deepcopy(module)
        before = module(layer.input())
        for parameter in adapter.parameters():
            parameter.data.zero_()
        torch.testing.assert_close(twin(layer.input()), before)
    torch.testing.assert_close(twin(layer.input()), before)
