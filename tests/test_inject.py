"""Attaching, strengths, removing and merging leave the base model as it was."""

from __future__ import annotations

import shutil

import pytest
import torch
from drawn import Layer, adapter_for, fill
from torch import Tensor, nn

from reparam_diffusion.adapters import METHODS, Adapter
from reparam_diffusion.adapters.lora import LoraSpec
from reparam_diffusion.adapters.oft import OftSpec
from reparam_diffusion.inject import attach, merged
from reparam_diffusion.targets import build_adapters, plan_sites


def tiny() -> nn.Sequential:
    """conv -> linear, with room for two sites."""
    conv = Layer("conv", 4, 6, True, kernel=(3, 3), padding=1).build(torch.float32)
    return nn.Sequential(conv, nn.Flatten(2), Layer("linear", 20, 8, True).build(torch.float32))


def adapters_of(model: nn.Module, method: str, **settings) -> dict[str, Adapter]:
    sites = plan_sites({"m": model}, {"m": ["*"]}, METHODS[method].spec(**settings))
    adapters = build_adapters({"m": model}, sites, seed=1)
    for adapter in adapters.values():
        fill(adapter, torch.Generator().manual_seed(3))
    return adapters


PICTURE = torch.linspace(-1, 1, 160).reshape(2, 4, 4, 5)


@pytest.mark.parametrize("method", METHODS)
def test_removing_leaves_no_trace(method: str) -> None:
    model = tiny()
    before, keys = model(PICTURE), list(model.state_dict())
    attributes = [set(module.__dict__) for module in model.modules()]
    injection = attach({"m": model}, adapters_of(model, method))
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == keys
    assert not torch.equal(model(PICTURE), before)
    injection.remove()
    assert torch.equal(model(PICTURE), before)
    assert [set(module.__dict__) for module in model.modules()] == attributes
    injection.remove()  # twice does no harm


def test_a_second_attach_extends_the_hook_and_either_can_go_first() -> None:
    model = tiny()
    before = model(PICTURE)
    for first_out in (0, 1):
        one, two = attach({"m": model}, adapters_of(model, "lora")), attach({"m": model}, adapters_of(model, "lokr"))
        injections = [one, two]
        alone = {}
        for number in (0, 1):
            injections[1 - number].set_strength(0.0)
            alone[number] = model(PICTURE)
            injections[1 - number].set_strength(1.0)
        injections.pop(first_out).remove()
        torch.testing.assert_close(model(PICTURE), alone[1 - first_out])
        injections[0].remove()
        assert torch.equal(model(PICTURE), before)


def test_another_programs_wrapper_is_put_back() -> None:
    model = tiny()
    plain = model[0].forward
    model[0].forward = lambda x: 2 * plain(x)
    doubled = model(PICTURE)
    with attach({"m": model}, adapters_of(model, "lora")):
        assert not torch.equal(model(PICTURE), doubled)
    assert torch.equal(model(PICTURE), doubled)


def test_strength_reaches_the_sites_of_a_glob_and_zero_is_the_base() -> None:
    model = tiny()
    before = model(PICTURE)
    with attach({"m": model}, adapters_of(model, "lora")) as injection:
        full = model(PICTURE)
        injection.set_strength(0.0, match="m.2")
        only_conv = model(PICTURE)
        injection.set_strength(0.0, match="m.0")
        assert torch.equal(model(PICTURE), before)
        injection.set_strength(1.0)
        assert torch.equal(model(PICTURE), full)
    assert not torch.equal(only_conv, full)
    assert not torch.equal(only_conv, before)


def test_uncalled_sites_are_told_for_each_attach() -> None:
    model = tiny()
    first = attach({"m": model}, adapters_of(model, "lora"))
    assert first.uncalled() == ["m.0", "m.2"]
    model(PICTURE)
    second = attach({"m": model}, adapters_of(model, "lora"))
    assert first.uncalled() == []
    assert second.uncalled() == ["m.0", "m.2"]
    model[0](PICTURE)
    assert second.uncalled() == ["m.2"]


def test_a_site_that_is_not_there_attaches_nothing() -> None:
    model = tiny()
    adapters = adapters_of(model, "lora")
    with pytest.raises(KeyError, match=r"m\.9"):
        attach({"m": model}, {**adapters, "m.9": adapters["m.0"]})
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_merging_several_with_strengths_is_their_sum_and_skips_zero() -> None:
    model = tiny()
    lora, oft = adapters_of(model, "lora"), adapters_of(model, "oft")
    kept = [parameter.data for parameter in model.parameters()]
    with attach({"m": model}, lora, strength=0.5), attach({"m": model}, oft, strength=-0.25) as second:
        second.set_strength(0.0, match="m.0")
        both = model(PICTURE)
    by_site = {"m.0": 0.0, "m.2": -0.25}
    with merged({"m": model}, [(lora, lambda site: 0.5), (oft, by_site.__getitem__)]):
        torch.testing.assert_close(model(PICTURE), both)
    assert all(p.data.data_ptr() == k.data_ptr() for p, k in zip(model.parameters(), kept, strict=True))


def test_merging_at_a_missing_site_puts_back_what_was_done() -> None:
    model = tiny()
    before, adapters = model(PICTURE), adapters_of(model, "lora")
    with pytest.raises(KeyError), merged({"m": model}, [({**adapters, "m.9": adapters["m.0"]}, lambda site: 1.0)]):
        pass
    assert torch.equal(model(PICTURE), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_strength_and_a_removal_show_on_a_compiled_model(method: str) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None and shutil.which("cl") is None:
        pytest.skip("torch.compile needs a C++ compiler, and none is installed")
    model = tiny()[2:]
    x = torch.linspace(-1, 1, 120).reshape(2, 3, 20)
    plain, before = torch.compile(model, backend="aot_eager"), model(x)
    torch.testing.assert_close(plain(x), before)
    with attach({"m": model}, adapters_of(model, method)) as injection:
        for strength in (1.0, 0.5, 0.0, -1.0):
            injection.set_strength(strength)
            torch.testing.assert_close(plain(x), model(x), msg=f"strength {strength}")
        assert not torch.allclose(plain(x), before)
    torch.testing.assert_close(plain(x), before)


def test_dropout_and_strengths_stay_apart_between_copies_of_a_spec() -> None:
    """Settings live in the Spec, so two runs in one process never see each other's."""
    layer = Layer("linear", 8, 12, True)
    one, two = adapter_for(layer, LoraSpec(dropout=0.5)), adapter_for(layer, LoraSpec())
    assert one.plan.dropout == 0.5
    assert two.plan.dropout == 0.0


def test_an_input_rotation_costs_no_dense_product() -> None:
    layer = Layer("linear", 8, 12, True)
    module, x = layer.build(), layer.input()
    adapter = adapter_for(layer, OftSpec(side="input", block_size=4))
    seen: list[Tensor] = []
    adapter.update = lambda weight: seen.append(weight) or weight
    with attach({"m": nn.Sequential(module)}, {"m.0": adapter}):
        module(x)
    assert seen == []


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyboardInterrupt()])
def test_attach_that_fails_half_way_takes_its_hooks_off(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    first, adapters = adapters_of(model, "lora"), adapters_of(model, "lora")

    def fail(*_: object) -> None:
        raise error

    with attach({"m": model}, first) as kept:
        hooks = [module.__dict__["_adapter_hook"] for module in model]
        monkeypatch.setattr(adapters["m.1"], "to", fail)
        with pytest.raises(type(error)):
            attach({"m": model}, adapters)
        assert [hook.entries for hook in hooks] == [[entry] for entry in kept._entries.values()], "only its own went"
    with pytest.raises(type(error)):
        attach({"m": model}, adapters)
    assert all("forward" not in module.__dict__ and "_adapter_hook" not in module.__dict__ for module in model)
