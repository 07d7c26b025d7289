"""OFT: W' = blockdiag(R)ᵀ W (outputs) or W blockdiag(R)ᵀ (inputs), R orthogonal.  Qiu et al. 2023, arXiv:2306.07280.

Outputs is LyCORIS's diag-oft: Q = B − Bᵀ, R = (I + Q)(I − Q)⁻¹; R's first index meets W's rows, hence the transpose.
Inputs is the paper's and PEFT's: R = (I − Q)(I + Q)⁻¹, which keeps the angles between neurons (rows of W).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from reparam_diffusion.adapters.base import Adapter, Host, Method, Plan, Shape, Spec, alpha_of, register
from reparam_diffusion.maths.kronecker import largest_divisor
from reparam_diffusion.maths.orthogonal import (
    cayley_turn,
    clipped,
    rotate_blocks,
    skew_from_triangle,
    triangle_from_skew,
    turn_outputs,
)

UNCONSTRAINED = 1000.0
"""What readers take as alpha for "no constraint": a limit that no rotation reaches."""


class OftSpec(Spec):
    """Rotations of the weights: keeps what the model knows while it learns."""

    method: Literal["oft"] = "oft"
    block_size: int = Field(8, ge=2, le=256)
    """Size of the rotated blocks. Larger learns more and makes a larger file."""
    side: Literal["output", "input"] = "output"
    """Rotate the outputs (opens in other programs) or the inputs (the paper's; opens in PEFT)."""
    constraint: float = Field(0.0, ge=0, le=1)
    """Largest rotation, as a share of the layer's outputs; 0 means no limit."""


@dataclass(frozen=True)
class OftPlan(Plan):
    block_size: int
    blocks: int
    side: Literal["output", "input"]
    limit: float
    """Largest norm of Q over all blocks; 0 for none."""
    note: str = ""


class Oft(Adapter):
    """`triangle` (blocks, b(b−1)/2): the upper triangle of each block's skew-symmetric Q."""

    name = "oft"
    plan: OftPlan

    def __init__(self, shape: Sequence[int], plan: OftPlan) -> None:
        super().__init__(shape, plan)
        size = plan.block_size
        self.triangle = nn.Parameter(torch.zeros(plan.blocks, size * (size - 1) // 2))
        self.rescale: Tensor | None  # (out,), of a foreign file
        self.register_buffer("rescale", None)

    def skew(self) -> Tensor:
        """Q (blocks, b, b) within its limit."""
        return clipped(skew_from_triangle(self.triangle, self.plan.block_size), self.plan.limit)

    def turn(self) -> Tensor:
        """What the blocks do to a column of their side, minus the identity: Rᵀ − I (blocks, b, b).

        Outputs: W' = Rᵀ W with R = (I + Q)(I − Q)⁻¹, so Rᵀ = cayley(−Q). Inputs: W' x = W (Rᵀ x) with
        R = (I − Q)(I + Q)⁻¹, so Rᵀ = cayley(Q).
        """
        skew = self.skew()
        return cayley_turn(-skew if self.plan.side == "output" else skew)

    def update(self, weight: Tensor) -> Tensor:
        turn = self.turn().to(weight.dtype)
        if self.plan.side == "output":
            change = rotate_blocks(turn, weight.movedim(0, -1)).movedim(-1, 0)
            if self.rescale is not None:
                scale = self.rescale.to(weight).reshape(-1, *[1] * (weight.ndim - 1))
                change = scale * (weight + change) - weight
            return change
        # W (I + turn): column j of each group's slice meets the block that holds its channel.
        groups = self.plan.blocks * self.plan.block_size // self.shape[1]
        rows = weight.reshape(groups, self.shape[0] // groups, *self.shape[1:])
        blocks = turn.reshape(groups, -1, *turn.shape[1:])
        changed = [
            rotate_blocks(part.transpose(1, 2), row.movedim(1, -1)).movedim(-1, 1)
            for part, row in zip(blocks, rows, strict=True)
        ]
        return torch.cat(changed).reshape(weight.shape)

    @property
    def reads_weight(self) -> bool:
        return True

    @property
    def reads_output(self) -> bool:
        return self.plan.side == "output" or self.magnitude is not None

    def quick(self, x: Tensor, y: Tensor, host: Host) -> Tensor | None:
        """Rᵀ(W x) = (RᵀW) x: the rotation of the host's own output."""
        if self.plan.side != "output" or self.shape[0] // host.groups % self.plan.block_size:
            return None  # a block that spans two groups mixes rows of W that see different channels
        before = host.channels_last(host.without_bias(y))
        added = rotate_blocks(self.turn().to(y.dtype), before)
        if self.rescale is not None:
            added = self.rescale.to(y.dtype) * (before + added) - before
        return host.channels_back(added)

    def onto(self, total: Tensor, x: Tensor, y: Tensor, host: Host, strength: Tensor) -> Tensor | None:
        """On the base's own output the rotation goes by itself, in less memory."""
        plain = self.plan.side == "output" and self.magnitude is None and self.rescale is None
        if plain and host.kind == "linear" and total is y:
            return turn_outputs(y, self.turn() * strength, host.bias)
        return super().onto(total, x, y, host, strength)

    def shift(self, x: Tensor, host: Host) -> Tensor | None:
        """W Rᵀ x: the rotation of the host's own input."""
        if self.plan.side != "input" or self.magnitude is not None:
            return None
        return host.channels_back(rotate_blocks(self.turn().to(x.dtype), host.channels_last(x)))

    def tensors(self) -> dict[str, Tensor]:
        """Outputs: LyCORIS's oft_blocks, limit folded in. Inputs: PEFT's oft_R (Linear, 1x1), or ours."""
        skew = self.skew()
        if self.plan.side == "input":
            spatial = len(self.shape) > 2 and self.shape[2] * self.shape[3] > 1
            leaf = "oft_R_channels.weight" if spatial else "oft_R.weight"
            return self.written(**{leaf: triangle_from_skew(skew)})
        leaves = self.written(alpha=UNCONSTRAINED, oft_blocks=torch.triu(skew, 1))
        if self.rescale is not None:
            leaves["rescale"] = self.rescale.detach().float().reshape(-1, *[1] * (len(self.shape) - 1))
        return leaves

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Self:
        if "oft_blocks" not in tensors:
            return cls._from_input_side(tensors, shape)
        blocks = tensors["oft_blocks"].detach().float()
        if blocks.ndim != 3 or blocks.shape[0] * blocks.shape[1] != shape[0]:
            raise ValueError(f"oft_blocks has shape {tuple(blocks.shape)} for a weight of {tuple(shape)}")
        limit = alpha_of(tensors, 0) * shape[0]
        adapter = cls(shape, OftPlan(blocks.shape[1], blocks.shape[0], "output", max(limit, 0.0)))
        adapter.triangle.data = triangle_from_skew(blocks - blocks.transpose(1, 2)).contiguous()
        if "rescale" in tensors:
            if tensors["rescale"].numel() != shape[0]:
                raise ValueError(f"rescale has {tensors['rescale'].numel()} values for {shape[0]} outputs")
            adapter.rescale = tensors["rescale"].detach().float().flatten()
        adapter.read_magnitude(tensors)
        return adapter

    @classmethod
    def _from_input_side(cls, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Self:
        leaf = next(name for name in ("oft_R.weight", "oft_R_channels.weight") if name in tensors)
        triangle = tensors[leaf].detach().float()
        size = round((1 + (1 + 8 * triangle.shape[1]) ** 0.5) / 2)
        if triangle.shape[0] * size % shape[1]:
            raise ValueError(f"{leaf} has shape {tuple(triangle.shape)} for a weight of {tuple(shape)}")
        adapter = cls(shape, OftPlan(size, triangle.shape[0], "input", 0.0))
        adapter.triangle.data = triangle.contiguous()
        adapter.read_magnitude(tensors)
        return adapter


def plan_oft(spec: OftSpec, shape: Shape, groups: int) -> OftPlan:
    """Blocks that divide the side evenly; on the outputs, as readers want it: their size is at most their number."""
    if spec.side == "output":
        rows = shape[0] // groups
        size = largest_divisor(rows, min(spec.block_size, math.isqrt(rows)))
        blocks = shape[0] // size
        limit = spec.constraint * shape[0]
    else:
        size = largest_divisor(shape[1], spec.block_size)
        blocks = shape[1] * groups // size
        limit = spec.constraint * shape[1] * groups
    note = "" if size == spec.block_size else f"block size {spec.block_size} does not fit here; {size} is used"
    if size == 1:
        note += ", which leaves the layer as it is"
    return OftPlan(block_size=size, blocks=blocks, side=spec.side, limit=limit, note=note)


def build_oft(plan: OftPlan, weight: Tensor, groups: int, generator: torch.Generator) -> Oft:
    """A fresh OFT: no rotation."""
    return Oft(weight.shape, plan)


def go_on_oft(plan: OftPlan, read: Adapter, generator: torch.Generator) -> Oft:
    """The file's rotation within its own limit; one that has its limit folded in takes up the settings'.

    That is never so narrow that it would turn the file's rotation back.
    """
    if not isinstance(read, Oft):
        raise ValueError(f"it is {read.name} there")
    limit = read.plan.limit
    if not 0 < limit < UNCONSTRAINED * read.shape[0]:
        limit = max(plan.limit, float(read.skew().detach().norm())) if plan.limit else 0.0
    read.plan = replace(read.plan, limit=limit)
    return read


register(
    Method(
        name="oft",
        title="OFT",
        summary="Learns by rotation; keeps other skills best.",
        spec=OftSpec,
        adapter=Oft,
        plan=plan_oft,
        build=build_oft,
        recognises=lambda leaves: "oft_blocks" in leaves or bool(leaves & {"oft_R.weight", "oft_R_channels.weight"}),
    )
)
