"""Adapters on a live model: one hook a module, strengths, and merging with the originals kept.

A hook sums every adapter's fast path on the original x and the base's own y and adds once:
y' = op(x, W) + b + Σ sⱼ·(op(x, Δⱼ(W)) + Δbⱼ).  A combination that no fast path serves falls back to delta.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from reparam_diffusion.adapters.base import Adapter, Host, at_least_float
from reparam_diffusion.maths.chance import Draw

Parts = Mapping[str, nn.Module]
"""A model's trainable parts by name: "unet", "te1", "te2". A site is "<part>.<module path>"."""


@dataclass
class Entry:
    """One adapter at one module, with its strength as a 0-d tensor that compiled code reads anew."""

    adapter: Adapter
    strength: Tensor
    on: bool = True
    called: bool = False


class Hook:
    """Stands in for one module's forward; the module's parameters and state_dict stay as they were."""

    def __init__(self, module: nn.Module) -> None:
        self.host = Host(module)
        self.module = module
        self.plain: Callable[..., Tensor] = module.forward
        self.had_own_forward = "forward" in module.__dict__  # another program's wrapper, to be put back
        self.entries: list[Entry] = []

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:  # Any: whatever the host's forward takes
        live = [entry for entry in self.entries if entry.on]
        if not live:
            return self.plain(x, *rest, **named)
        for entry in live:
            entry.called = True
        dense: list[Entry] = []
        shifts: list[tuple[Entry, Tensor]] = []
        after: list[Entry] = []
        needs_output = any(entry.adapter.reads_output for entry in live)
        for entry in live:
            shift = None if needs_output or self.host.kind == "norm" else entry.adapter.shift(x, self.host)
            if shift is not None:
                shifts.append((entry, shift))
            else:
                after.append(entry)
        entered = x
        for entry, shift in shifts:
            entered = torch.addcmul(entered, shift, entry.strength.to(shift.dtype))
        y = self.plain(entered, *rest, **named)
        total = y
        for entry in after:
            moved = entry.adapter.onto(total, x, y, self.host, entry.strength)
            if moved is None:
                dense.append(entry)
            else:
                total = moved
        return self._with_dense(total, x, dense, live)

    def _with_dense(self, total: Tensor, x: Tensor, dense: Sequence[Entry], live: Sequence[Entry]) -> Tensor:
        """The exact fallback: one product with Σ s·Δ(W), and the biases' changes."""
        host = self.host
        if dense:
            change = sum_of(entry.adapter.delta(host.weight) * entry.strength for entry in dense)
            total = total + host.apply(x, change.to(x.dtype))
        for entry in live:
            added = entry.adapter.delta_bias(host.bias)
            if added is not None:
                total = total + (host.over_channels(added, total) * entry.strength).to(total.dtype)
        return total


def sum_of(tensors: Iterator[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    total = next(tensors)
    for tensor in tensors:
        total = total + tensor
    return total


class Injection:
    """A set of adapters attached to a model. Leaving the context, or `remove`, takes them off again."""

    def __init__(self, parts: Parts, adapters: Mapping[str, Adapter]) -> None:
        self.adapters = dict(adapters)
        self.parts = parts
        self._hooks: dict[str, Hook] = {}
        self._entries: dict[str, Entry] = {}

    def parameters(self) -> list[nn.Parameter]:
        """Every trainable parameter, in the order of the sites."""
        return [parameter for adapter in self.adapters.values() for parameter in adapter.parameters()]

    def set_strength(self, strength: float, *, match: str = "*") -> None:
        """Set the strength of the sites whose name fits the glob, such as "te1.*" or "unet.mid_block.*"."""
        for site, entry in self._entries.items():
            if fnmatch.fnmatchcase(site, match):
                entry.strength.fill_(strength)
                entry.on = strength != 0.0
        reset_compiled()

    def set_draw(self, draw: Draw | None) -> None:
        """Say which training draw the next forward belongs to; None switches dropout off."""
        for adapter in self.adapters.values():
            adapter.draw = draw

    def uncalled(self) -> list[str]:
        """Sites that no forward has reached since attach."""
        return [site for site, entry in self._entries.items() if not entry.called]

    def remove(self) -> None:
        """Take the adapters off; the model's forwards are its own again when no other adapter is left."""
        for site, hook in self._hooks.items():
            entry = self._entries[site]
            hook.entries = [other for other in hook.entries if other is not entry]
            if not hook.entries:
                _unhook(hook)
        self._hooks.clear()
        self._entries.clear()
        reset_compiled()

    def __enter__(self) -> Injection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


_HOOK = "_adapter_hook"


def attach(
    parts: Parts, adapters: Mapping[str, Adapter], *, strength: float = 1.0, device: torch.device | None = None
) -> Injection:
    """Attach adapters to the modules their sites name. Raises KeyError for a site that the model lacks.

    Adapters move to their host's device (or `device`, where hosts rest elsewhere than they work) and stay fp32. A
    second attach extends the same hooks. After an error the model is as it was.
    """
    modules = {site: find_module(parts, site) for site in adapters}
    injection = Injection(parts, adapters)
    try:
        for site, adapter in adapters.items():
            module = modules[site]
            hook = module.__dict__.get(_HOOK) or Hook(module)
            adapter.site = site
            adapter.to(place := device or hook.host.device)
            entry = Entry(adapter, torch.tensor(strength, device=place), on=strength != 0.0)
            injection._hooks[site] = hook
            injection._entries[site] = entry
            hook.entries.append(entry)
            module.__dict__[_HOOK] = hook
            module.__dict__["forward"] = hook.forward
    except BaseException:  # a Ctrl-C too: half attached is not left behind, and the error goes on
        injection.remove()
        raise
    reset_compiled()
    return injection


def _unhook(hook: Hook) -> None:
    if hook.module.__dict__.pop(_HOOK, None) is None:
        return  # it was not put on yet
    hook.module.__dict__.pop("forward", None)
    if hook.had_own_forward:
        hook.module.__dict__["forward"] = hook.plain


def find_module(parts: Parts, site: str) -> nn.Module:
    """The module that a site names. Raises KeyError when there is none."""
    part, _, path = site.partition(".")
    try:
        return parts[part].get_submodule(path)
    except AttributeError as error:
        raise KeyError(f"the model has no site {site}") from error


def reset_compiled() -> None:
    """Forget compiled code: torch sets no guards on hooks, so it would go on without what was just changed."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


Weighted = Sequence[tuple[Mapping[str, Adapter], Callable[[str], float]]]
"""Adapters by site, each set with a strength for each site."""


@dataclass
class _Merged:
    """One site while something is merged there: its untouched tensors, and what is on them now."""

    host: Host
    weight: Tensor
    bias: nn.Parameter | None
    changes: list[tuple[Adapter, float]] = field(default_factory=list)


class Merge:
    """W + Σ s·Δ(W) in the weights of a model. A change costs only the sites that differ from what is there.

    Originals are kept as copies in host memory and put back bit for bit. The sums are written where the weights lie:
    in other memory the same layers ran slower on a CPU (the starter's by 2 %).
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._sites: dict[str, _Merged] = {}

    def settle(self, weighted: Weighted) -> int:
        """Have exactly these adapters merged; says how many sites were touched. After an error nothing is merged."""
        wanted = _by_site(weighted)
        touched = 0
        try:
            for site in [site for site in self._sites if site not in wanted]:
                self._put_back(site)
                touched += 1
            for site, changes in wanted.items():
                if site not in self._sites or self._sites[site].changes != changes:
                    self._merge(site, changes)
                    touched += 1
        except BaseException:  # a Ctrl-C too: half merged is not left behind, and the error goes on
            self.restore()
            raise
        return touched

    def restore(self) -> None:
        """Put every original back."""
        for site in list(self._sites):
            self._put_back(site)

    @torch.no_grad()
    def _merge(self, site: str, changes: list[tuple[Adapter, float]]) -> None:
        here = self._sites.get(site)
        if here is None:
            here = self._sites[site] = self._keep(Host(find_module(self._parts, site)))
        here.changes = []  # until the new ones are whole
        _merge_site(here, changes)
        here.changes = changes

    def _keep(self, host: Host) -> _Merged:
        """The untouched tensors of a site: a copy of the weight, and the bias itself, which a sum stands in for."""
        bias = host.module.bias
        assert isinstance(host.weight, nn.Parameter), "nothing is merged into a base in 8 bits"
        assert bias is None or isinstance(bias, nn.Parameter)
        return _Merged(host, host.weight.data.to("cpu", copy=True), bias)

    def _put_back(self, site: str) -> None:
        here = self._sites.pop(site)
        here.host.weight.data.copy_(here.weight)
        here.host.module.bias = here.bias  # type: ignore[assignment]  # nn.Module's stub knows no missing bias


@contextmanager
def merged(parts: Parts, weighted: Weighted) -> Iterator[None]:
    """The model with W + Σ s·Δ(W) in its weights; it is as it was when the body ends, however it ends."""
    merge = Merge(parts)
    try:
        merge.settle(weighted)
        yield
    finally:
        merge.restore()


def _by_site(weighted: Weighted) -> dict[str, list[tuple[Adapter, float]]]:
    sites: dict[str, list[tuple[Adapter, float]]] = {}
    for adapters, strength in weighted:
        for site, adapter in adapters.items():
            if strength(site) != 0.0:
                sites.setdefault(site, []).append((adapter, strength(site)))
    return sites


def _merge_site(here: _Merged, changes: Sequence[tuple[Adapter, float]]) -> None:
    """Write the sums of the untouched tensors and the changes into the module's own."""
    target = here.host.weight.data
    weight = here.weight.to(target.device)
    total = target if target.dtype == at_least_float(weight).dtype else torch.empty_like(weight, dtype=torch.float32)
    before = at_least_float(weight)
    for adapter, strength in changes:
        adapter.to(target.device)
        before = torch.add(before, adapter.delta(weight), alpha=strength, out=total)
    if total is not target:
        target.copy_(total)
    here.host.module.bias = _merged_bias(here.bias, changes, dtype=target.dtype)  # type: ignore[assignment]


def _merged_bias(
    bias: nn.Parameter | None, changes: Sequence[tuple[Adapter, float]], *, dtype: torch.dtype
) -> nn.Parameter | None:
    """The bias with what the adapters add to it; a foreign file may bring one where the host has none."""
    added = [(moved, strength) for adapter, strength in changes if (moved := adapter.delta_bias(bias)) is not None]
    if not added:
        return bias
    total = sum_of(moved * strength for moved, strength in added)
    return nn.Parameter((total if bias is None else at_least_float(bias) + total).to(dtype), requires_grad=False)
