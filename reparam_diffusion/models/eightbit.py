"""A frozen base in 8 bits: W ≈ N · s, N whole from -127 to 127, s the largest |w| of an output row over 127.

The numbers that LLM.int8() stores (Dettmers et al. 2022, arXiv:2208.07339, eq. 4). Only the weights are rounded: a
product is taken with N · s in the input's own format, so nothing is rounded on the way and nothing of x is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 4096
"""Weights with fewer numbers stay as they are: they weigh nothing."""
_STEPS = 127.0


class Linear8bit(nn.Linear):
    """A frozen linear layer with its weight in 8 bits. `weight` gives it in full, made anew each time."""

    numbers: Tensor  # (out, in), int8; `weight_shape` of adapters reads it
    scale: Tensor  # (out, 1), fp32

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        weight = plain.weight.detach()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.dtype = weight.dtype
        self.bias = plain.bias
        numbers, scale = rounded(weight)
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nn.Linear's is a parameter
        """(out, in) in the layer's own format."""
        return whole(self.numbers, self.scale, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self.numbers, self.scale, self.bias)
        return out


class _Product(torch.autograd.Function):
    """x Wᵀ + b, whose way back makes W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:  # Any: torch's own
        ctx.save_for_backward(numbers, scale)
        return F.linear(x, whole(numbers, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        numbers, scale = ctx.saved_tensors
        return grad @ whole(numbers, scale, grad.dtype), None, None, None


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) -> whole numbers in int8, and the scale of each row (out, 1) in fp32."""
    low, high = torch.aminmax(weight, dim=1, keepdim=True)
    scale = torch.maximum(high, -low).float() / _STEPS
    steps = weight.to(torch.float32, copy=True).div_(scale.clamp(min=torch.finfo(torch.float32).tiny))
    return steps.round_().to(torch.int8), scale


def whole(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `rounded`, as far as there is one."""
    return torch.mul(numbers, scale).to(dtype)


def to_8bit(module: nn.Module, *, least: int = LEAST) -> int:
    """Put the linear layers of a frozen module into 8 bits, one after the other; how many there were.

    What is left is copied, as tensors that are mapped from one file keep all of it in memory together.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.numel() >= least:
                setattr(parent, name, Linear8bit(child))
                count += 1
    for parameter in module.parameters() if count else ():
        parameter.data = parameter.data.clone()
    return count
