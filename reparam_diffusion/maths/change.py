"""ΔW of one layer as a value: whole, or as a low-rank product U D; sums, sizes and angles without the dense matrix.

A change is no weight: two changes add up, a change and a weight make a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """ΔW of a weight of `shape` (out, in, *kernel), seen as a matrix (out, in·kernel), and Δb where there is one.

    Either `whole` is given, or `up` (out, r) and `down` (r, in·kernel).
    """

    shape: tuple[int, ...]
    whole: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    bias: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """`up` and `down`, or None for a change that is held whole."""
        return None if self.up is None or self.down is None else (self.up, self.down)

    @property
    def sides(self) -> tuple[int, int]:
        """The matrix's (rows, columns)."""
        return self.shape[0], math.prod(self.shape[1:])

    def matrix(self) -> Tensor:
        """ΔW whole, as a matrix."""
        if self.whole is not None:
            return self.whole.reshape(self.sides)
        assert self.up is not None and self.down is not None
        return self.up @ self.down

    def dense(self) -> Change:
        """The same change, held whole."""
        return replace(self, whole=self.matrix(), up=None, down=None)

    def product(self) -> Change:
        """The same change as a product, of full rank with an identity for one factor where it is held whole."""
        if self.factors is not None:
            return self
        matrix, (rows, columns) = self.matrix(), self.sides
        up, down = (torch.eye(rows), matrix) if rows <= columns else (matrix, torch.eye(columns))
        return replace(self, whole=None, up=up, down=down)

    def scaled(self, strength: float) -> Change:
        """strength · Δ."""
        bias = None if self.bias is None else self.bias * strength
        if self.whole is not None:
            return replace(self, whole=self.whole * strength, bias=bias)
        assert self.up is not None
        return replace(self, up=self.up * strength, bias=bias)

    def norm(self) -> float:
        """‖Δ‖, Frobenius, the bias included."""
        return math.sqrt(max(self.dot(self), 0.0))

    def dot(self, other: Change) -> float:
        """⟨Δ, Δ'⟩, in fp64; for two low-rank products in r² (in + out): tr((D'Dᵀ)(UᵀU'))."""
        mine, theirs = self.factors, other.factors
        if mine is not None and theirs is not None:
            left = mine[0].double().T @ theirs[0].double()
            right = mine[1].double() @ theirs[1].double().T
            product = float((left * right).sum())
        else:
            product = float((self.matrix().double() * other.matrix().double()).sum())
        if self.bias is not None and other.bias is not None:
            product += float(self.bias.double() @ other.bias.double())
        return product

    def cut(self) -> int:
        """The rank at which a product stops being smaller than the matrix; 0 where it never is."""
        rows, columns = self.sides
        return (rows * columns - 1) // (rows + columns)


def nothing(shape: Sequence[int]) -> Change:
    """The change that changes nothing, of rank 0."""
    rows, columns = shape[0], math.prod(shape[1:])
    return Change(tuple(shape), up=torch.zeros(rows, 0), down=torch.zeros(0, columns))


def total(changes: Sequence[Change], *, side_by_side: bool = False) -> Change:
    """Σ Δⱼ, exact. Products stay products, their factors side by side, up to the layer's full rank.

    `side_by_side` keeps factors whatever the rank; all changes must have them.
    """
    first, bias = changes[0], _total_bias(changes)
    factors = [change.factors for change in changes]
    rank = sum(pair[0].shape[1] for pair in factors if pair is not None)
    if all(pair is not None for pair in factors) and (side_by_side or rank < min(first.sides) or len(changes) == 1):
        up = torch.cat([pair[0] for pair in factors if pair is not None], 1)
        down = torch.cat([pair[1] for pair in factors if pair is not None], 0)
        return Change(first.shape, up=up, down=down, bias=bias)
    whole = torch.zeros(first.sides)
    for change in changes:
        if change.factors is None:
            whole += change.matrix()
        else:
            whole.addmm_(*change.factors)
    return Change(first.shape, whole=whole, bias=bias)


def _total_bias(changes: Sequence[Change]) -> Tensor | None:
    biases = [change.bias for change in changes if change.bias is not None]
    return torch.stack(biases).sum(0) if biases else None


def distance(left: Change, right: Change) -> float:
    """‖Δ − Δ'‖, from the factors where both have them (then to about 1e-8 of their size)."""
    return total([left, right.scaled(-1.0)], side_by_side=bool(left.factors and right.factors)).norm()


def entrywise(changes: Sequence[Change], combine: Callable[[list[Tensor]], Tensor]) -> Change:
    """`combine` on the matrices, and on the biases (zeros where a change has none), for methods that need every entry.

    Matrix and bias are handed over as one matrix (out, in·kernel + 1) when any change has a bias.
    """
    first = changes[0]
    if all(change.bias is None for change in changes):
        return Change(first.shape, whole=combine([change.matrix() for change in changes]))
    rows = first.sides[0]
    widened = [
        torch.cat([change.matrix(), (torch.zeros(rows) if change.bias is None else change.bias)[:, None]], 1)
        for change in changes
    ]
    combined = combine(widened)
    return Change(first.shape, whole=combined[:, :-1].contiguous(), bias=combined[:, -1].contiguous())
