"""The form of a result: exact where possible, or compressed to a method, a rank, a size or a share of the energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from reparam_diffusion.adapters.adalora import Adalora, AdaloraPlan
from reparam_diffusion.adapters.base import METHODS, Adapter
from reparam_diffusion.adapters.foreign import Full, Stack
from reparam_diffusion.adapters.loha import Loha, LohaPlan
from reparam_diffusion.adapters.lokr import Lokr, LokrPlan
from reparam_diffusion.adapters.lora import Lora, LoraPlan
from reparam_diffusion.adapters.oft import Oft, OftPlan, OftSpec, plan_oft
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.changes import change_of
from reparam_diffusion.formats.write import is_own
from reparam_diffusion.maths import lowrank
from reparam_diffusion.maths.change import Change
from reparam_diffusion.maths.kronecker import factorization, nearest_kronecker
from reparam_diffusion.maths.orthogonal import inverse_cayley, nearest_rotation, triangle_from_skew

Kind = Literal["exact", "lora", "adalora", "loha", "lokr", "oft", "diff"]
RANKED = ("lora", "adalora", "loha")


class Form(BaseModel):
    """How the result is held. Every form but the exact ones tells what it loses."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Kind = "exact"
    """exact: LoRA where that is smaller, whole differences else. diff: whole differences. The rest: the nearest one."""
    rank: int = Field(0, ge=0, le=4096)
    """Most ranks a layer may have (AdaLoRA: on average); 0 sets no limit."""
    energy: float = Field(0.0, ge=0, le=1)
    """Share of each layer's energy (Σσ²) to keep, such as 0.95; 0 sets no rule."""
    megabytes: float = Field(0.0, ge=0)
    """The file's size; ranks go where they keep the most. 0 sets no rule."""
    sv_ratio: float = Field(0.0, ge=0)
    """Keep singular values of at least the largest over this."""
    sv_fro: float = Field(0.0, ge=0, le=1)
    """Share of each layer's norm to keep."""
    sv_cumulative: float = Field(0.0, ge=0, le=1)
    """Share of each layer's sum of singular values to keep."""
    factor: int = Field(8, ge=-1, le=256)
    """LoKr: size of the small factor."""
    block_size: int = Field(8, ge=2, le=256)
    """OFT: size of the rotated blocks."""

    @model_validator(mode="after")
    def _says_how_many_ranks(self) -> Self:
        rules = self._rules()
        if self.kind in RANKED and not (self.rank or any(rules)):
            raise ValueError(f"{self.kind} needs a rank, an energy, a size, or one of the sv_ rules")
        if sum(map(bool, rules)) > 1:
            raise ValueError("choose one of energy, megabytes, sv_ratio, sv_fro and sv_cumulative")
        if self.kind == "adalora" and not self.rank:
            raise ValueError("adalora needs a rank: the average over the layers")
        return self

    def _rules(self) -> tuple[float, ...]:
        return (self.energy, self.megabytes, self.sv_ratio, self.sv_fro, self.sv_cumulative)

    @property
    def has_rules(self) -> bool:
        """Whether more than a number of ranks decides what a layer keeps."""
        return any(self._rules())

    @property
    def shares_ranks(self) -> bool:
        """Whether a layer's rank depends on the other layers, so that all must be seen first."""
        return self.kind in RANKED and (self.kind == "adalora" or self.megabytes > 0)

    def rank_for(self, values: Tensor) -> int:
        """The rank that the rules give a layer with these singular values."""
        rank = int((values > 0).sum())
        if self.energy:
            rank = lowrank.rank_for_energy(values, self.energy)
        elif self.sv_fro:
            rank = lowrank.rank_for_norm(values, self.sv_fro)
        elif self.sv_cumulative:
            rank = lowrank.rank_for_sum(values, self.sv_cumulative)
        elif self.sv_ratio:
            rank = lowrank.rank_for_ratio(values, self.sv_ratio)
        return min(rank, self.rank) if self.rank else rank


@torch.no_grad()
def in_form(made: Change | Adapter, form: Form, module: nn.Module, *, rank: int | None = None) -> Adapter | None:
    """A layer's result as an adapter in the wanted form; None where nothing is left to change.

    `rank` is the layer's, where ranks are shared over all layers. What a form cannot hold stays a whole difference:
    norm layers, and biases beside their layer.
    """
    if isinstance(made, Adapter):
        if form.kind == "exact":
            return made
        made = change_of(made, module)
    if made.up is not None and made.up.shape[1] == 0 and made.bias is None:
        return None
    if len(made.shape) == 1 or form.kind == "diff" or (form.kind == "exact" and not _is_thin(made)):
        return _whole(made)
    return _with_bias(_BUILD[form.kind](made, form, module, rank), made)


def as_product(change: Change) -> Adapter | None:
    """A change's own factors as a LoRA, with its bias beside it; None where it changes nothing."""
    assert change.up is not None and change.down is not None
    return _with_bias(lora_of(change.shape, change.up, change.down), change)


def _with_bias(adapter: Adapter | None, change: Change) -> Adapter | None:
    if change.bias is None:
        return adapter
    added = Full(change.shape, None, change.bias)
    return added if adapter is None else Stack(change.shape, [adapter, added])


def _is_thin(change: Change) -> bool:
    return change.up is not None and change.up.shape[1] <= change.cut()


def _whole(change: Change) -> Adapter | None:
    if change.up is not None and change.up.shape[1] == 0 and change.bias is None:
        return None
    return Full(change.shape, change.matrix().reshape(change.shape), change.bias)


def _exact(change: Change, form: Form, module: nn.Module, rank: int | None) -> Adapter | None:
    assert change.up is not None and change.down is not None
    return lora_of(change.shape, change.up, change.down)


def lora_of(shape: tuple[int, ...], up: Tensor, down: Tensor) -> Lora | None:
    """A LoRA of a product; None of rank 0."""
    rank = up.shape[1]
    if rank == 0:
        return None
    adapter = Lora(shape, LoraPlan(rank, float(rank)))
    adapter.up.data, adapter.down.data = up.contiguous(), down.reshape(rank, *shape[1:]).contiguous()
    return adapter


def _triplets(change: Change, form: Form, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    most = rank if rank is not None else (0 if form.has_rules else form.rank)
    left, values, right = lowrank.svd(change, most=most)
    count = form.rank_for(values) if rank is None else rank
    return left[:, :count], values[:count], right[:count]


def _lora(change: Change, form: Form, module: nn.Module, rank: int | None) -> Adapter | None:
    left, values, right = _triplets(change, form, rank)
    return lora_of(change.shape, *lowrank.shared(left, values, right, len(values)))


def _adalora(change: Change, form: Form, module: nn.Module, rank: int | None) -> Adapter | None:
    """P Λ Qᵀ with the singular values as Λ."""
    left, values, right = _triplets(change, form, rank)
    count = len(values)
    if count == 0:
        return None
    plan = AdaloraPlan(
        rank=count, init_rank=count, target_rank=count, alpha=float(count), t_init=0.0, t_final=0.0, interval=1,
        beta1=0.85, beta2=0.85, orthogonality=0.0,
    )  # fmt: skip
    adapter = Adalora(change.shape, plan)
    adapter.left.data, adapter.values.data = left.contiguous(), values.contiguous()
    adapter.right.data = right.reshape(count, *change.shape[1:]).contiguous()
    return adapter


def _loha(change: Change, form: Form, module: nn.Module, rank: int | None) -> Adapter | None:
    """A LoHa whose second half is all ones holds any product of its rank."""
    left, values, right = _triplets(change, form, rank)
    count = len(values)
    if count == 0:
        return None
    up, down = lowrank.shared(left, values, right, count)
    adapter = Loha(change.shape, LohaPlan(count, float(count)))
    adapter.up_1.data, adapter.down_1.data = up, down.reshape(count, *change.shape[1:]).contiguous()
    adapter.up_2.data[:, 0] = 1.0
    adapter.down_2.data[0] = 1.0
    return adapter


def _lokr(change: Change, form: Form, module: nn.Module, rank: int | None) -> Adapter | None:
    """The nearest C ⊗ M with M whole."""
    out, entry = change.shape[:2]
    l, m = factorization(out, form.factor)[0], factorization(entry, form.factor)[0]
    adapter = Lokr(change.shape, LokrPlan(l, m, 0, 0, 1.0, 1.0))
    small, large = nearest_kronecker(change.matrix(), change.shape, l, m)
    adapter.small.data, adapter.large.data = small, large
    return adapter


def _oft(change: Change, form: Form, module: nn.Module, rank: int | None) -> Adapter | None:
    """The rotations R of the outputs with R W nearest to W + ΔW, block by block (orthogonal Procrustes)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        raise UserError("A rotation turns the base model's weights.", do="Name the base model with --model.")
    before = weight.detach().double().cpu().flatten(1)
    after = before + change.matrix().double()
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    plan = plan_oft(OftSpec(block_size=form.block_size), change.shape, groups)
    size = plan.block_size
    turned = nearest_rotation(before.reshape(-1, size, before.shape[1]), after.reshape(-1, size, before.shape[1]))
    adapter = Oft(change.shape, OftPlan(size, plan.blocks, "output", 0.0))
    adapter.triangle.data = triangle_from_skew(-inverse_cayley(turned)).float()
    return adapter


_BUILD: dict[str, Callable[[Change, Form, nn.Module, int | None], Adapter | None]] = {
    "exact": _exact, "lora": _lora, "adalora": _adalora, "loha": _loha, "lokr": _lokr, "oft": _oft,
}  # fmt: skip


def form_name(adapter: Adapter | None) -> str:
    """What a layer became, for a person."""
    if adapter is None:
        return "nothing"
    if isinstance(adapter, Stack):
        return " + ".join(form_name(inner) for inner in adapter.inner())
    if not is_own(adapter) and not isinstance(adapter, Full):
        return "whole difference"  # a form that is only read
    if isinstance(adapter, Full):
        return "whole difference" if adapter.diff is not None else "bias"
    if isinstance(adapter, Oft):
        return f"OFT, blocks of {adapter.plan.block_size}"
    rank, title = adapter.live_rank(), METHODS[adapter.name].title if adapter.name in METHODS else adapter.name
    return title if rank is None else f"{title}, rank {rank}"
