"""Cayley: R = (I + Q)(I − Q)⁻¹ with Q = −Qᵀ is orthogonal.  Cayley 1846; in OFT, Qiu et al. 2023."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def cayley(skew: Tensor) -> Tensor:
    """Orthogonal (…, b, b) from skew-symmetric (…, b, b), exact, in at least fp32: R = (I + Q)(I − Q)⁻¹."""
    turn = cayley_turn(skew)
    return turn + torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)


def cayley_turn(skew: Tensor) -> Tensor:
    """R − I = 2 Q (I − Q)⁻¹, in at least fp32. Small rotations keep their digits, which R minus I would lose."""
    turn: Tensor = _CayleyTurn.apply(skew if skew.dtype == torch.float64 else skew.float())
    return turn


def inverse_cayley(rotation: Tensor) -> Tensor:
    """Q with cayley(Q) = rotation: (R − I)(R + I)⁻¹, made exactly skew. It grows without bound towards a half turn."""
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    skew = torch.linalg.solve(rotation + eye, rotation - eye, left=False)
    return (skew - skew.mT) / 2


def nearest_rotation(before: Tensor, after: Tensor) -> Tensor:
    """R (…, b, b) in SO(b) with R · before nearest to after, both (…, b, n): Procrustes, Kabsch 1976."""
    left, _, right = torch.linalg.svd(after @ before.mT)
    flip = torch.ones(left.shape[:-1], dtype=left.dtype, device=left.device)
    flip[..., -1] = torch.linalg.det(left @ right).sign()
    return left * flip[..., None, :] @ right


class _CayleyTurn(torch.autograd.Function):
    """T = 2 Q A with A = (I − Q)⁻¹ = I + T/2, so dT = 2 A dQ A needs no second inverse."""

    @staticmethod
    def forward(ctx: FunctionCtx, skew: Tensor) -> Tensor:
        eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        turn: Tensor = 2 * skew @ torch.linalg.inv_ex(eye - skew).inverse  # never singular, so no check that waits
        ctx.save_for_backward(turn)
        return turn

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # Any: torch gives ctx its saved_tensors at run time
        (turn,) = ctx.saved_tensors
        outer = (turn / 2).mT
        outer = outer + torch.eye(outer.shape[-1], dtype=outer.dtype, device=outer.device)
        return 2 * outer @ gradient @ outer


def skew_from_triangle(upper: Tensor, size: int) -> Tensor:
    """(…, b(b−1)/2) row-major upper triangle -> (…, b, b) with Q = U − Uᵀ."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    whole = upper.new_zeros(*upper.shape[:-1], size, size)
    whole[..., rows, columns] = upper
    return whole - whole.transpose(-1, -2)


def triangle_from_skew(skew: Tensor) -> Tensor:
    """(…, b, b) -> (…, b(b−1)/2), the row-major upper triangle."""
    size = skew.shape[-1]
    rows, columns = torch.triu_indices(size, size, 1, device=skew.device)
    return skew[..., rows, columns]


def clipped(skew: Tensor, limit: float) -> Tensor:
    """Q scaled so that its norm over the whole tensor is at most `limit` (LyCORIS's constraint, alpha · out)."""
    if limit <= 0:
        return skew
    norm = skew.norm()
    return torch.where(norm > limit, skew * (limit / norm.clamp_min(1e-30)), skew)


def _joined(num: int, size: int, width: int = 16) -> int:
    """How many blocks make one of up to `width`."""
    return next(count for count in range(max(width // size, 1), 0, -1) if num % count == 0)


def _widened(blocks: Tensor) -> Tensor:
    """Neighbouring blocks joined into block-diagonal ones: small products run at a third of the speed."""
    num, size, _ = blocks.shape
    join = _joined(num, size)
    if join == 1:
        return blocks
    wide = blocks.new_zeros(num // join, join, size, join, size)
    wide.diagonal(dim1=1, dim2=3).copy_(blocks.reshape(-1, join, size, size).permute(0, 2, 3, 1))
    return wide.reshape(num // join, join * size, join * size)


def rotate_blocks(blocks: Tensor, x: Tensor) -> Tensor:
    """Blockwise product on the last axis: y[…, n, i] = Σⱼ blocks[n, i, j] x[…, n, j]; x is (…, num·b)."""
    blocks = _widened(blocks)
    num, size, _ = blocks.shape
    parts = x.reshape(-1, num, size).transpose(0, 1)  # (num, rows, b)
    return torch.bmm(parts, blocks.transpose(1, 2)).transpose(0, 1).reshape(x.shape)


def turn_outputs(y: Tensor, turn: Tensor, bias: Tensor | None) -> Tensor:
    """y + T (y − bias), blockwise on the last axis, for T = s (R − I)."""
    turned: Tensor = _TurnOutputs.apply(y, turn, bias)
    return turned


class _TurnOutputs(torch.autograd.Function):
    """Keeps the result, which the next layer keeps anyway, in place of y: y − bias = (I + T)⁻¹ (result − bias)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, turn: Tensor, bias: Tensor | None) -> Tensor:  # Any: FunctionCtx refuses None
        turned = rotate_blocks(turn.to(y.dtype), y).add_(y)
        if bias is not None:
            turned -= rotate_blocks(turn, bias.to(turn.dtype)).to(y.dtype)
        ctx.save_for_backward(turned, turn, bias)
        return turned

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, None]:  # Any: saved_tensors are made at run time
        turned, turn, bias = ctx.saved_tensors
        for_y = rotate_blocks(turn.mT.to(g.dtype), g).add_(g) if ctx.needs_input_grad[0] else None
        num, size, _ = turn.shape
        gram = _gram_of_blocks(g, turned, num, size).to(turn.dtype)
        if bias is not None:
            sums = g.flatten(0, -2).sum(0).to(turn.dtype)
            gram = gram - sums.reshape(num, size, 1) * bias.to(turn.dtype).reshape(num, 1, size)
        eye = torch.eye(size, dtype=turn.dtype, device=turn.device)
        return for_y, gram @ torch.linalg.inv_ex(eye + turn).inverse.mT, None


def _gram_of_blocks(left: Tensor, right: Tensor, num: int, size: int) -> Tensor:
    """(num, b, b): Σ over the rows of left[n, i] right[n, j]."""
    join = _joined(num, size)
    rows = [side.reshape(-1, num // join, join * size).transpose(0, 1) for side in (left, right)]
    wide = torch.bmm(rows[0].mT, rows[1]).reshape(-1, join, size, join, size)
    return wide.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(num, size, size)
