"""LoHa: ΔW = (α/r) (B₁A₁) ∘ (B₂A₂).  Hyeon-Woo et al. 2022, arXiv:2108.06098, Prop. 1."""

from __future__ import annotations

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
    as_filters,
    as_matrix,
    register,
    shape_size,
)


class LohaSpec(Spec):
    """A product of two low-rank updates: up to rank r² from 2r rows."""

    method: Literal["loha"] = "loha"
    rank: int = Field(8, ge=1, le=256)
    """Rank of each half. The update can reach the square of it."""
    alpha: float = Field(8.0, gt=0, le=4096)
    """Strength of the update: it is scaled by alpha / rank."""
    conv_rank: int = Field(0, ge=0, le=256)
    """Rank for 3x3 convolutions; 0 uses the rank above."""
    conv_alpha: float = Field(0.0, ge=0, le=4096)
    """Alpha for 3x3 convolutions; 0 uses the alpha above."""


@dataclass(frozen=True)
class LohaPlan(Plan):
    rank: int
    alpha: float
    note: str = ""


class Loha(Adapter):
    """Two halves, each `up` (out, r) and `down` (r, in, *kernel)."""

    name = "loha"
    plan: LohaPlan

    def __init__(self, shape: Sequence[int], plan: LohaPlan) -> None:
        super().__init__(shape, plan)
        out, r = self.shape[0], plan.rank
        self.up_1 = nn.Parameter(torch.zeros(out, r))
        self.down_1 = nn.Parameter(torch.zeros(r, *self.shape[1:]))
        self.up_2 = nn.Parameter(torch.zeros(out, r))
        self.down_2 = nn.Parameter(torch.zeros(r, *self.shape[1:]))

    @property
    def scale(self) -> float:
        return self.plan.alpha / self.plan.rank

    def update(self, weight: Tensor) -> Tensor:
        halves = [
            up.to(weight.dtype) @ down.flatten(1).to(weight.dtype)
            for up, down in ((self.up_1, self.down_1), (self.up_2, self.down_2))
        ]
        return (self.scale * halves[0] * halves[1]).reshape(self.shape)

    def is_cheap(self, host: Host, rows: int) -> bool:
        """Face-splitting costs r² (in + out) a row three times over, building r² rows twice; dense in · out."""
        r, out, entry = self.plan.rank**2, self.shape[0], shape_size(self.shape[1:])
        split = 3 * r * (entry + out) * rows + 6 * r * (entry + out)
        dense = 3 * entry * out * rows + 10 * entry * out * self.plan.rank
        return split < dense

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(B₁A₁)∘(B₂A₂) = Σᵢⱼ (b₁ᵢ∘b₂ⱼ)(a₁ᵢ∘a₂ⱼ)ᵀ: a plain low-rank product of rank r² (face-splitting)."""
        down = (self.down_1[:, None] * self.down_2[None]).flatten(0, 1)  # (r², in, *kernel)
        up = (self.up_1[:, :, None] * (self.up_2 * self.scale)[:, None, :]).flatten(1)  # (out, r²)
        return down, up

    def tensors(self) -> dict[str, Tensor]:
        return self.written(
            alpha=self.plan.alpha,
            hada_w1_a=self.up_1,
            hada_w1_b=self.down_1.flatten(1),
            hada_w2_a=self.up_2,
            hada_w2_b=self.down_2.flatten(1),
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Self:
        rank = tensors["hada_w1_b"].shape[0]
        adapter = cls(shape, LohaPlan(rank=rank, alpha=alpha_of(tensors, rank)))
        for half in (1, 2):
            up, down = tensors[f"hada_w{half}_a"].detach().float(), tensors[f"hada_w{half}_b"].detach().float()
            core = tensors.get(f"hada_t{half}")
            if (
                core is not None
            ):  # Tucker: Σ t[i, j] a[i, out] b[j, in]: the core folded into down, `a` stored as (r, out)
                down = torch.einsum("ijkl,jn->inkl", core.detach().float(), as_matrix(down))
                up = as_matrix(up).T
            if as_matrix(up).shape != (adapter.shape[0], rank):
                raise ValueError(f"hada_w{half}_a has shape {tuple(up.shape)} for a weight of {adapter.shape}")
            getattr(adapter, f"up_{half}").data = as_matrix(up).contiguous()
            getattr(adapter, f"down_{half}").data = as_filters(down, adapter.shape)
        adapter.read_magnitude(tensors)
        return adapter


def plan_loha(spec: LohaSpec, shape: Shape, groups: int) -> LohaPlan:
    """Rank and alpha for one weight; a rank whose square is more than twice the layer's is cut with α/r kept."""
    spatial = shape_size(shape[2:]) > 1
    asked = (spec.conv_rank or spec.rank) if spatial else spec.rank
    alpha = (spec.conv_alpha or spec.alpha) if spatial else spec.alpha
    most = min(shape[0], shape_size(shape[1:]))
    rank = min(asked, most)
    note = "" if rank == asked else f"rank {asked} is more than this layer has; {rank} is used"
    return LohaPlan(rank=rank, alpha=alpha / asked * rank, note=note)


def build_loha(plan: LohaPlan, weight: Tensor, groups: int, generator: torch.Generator) -> Loha:
    """A fresh LoHa: the second half's `up` is zero, the rest normal (1, 0.1, 1 as in LyCORIS)."""
    adapter = Loha(weight.shape, plan)
    adapter.down_1.data.normal_(std=1.0, generator=generator)
    adapter.up_1.data.normal_(std=0.1, generator=generator)
    adapter.down_2.data.normal_(std=1.0, generator=generator)
    return adapter


register(
    Method(
        name="loha",
        title="LoHa",
        summary="Rich styles and details from a small file.",
        spec=LohaSpec,
        adapter=Loha,
        plan=plan_loha,
        build=build_loha,
        recognises=lambda leaves: {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= leaves,
    )
)
