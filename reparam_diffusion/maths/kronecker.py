"""Kronecker products and the divisors they need: (C ⊗ M)[o₁k + o₂, i₁n + i₂] = C[o₁, i₁] M[o₂, i₂]."""

from __future__ import annotations

import torch
from torch import Tensor


def kron(left: Tensor, right: Tensor) -> Tensor:
    """C (l, m) ⊗ M (k, n, *kernel) -> (l·k, m·n, *kernel)."""
    kernel = right.shape[2:]
    flat = torch.einsum("ab,cd...->acbd...", left, right)
    return flat.reshape(left.shape[0] * right.shape[0], left.shape[1] * right.shape[1], *kernel)


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
