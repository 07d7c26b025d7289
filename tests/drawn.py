"""Drawn cases: ugly shapes, and settings read off each method's Spec, so a new method joins every law by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from reparam_diffusion.adapters import METHODS, Adapter, Spec

NUMBERS = (0.0, 0.02, 0.25, 0.5, 0.9, 3.0, 10.0)
STRENGTHS = (1.0, 0.5, -0.25, 1.75)  # exact in every float


@dataclass(frozen=True)
class Layer:
    """A host layer and the shape of its input, as plain values that print well when a law fails."""

    kind: Literal["linear", "conv"]
    entry: int
    out: int
    bias: bool
    lead: tuple[int, ...] = (2, 3)
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    padding_mode: str = "zeros"
    seed: int = 0

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Linear | nn.Conv2d:
        """The layer with random weights, frozen as a base model is."""
        module: nn.Linear | nn.Conv2d
        if self.kind == "linear":
            module = nn.Linear(self.entry, self.out, self.bias)
        else:
            module = nn.Conv2d(
                self.entry, self.out, self.kernel, self.stride, self.padding, self.dilation, self.groups, self.bias,
                self.padding_mode,
            )  # fmt: skip
        chance = torch.Generator().manual_seed(self.seed)
        for parameter in module.parameters():
            parameter.data.normal_(generator=chance).mul_(0.5)
        return module.to(dtype).requires_grad_(False)

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """A random input, of which the gradient is wanted."""
        shape = (*self.lead, self.entry) if self.kind == "linear" else (2, self.entry, *self.lead)
        chance = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(shape, generator=chance).to(dtype).requires_grad_()


def linears() -> st.SearchStrategy[Layer]:
    """Linear layers, mostly not square, with one to three leading axes."""
    return st.builds(
        Layer,
        kind=st.just("linear"),
        entry=st.sampled_from((8, 12, 6, 4, 24, 7, 1)),
        out=st.sampled_from((12, 8, 16, 6, 4, 9, 1)),
        bias=st.booleans(),
        lead=st.sampled_from(((2, 3), (4,), (2, 2, 3), (1, 40))),
        seed=st.integers(0, 1000),
    )


@st.composite
def convs(draw: st.DrawFn) -> Layer:
    """Convolutions with pictures larger than the kernel, every kind of padding, stride and groups."""
    groups = draw(st.sampled_from((1, 1, 2)))
    kernel = draw(st.sampled_from(((1, 1), (3, 3), (1, 3), (2, 2))))
    return Layer(
        kind="conv",
        entry=draw(st.sampled_from((4, 6, 8, 3))) * groups,
        out=draw(st.sampled_from((6, 4, 8, 5))) * groups,
        bias=draw(st.booleans()),
        lead=draw(st.sampled_from(((7, 6), (5, 9)))),
        kernel=kernel,
        stride=draw(st.sampled_from((1, 2))),
        padding=draw(st.sampled_from((0, 1))),
        dilation=draw(st.sampled_from((1, 2))),
        groups=groups,
        padding_mode=draw(st.sampled_from(("zeros", "reflect"))),
        seed=draw(st.integers(0, 1000)),
    )


def layers() -> st.SearchStrategy[Layer]:
    """Any host layer."""
    return st.one_of(linears(), convs())


def specs(method: str) -> st.SearchStrategy[Spec]:
    """Settings of a method, drawn from the types and bounds of its Spec's fields."""
    kind = METHODS[method].spec
    return st.builds(kind, **{name: _values(field) for name, field in kind.model_fields.items() if name != "method"})


def _values(field) -> st.SearchStrategy:
    if get_origin(field.annotation) is Literal:
        return st.sampled_from(get_args(field.annotation))
    if field.annotation is bool:
        return st.booleans()
    low, high = -math.inf, math.inf
    open_low = open_high = False
    for bound in field.metadata:
        low, open_low = (bound.gt, True) if hasattr(bound, "gt") else (getattr(bound, "ge", low), open_low)
        high, open_high = (bound.lt, True) if hasattr(bound, "lt") else (getattr(bound, "le", high), open_high)
    if field.annotation is int:
        return st.integers(int(low) + open_low, int(min(high, low + 5)))
    assert field.annotation is float, f"teach drawn.py to draw {field.annotation}"
    fitting = [n for n in NUMBERS if (low < n if open_low else low <= n) and (n < high if open_high else n <= high)]
    return st.sampled_from(fitting)


def adapter_for(layer: Layer, spec: Spec, *, dtype: torch.dtype = torch.float64, random: bool = True) -> Adapter:
    """A method's adapter for a layer; `random` fills every factor, since a fresh one proves nothing."""
    method = METHODS[spec.method]
    module = layer.build()
    plan = method.plan(spec, tuple(module.weight.shape), layer.groups)
    chance = torch.Generator().manual_seed(layer.seed + 2)
    adapter = method.build(plan, module.weight.float(), layer.groups, chance)
    if random:
        fill(adapter, chance)
    return adapter.to(dtype)


def fill(adapter: Adapter, chance: torch.Generator) -> None:
    """Random numbers in every factor; a magnitude stays a norm, above zero."""
    for parameter in adapter.parameters():
        parameter.data.normal_(generator=chance).mul_(0.5)
    if adapter.magnitude is not None:
        adapter.magnitude.data.abs_().add_(0.2)
