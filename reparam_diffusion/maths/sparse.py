"""Thinning a matrix to its largest entries."""

from __future__ import annotations

from torch import Tensor


def largest(matrix: Tensor, density: float) -> Tensor:
    """The matrix with all but this share of its entries, the largest, set to 0. Equal ones stay together."""
    count = round(density * matrix.numel())
    if count >= matrix.numel():
        return matrix
    sizes = matrix.abs()
    least = sizes.flatten().kthvalue(matrix.numel() - max(count, 1) + 1).values
    return matrix * (sizes >= least)
