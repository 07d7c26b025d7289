"""LoKr: ΔW = (α/r) C ⊗ M.  Yeh et al. 2023, arXiv:2309.14859, sec. 3.2; Edalati et al. 2022, arXiv:2212.10650."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from reparam_diffusion.adapters.base import (
    Adapter,
    Host,
    Method,
    Plan,
    Shape,
    Spec,
    alpha_of,
    as_matrix,
    register,
    shape_size,
)
from reparam_diffusion.maths.kronecker import factorization, kron, kron_linear


class LokrSpec(Spec):
    """A Kronecker product: full rank from very few numbers."""

    method: Literal["lokr"] = "lokr"
    factor: int = Field(8, ge=-1, le=256)
    """Size of the small factor. Low: more faithful, larger file. High: freer, tiny file. -1: as square as can be."""
    low_rank: bool = False
    """Make the large factor low rank too; off keeps it whole."""
    rank: int = Field(16, ge=1, le=1024)
    """Rank of the factors that are made low rank."""
    alpha: float = Field(16.0, gt=0, le=4096)
    """Strength of low-rank factors: they are scaled by alpha / rank. Whole factors are not scaled."""
    decompose_both: bool = False
    """Make the small factor low rank as well, where that saves numbers."""
    unbalanced: bool = False
    """Swap how the outputs are split, so that the small factor has the larger share of them."""


@dataclass(frozen=True)
class LokrPlan(Plan):
    """C is (out_small, in_small), M is (out_large, in_large, *kernel); a rank of 0 means whole."""

    out_small: int
    in_small: int
    rank_small: int
    rank_large: int
    scale: float
    alpha: float
    note: str = ""


class Lokr(Adapter):
    """C is `small` (l, m), or `small_up` (l, r) @ `small_down` (r, m).

    M is `large` (k, n, *kernel), or `large_up` (k, r) @ `large_down` (r, n, *kernel).
    """

    name = "lokr"
    plan: LokrPlan

    def __init__(self, shape: Sequence[int], plan: LokrPlan) -> None:
        super().__init__(shape, plan)
        large = (self.shape[0] // plan.out_small, self.shape[1] // plan.in_small, *self.shape[2:])  # (k, n, *kernel)
        if plan.rank_small:
            self.small_up = nn.Parameter(torch.zeros(plan.out_small, plan.rank_small))
            self.small_down = nn.Parameter(torch.zeros(plan.rank_small, plan.in_small))
        else:
            self.small = nn.Parameter(torch.zeros(plan.out_small, plan.in_small))
        if plan.rank_large:
            self.large_up = nn.Parameter(torch.zeros(large[0], plan.rank_large))
            self.large_down = nn.Parameter(torch.zeros(plan.rank_large, *large[1:]))
        else:
            self.large = nn.Parameter(torch.zeros(large))

    def small_factor(self) -> Tensor:
        """C (l, m), whole."""
        return self.small_up @ self.small_down if self.plan.rank_small else self.small

    def large_factor(self) -> Tensor:
        """M (k, n, *kernel), whole."""
        if not self.plan.rank_large:
            return self.large
        return (self.large_up @ self.large_down.flatten(1)).reshape(-1, *self.large_down.shape[1:])

    def update(self, weight: Tensor) -> Tensor:
        small, large = self.small_factor().to(weight.dtype), self.large_factor().to(weight.dtype)
        return kron(small * self.plan.scale, large)

    def is_cheap(self, host: Host, rows: int) -> bool:
        """Reshaping wins whenever the host is not grouped: in·k + out·m, or less, against in·out."""
        return host.groups == 1

    def quick(self, x: Tensor, y: Tensor, host: Host) -> Tensor | None:
        """(C ⊗ M) x = C X Mᵀ with x reshaped to (m, n); the cheaper product first."""
        if host.groups != 1:
            return None
        small = self.small_factor() * self.plan.scale
        return self._linear(x, small.to(x.dtype)) if host.kind == "linear" else self._conv(x, small.to(x.dtype), host)

    def onto(self, total: Tensor, x: Tensor, y: Tensor, host: Host, strength: Tensor) -> Tensor | None:
        if host.kind == "linear" and self.magnitude is None:
            return total + self._linear(x, (self.small_factor() * (strength * self.plan.scale)).to(x.dtype))
        return super().onto(total, x, y, host, strength)

    def _linear(self, x: Tensor, small: Tensor) -> Tensor:
        m, rows = small.shape[1], x.shape[:-1]
        parts = x.reshape(-1, m, self.shape[1] // m)
        if not self.plan.rank_large:
            return kron_linear(parts, small, self.large.to(x.dtype)).reshape(*rows, self.shape[0])
        h = kron_linear(parts, small, self.large_down.to(x.dtype))  # (rows, l, r)
        return nn.functional.linear(h, self.large_up.to(x.dtype)).reshape(*rows, self.shape[0])

    def _conv(self, x: Tensor, small: Tensor, host: Host) -> Tensor:
        m, batch = small.shape[1], x.shape[0]
        n = self.shape[1] // m
        parts = x.reshape(batch * m, n, *x.shape[2:])
        if self.plan.rank_large:
            h = host.apply(parts, self.large_down.to(x.dtype))
            h = nn.functional.conv2d(h, self.large_up[:, :, None, None].to(x.dtype))
        else:
            h = host.apply(parts, self.large.to(x.dtype))
        out = torch.matmul(small, h.reshape(batch, m, -1))  # (batch, l, k·height·width)
        return out.reshape(batch, self.shape[0], *h.shape[2:])

    def tensors(self) -> dict[str, Tensor]:
        plan = self.plan
        leaves: dict[str, Tensor | float] = {"alpha": plan.alpha}
        if plan.rank_small:
            leaves |= {"lokr_w1_a": self.small_up, "lokr_w1_b": self.small_down}
        else:
            leaves |= {"lokr_w1": self.small}
        if plan.rank_large:
            leaves |= {"lokr_w2_a": self.large_up, "lokr_w2_b": self.large_down.flatten(1)}
        else:
            leaves |= {"lokr_w2": self.large}
        return self.written(**leaves)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Self:
        small_low, large_low = "lokr_w1_a" in tensors, "lokr_w2_a" in tensors
        small = tensors["lokr_w1_a" if small_low else "lokr_w1"].shape[0]
        columns = tensors["lokr_w1_b" if small_low else "lokr_w1"].shape[1]
        rank_small = tensors["lokr_w1_b"].shape[0] if small_low else 0
        rank_large = tensors["lokr_w2_b"].shape[0] if large_low else 0
        rank = rank_large or rank_small
        alpha = alpha_of(tensors, rank or 1)
        if not math.isfinite(alpha):  # "dim 100000" stored in fp16; whole factors ignore it
            alpha = 1.0
        plan = LokrPlan(
            out_small=small,
            in_small=columns,
            rank_small=rank_small,
            rank_large=rank_large,
            scale=alpha / rank if rank else 1.0,
            alpha=alpha if rank else 1.0,
        )
        if shape[0] % small or shape[1] % columns:
            raise ValueError(f"LoKr factors of ({small}, {columns}) do not divide a weight of {tuple(shape)}")
        adapter = cls(shape, plan)
        if small_low:
            adapter._take("small_up", as_matrix(tensors["lokr_w1_a"]))
            adapter._take("small_down", as_matrix(tensors["lokr_w1_b"]))
        else:
            adapter._take("small", as_matrix(tensors["lokr_w1"]))
        if large_low:
            up, down = as_matrix(tensors["lokr_w2_a"]), tensors["lokr_w2_b"].detach().float()
            core = tensors.get("lokr_t2")
            if core is not None:  # Tucker: the core folded into down, `w2_a` stored as (r, k)
                down = torch.einsum("ijkl,jn->inkl", core.detach().float(), as_matrix(down))
                up = up.T
            adapter._take("large_up", up)
            adapter._take("large_down", down)
        else:
            adapter._take("large", tensors["lokr_w2"].detach().float())
        adapter.read_magnitude(tensors)
        return adapter

    def _take(self, name: str, value: Tensor) -> None:
        parameter = getattr(self, name)
        if value.numel() != parameter.numel():
            raise ValueError(f"LoKr's {name} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")
        parameter.data = value.reshape(parameter.shape).contiguous()

    def live_rank(self) -> int | None:
        return self.plan.rank_large or None


def plan_lokr(spec: LokrSpec, shape: Shape, groups: int) -> LokrPlan:
    """The factors of one weight, as LyCORIS chooses them; low rank only where that saves numbers."""
    l, k = factorization(shape[0], spec.factor)
    m, n = factorization(shape[1], spec.factor)
    if spec.unbalanced:
        l, k = k, l
    small = spec.rank if spec.decompose_both and spec.rank < max(l, m) / 2 else 0
    large = spec.rank if spec.low_rank and spec.rank < max(k, n * shape_size(shape[2:])) / 2 else 0
    note = "" if large or not spec.low_rank else f"rank {spec.rank} saves nothing here; the large factor is whole"
    scaled = bool(small or large)
    return LokrPlan(
        out_small=l,
        in_small=m,
        rank_small=small,
        rank_large=large,
        scale=spec.alpha / spec.rank if scaled else 1.0,
        alpha=spec.alpha if scaled else 1.0,
        note=note,
    )


def build_lokr(plan: LokrPlan, weight: Tensor, groups: int, generator: torch.Generator) -> Lokr:
    """A fresh LoKr: C uniform as Kaiming's, M (or its up factor) zero."""
    adapter = Lokr(weight.shape, plan)
    for name in ("small", "small_up", "small_down", "large_down"):
        parameter = getattr(adapter, name, None)
        if parameter is not None:
            bound = 1.0 / math.sqrt(shape_size(parameter.shape[1:]))
            parameter.data.uniform_(-bound, bound, generator=generator)
    return adapter


register(
    Method(
        name="lokr",
        title="LoKr",
        summary="Full-rank changes; faithful to one subject.",
        spec=LokrSpec,
        adapter=Lokr,
        plan=plan_lokr,
        build=build_lokr,
        recognises=lambda leaves: bool(leaves & {"lokr_w1", "lokr_w1_a"} and leaves & {"lokr_w2", "lokr_w2_a"}),
    )
)
