"""The best rank-r approximation is the truncated SVD.  Eckart and Young 1936."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`up` (out, r) and `down` (r, in) with up @ down the nearest rank-r matrix, singular values shared."""
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """‖approximate − exact‖ / ‖exact‖ in the Frobenius norm; 0 when both are zero."""
    size = exact.float().norm().item()
    return (approximate.float() - exact.float()).norm().item() / size if size else 0.0
