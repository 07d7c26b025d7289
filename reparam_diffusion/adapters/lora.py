"""LoRA: ΔW = (α/r) B A.  Hu et al. 2021, arXiv:2106.09685, eq. 3.  DoRA: Liu et al. 2024, arXiv:2402.09353, eq. 5."""

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
    as_filters,
    as_matrix,
    is_thin,
    register,
    shape_size,
)


class LoraSpec(Spec):
    """A low-rank update: the plain, small, fast one that every program opens."""

    method: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=1024)
    """Rank of the update. Higher learns more and makes a larger file."""
    alpha: float = Field(16.0, gt=0, le=4096)
    """Strength of the update: it is scaled by alpha / rank."""
    conv_rank: int = Field(0, ge=0, le=1024)
    """Rank for 3x3 convolutions; 0 uses the rank above."""
    conv_alpha: float = Field(0.0, ge=0, le=4096)
    """Alpha for 3x3 convolutions; 0 uses the alpha above."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Chance that a low-rank activation is dropped while training."""
    rank_dropout: float = Field(0.0, ge=0, lt=1)
    """Chance that a whole rank is dropped for a picture while training."""
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Chance that a layer's update is skipped for a picture while training."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), so that high ranks learn as fast as low ones."""
    weight_decompose: bool = False
    """Learn direction and magnitude apart (DoRA). Closer to full fine-tuning, slower, and few programs read it."""


@dataclass(frozen=True)
class LoraPlan(Plan):
    """One site's rank and scale; `alpha` is already what a plain α/r needs (rsLoRA folded in)."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    weight_decompose: bool = False
    note: str = ""


class Lora(Adapter):
    """`down` (r, in, *kernel) and `up` (out, r)."""

    name = "lora"
    plan: LoraPlan

    def __init__(self, shape: Sequence[int], plan: LoraPlan) -> None:
        super().__init__(shape, plan)
        self.down = nn.Parameter(torch.zeros(plan.rank, *self.shape[1:]))  # (r, in, *kernel)
        self.up = nn.Parameter(torch.zeros(self.shape[0], plan.rank))  # (out, r)

    @property
    def scale(self) -> float:
        return self.plan.alpha / self.plan.rank

    def update(self, weight: Tensor) -> Tensor:
        return self.scale * (self.up.to(weight.dtype) @ self.down.flatten(1).to(weight.dtype)).reshape(self.shape)

    def is_cheap(self, host: Host, rows: int) -> bool:
        return self._drops() or is_thin(self.shape, self.plan.rank, rows)

    def _drops(self) -> bool:
        """Whether something is dropped now, which only the low-rank path can do."""
        plan = self.plan
        return self.draw is not None and max(plan.dropout, plan.rank_dropout, plan.module_dropout) > 0

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up if self.scale == 1.0 else self.up * self.scale

    def between(self, h: Tensor, host: Host) -> Tensor:
        """Dropout on the low-rank activations h (batch, …, r) or (batch, r, height, width)."""
        plan, draw = self.plan, self.draw
        if draw is None or not self._drops():
            return h
        h = host.channels_last(h)
        ones = (1,) * (h.ndim - 2)
        if plan.dropout:
            h = h * draw.keep_mask(self.site, "dropout", tuple(h.shape[1:]), drop=plan.dropout).to(h)
        if plan.rank_dropout:
            h = h * draw.keep_mask(self.site, "rank", (*ones, plan.rank), drop=plan.rank_dropout).to(h)
        if plan.module_dropout:
            mask = draw.keep_mask(self.site, "module", (*ones, 1), drop=plan.module_dropout)
            h = h * (mask > 0).to(h)
        return host.channels_back(h)

    def tensors(self) -> dict[str, Tensor]:
        kernel = (1,) * (len(self.shape) - 2)
        leaves = self.written(alpha=self.plan.alpha)
        leaves["lora_down.weight"] = self.down.detach().float().contiguous()
        leaves["lora_up.weight"] = self.up.detach().float().reshape(*self.up.shape, *kernel).contiguous()
        return leaves

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Self:
        down, up, mid = tensors["lora_down.weight"], tensors["lora_up.weight"], tensors.get("lora_mid.weight")
        rank = down.shape[0]
        if mid is not None:  # Tucker: up · mid · down, the core folded into down
            core = torch.einsum("mnij,nc->mcij", mid.detach().float(), as_matrix(down))
            down = core.reshape(mid.shape[0], *tuple(shape)[1:])
        matrix = as_matrix(up)
        if matrix.shape != (shape[0], down.shape[0]):
            raise ValueError(f"lora_up has shape {tuple(up.shape)} for a weight of {tuple(shape)} and rank {rank}")
        adapter = cls(shape, LoraPlan(rank=down.shape[0], alpha=alpha_of(tensors, rank) * down.shape[0] / rank))
        adapter.down.data = as_filters(down, adapter.shape)
        adapter.up.data = matrix.contiguous()
        adapter.read_magnitude(tensors)
        return adapter


def settled_rank(rank: int, shape: Shape) -> tuple[int, str]:
    """The rank that this layer can hold, and a note when that is less than asked."""
    most = min(shape[0], shape_size(shape[1:]))
    return (rank, "") if rank <= most else (most, f"rank {rank} is more than this layer has; {most} is used")


def plan_lora(spec: LoraSpec, shape: Shape, groups: int) -> LoraPlan:
    """Rank and alpha for one weight; a rank above the layer's is cut with α/r kept."""
    spatial = shape_size(shape[2:]) > 1
    asked = (spec.conv_rank or spec.rank) if spatial else spec.rank
    alpha = (spec.conv_alpha or spec.alpha) if spatial else spec.alpha
    scale = alpha / math.sqrt(asked) if spec.rank_stabilized else alpha / asked
    rank, note = settled_rank(asked, shape)
    return LoraPlan(
        rank=rank,
        alpha=scale * rank,
        dropout=spec.dropout,
        rank_dropout=spec.rank_dropout,
        module_dropout=spec.module_dropout,
        weight_decompose=spec.weight_decompose,
        note=note,
    )


def build_lora(plan: LoraPlan, weight: Tensor, groups: int, generator: torch.Generator) -> Lora:
    """A fresh LoRA: A uniform as Kaiming's, B zero."""
    adapter = Lora(weight.shape, plan)
    bound = 1.0 / math.sqrt(shape_size(weight.shape[1:]))
    adapter.down.data.uniform_(-bound, bound, generator=generator)
    if plan.weight_decompose:
        adapter.decompose(weight)
    return adapter


register(
    Method(
        name="lora",
        title="LoRA",
        summary="The all-rounder: every program opens it.",
        spec=LoraSpec,
        adapter=Lora,
        plan=plan_lora,
        build=build_lora,
        recognises=lambda leaves: {"lora_down.weight", "lora_up.weight"} <= leaves,
    )
)
