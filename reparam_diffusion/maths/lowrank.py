"""The best rank-r approximation is the truncated SVD.  Eckart and Young 1936."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reparam_diffusion.maths.chance import generator
from reparam_diffusion.maths.change import Change

_MUCH = 16
"""How many times fewer ranks than the matrix has make the random start pay."""


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`up` (out, r) and `down` (r, in) with up @ down the nearest rank-r matrix, singular values shared."""
    return shared(*svd(Change(tuple(matrix.shape), whole=matrix.float())), rank)


def svd(change: Change, *, most: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), σ (k), Vᵀ (k, in·kernel) of a change; of a product U D in r² (in + out), never dense.

    QR of both factors leaves an r x r core: U = Q₁R₁, Dᵀ = Q₂R₂, U D = Q₁ (R₁R₂ᵀ) Q₂ᵀ. Where only the `most` leading
    triplets are wanted, a small part of a large matrix's, a random subspace finds them in a fraction of the time.
    """
    if change.factors is None:
        matrix = change.matrix().float()
        if 0 < most * _MUCH <= min(matrix.shape):
            return _leading(matrix, most)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    up, down = (factor.float() for factor in change.factors)
    outer, core_up = torch.linalg.qr(up)
    inner, core_down = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(core_up @ core_down.T, full_matrices=False)
    return outer @ left, values, right @ inner.T


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading triplets by subspace iteration from a random start.  Halko et al. 2011, arXiv:0909.4061, alg. 4.4."""
    start = torch.randn(matrix.shape[1], count + 16, generator=generator("svd", *matrix.shape))
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left[:, :count], values[:count], right[:count]


def shared(left: Tensor, values: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` triplets as `up` and `down`, each with the root of the singular values: suits fp16."""
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def rank_for_energy(values: Tensor, energy: float) -> int:
    """The smallest rank that keeps this share of Σσ²."""
    return _first_at(values.double().square().cumsum(0), energy)


def rank_for_sum(values: Tensor, share: float) -> int:
    """The smallest rank that keeps this share of Σσ (kohya's sv_cumulative)."""
    return _first_at(values.double().cumsum(0), share)


def rank_for_norm(values: Tensor, share: float) -> int:
    """The smallest rank that keeps this share of ‖σ‖ (kohya's sv_fro)."""
    return rank_for_energy(values, share * share)


def rank_for_ratio(values: Tensor, ratio: float) -> int:
    """How many singular values are at least the largest over `ratio` (kohya's sv_ratio)."""
    return max(1, int((values * ratio >= values[0]).sum())) if values.numel() and values[0] > 0 else 0


def _first_at(rising: Tensor, share: float) -> int:
    if not rising.numel() or rising[-1] <= 0:
        return 0
    wanted = share * rising[-1] * (1 - 1e-12)
    return min(int((rising < wanted).sum()) + 1, rising.numel())


def share_ranks(spectra: dict[str, Tensor], costs: dict[str, int], budget: int) -> dict[str, int]:
    """Ranks by layer that keep the most energy for `budget` numbers: the triplets with most σ² a number first.

    `costs` has the numbers that one rank takes in a layer. A layer may get none.
    """
    names = [name for name, values in spectra.items() for _ in range(len(values))]
    worth = torch.cat([values.double().square() / costs[name] for name, values in spectra.items()])
    ranks = dict.fromkeys(spectra, 0)
    for index in worth.argsort(descending=True, stable=True).tolist():
        name = names[index]
        if costs[name] <= budget and worth[index] > 0:
            ranks[name] += 1
            budget -= costs[name]
    return ranks


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """‖approximate − exact‖ / ‖exact‖ in the Frobenius norm; 0 when both are zero."""
    size = exact.float().norm().item()
    return (approximate.float() - exact.float()).norm().item() / size if size else 0.0


def relative(error: float, size: float) -> float:
    """error / size, 0 when both are zero and infinite where something stands for nothing."""
    return error / size if size else (0.0 if error == 0 else math.inf)
