"""Kronecker products and the divisors they need: (C ⊗ M)[o₁k + o₂, i₁n + i₂] = C[o₁, i₁] M[o₂, i₂]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def kron(left: Tensor, right: Tensor) -> Tensor:
    """C (l, m) ⊗ M (k, n, *kernel) -> (l·k, m·n, *kernel)."""
    kernel = right.shape[2:]
    flat = torch.einsum("ab,cd...->acbd...", left, right)
    return flat.reshape(left.shape[0] * right.shape[0], left.shape[1] * right.shape[1], *kernel)


def kron_linear(x: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """(C ⊗ M) x without the large matrix: C X Mᵀ for each row X of x (rows, m, n); the result is (rows, l, k)."""
    product: Tensor = _KronLinear.apply(x, small, large)
    return product


def _each(matrix: Tensor, rows: Tensor) -> Tensor:
    """matrix @ row for every row; `matmul` would copy the rows to make one product of it, which is slower."""
    return torch.bmm(matrix.expand(rows.shape[0], -1, -1), rows)


class _KronLinear(torch.autograd.Function):
    """Keeps x alone for the way back: with U = G M, dC = Σ U Xᵀ needs neither X Mᵀ nor C X, which are as large as x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, small: Tensor, large: Tensor) -> Tensor:
        ctx.save_for_backward(x, small, large)
        if small.shape[0] < small.shape[1]:
            return _each(small, x) @ large.T
        return _each(small, x @ large.T)

    @staticmethod
    def backward(
        ctx: Any, g: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:  # Any: saved_tensors are made at run time
        x, small, large = ctx.saved_tensors
        u = g @ large  # (rows, l, n)
        for_x = _each(small.T, u) if ctx.needs_input_grad[0] else None
        for_small = torch.bmm(u, x.mT).sum(0)
        v = _each(small.T, g)  # (rows, m, k)
        return for_x, for_small, v.reshape(-1, v.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of `dimension`, smaller first, as LyCORIS chooses them.

    A `factor` that divides is taken as it is; otherwise the pair grows through the divisors towards the
    square root while the smaller one stays at or under `factor` (-1: no bound).
    """
    if factor > 0 and dimension % factor == 0:
        small, large = sorted((factor, dimension // factor))
        return small, large
    bound = dimension if factor < 0 else factor
    small, large = 1, dimension
    while small < large:
        larger = small + 1
        while dimension % larger:
            larger += 1
        if larger + dimension // larger > small + large or larger > bound:
            break
        small, large = larger, dimension // larger
    return (small, large) if small <= large else (large, small)


def largest_divisor(dimension: int, bound: int) -> int:
    """The largest divisor of `dimension` that is at most `bound`."""
    return next(d for d in range(min(dimension, max(bound, 1)), 0, -1) if dimension % d == 0)
