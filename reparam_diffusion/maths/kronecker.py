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


def nearest_kronecker(matrix: Tensor, shape: tuple[int, ...], l: int, m: int) -> tuple[Tensor, Tensor]:
    """C (l, m) and M (k, n, *kernel) with C ⊗ M nearest to a weight's matrix.  Van Loan and Pitsianis 1993.

    The entries are put in an order (l·m, k·n·kernel) in which C ⊗ M has rank 1; its first singular pair is the answer.
    """
    out, entry, kernel = shape[0], shape[1], shape[2:]
    k, n = out // l, entry // m
    blocks = matrix.reshape(l, k, m, n, -1).permute(0, 2, 1, 3, 4).reshape(l * m, -1)  # (l·m, k·n·kernel)
    wide = blocks.double()
    gram = wide @ wide.T if l * m <= wide.shape[1] else wide.T @ wide
    first = torch.linalg.eigh(gram).eigenvectors[:, -1]
    if l * m <= wide.shape[1]:
        small, large = first, first @ wide
    else:
        small, large = wide @ first, first
    size = (small.norm() * large.norm()).sqrt()
    small, large = (side * (size / side.norm().clamp_min(1e-300)) for side in (small, large))
    return small.float().reshape(l, m), large.float().reshape(k, n, *kernel)
