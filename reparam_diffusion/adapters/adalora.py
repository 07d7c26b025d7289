"""AdaLoRA: ΔW = (α/r_init) P Λ Q, ranks shared out by importance.  Zhang et al. 2023, arXiv:2303.10512, eq. 3 to 12."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from reparam_diffusion.adapters.base import Adapter, Host, Method, Plan, Shape, Spec, is_thin, register
from reparam_diffusion.adapters.lora import Lora, settled_rank


class AdaloraSpec(Spec):
    """A low-rank update that moves its ranks to the layers that need them."""

    method: Literal["adalora"] = "adalora"
    init_rank: int = Field(12, ge=1, le=256)
    """Rank of every layer at the start."""
    target_rank: int = Field(8, ge=1, le=256)
    """Average rank of a layer at the end."""
    alpha: float = Field(12.0, gt=0, le=4096)
    """Strength of the update: it is scaled by alpha / initial rank."""
    t_init: float = Field(0.1, ge=0, lt=1)
    """Share of the steps before the first rank is taken away."""
    t_final: float = Field(0.35, ge=0, lt=1)
    """Share of the steps at the end with the ranks fixed."""
    interval: int = Field(0, ge=0, le=10000)
    """Steps between two rank decisions; 0 takes a hundredth of the run."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Smoothing of the sensitivity."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Smoothing of the uncertainty."""
    orthogonality: float = Field(0.5, ge=0, le=10)
    """Weight of the penalty that keeps the directions orthogonal."""


@dataclass(frozen=True)
class AdaloraPlan(Plan):
    """`rank` is this site's initial rank, `init_rank` the one in the scale for ever; the schedule is the run's."""

    rank: int
    init_rank: int
    target_rank: int
    alpha: float
    t_init: float
    t_final: float
    interval: int
    beta1: float
    beta2: float
    orthogonality: float
    note: str = ""

    def finished(self) -> AdaloraPlan:
        """On average; the layers share the ranks out among themselves."""
        return replace(self, rank=min(self.rank, self.target_rank))


class Adalora(Adapter):
    """`left` P (out, r), `values` Λ (r), `right` Q (r, in, *kernel), and what the allocation remembers of each."""

    name = "adalora"
    plan: AdaloraPlan

    def __init__(self, shape: Sequence[int], plan: AdaloraPlan) -> None:
        super().__init__(shape, plan)
        r = plan.rank
        self.left = nn.Parameter(torch.zeros(self.shape[0], r))
        self.values = nn.Parameter(torch.zeros(r))
        self.right = nn.Parameter(torch.zeros(r, *self.shape[1:]))
        self.alive: Tensor  # (r,) of bool: what the last allocation kept
        self.register_buffer("alive", torch.ones(r, dtype=torch.bool))
        for name, parameter in (("left", self.left), ("values", self.values), ("right", self.right)):
            self.register_buffer(f"{name}_sensitivity", torch.zeros_like(parameter.data))
            self.register_buffer(f"{name}_uncertainty", torch.zeros_like(parameter.data))

    @property
    def scale(self) -> float:
        return self.plan.alpha / self.plan.init_rank

    def update(self, weight: Tensor) -> Tensor:
        left, right = self.left.to(weight.dtype), self.right.flatten(1).to(weight.dtype)
        return ((left * (self.values.to(weight.dtype) * self.scale)) @ right).reshape(self.shape)

    def is_cheap(self, host: Host, rows: int) -> bool:
        return is_thin(self.shape, self.plan.rank, rows)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """P (Λ (Q x)): Λ goes into P, which is small."""
        return self.right, self.left * (self.values * self.scale)

    def live_rank(self) -> int | None:
        return int((self.values != 0).sum()) if bool(self.values.any()) else int(self.alive.sum())

    def settle(self) -> None:
        """Ranks that were taken away stay away, also in a moving average."""
        self.values.data *= self.alive

    def tensors(self) -> dict[str, Tensor]:
        """The LoRA it equals: live ranks only, halves balanced, alpha 1 with the scale folded in; empty at rank 0."""
        keep = self.values.detach() != 0
        if not bool(keep.any()):  # not trained yet: the ranks it has, at zero
            keep = self.alive
        rank = int(keep.sum())
        if rank == 0:
            return {}
        root = self.values.detach()[keep].abs().sqrt()
        kernel = (1,) * (len(self.shape) - 2)
        up = self.left.detach()[:, keep] * root * self.values.detach()[keep].sign() * (self.scale * rank)
        down = self.right.detach()[keep] * root.reshape(-1, *[1] * (len(self.shape) - 1))
        leaves = self.written(alpha=1.0)
        leaves["lora_up.weight"] = up.float().reshape(self.shape[0], rank, *kernel).contiguous()
        leaves["lora_down.weight"] = down.float().contiguous()
        return leaves

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Self:
        """PEFT's lora_A (r, in), lora_E (r, 1), lora_B (out, r); `alpha` and `init_rank` from its configuration."""
        right, values, left = tensors["lora_A"], tensors["lora_E"], tensors["lora_B"]
        rank = right.shape[0]
        init_rank = int(tensors["init_rank"]) if "init_rank" in tensors else rank
        alpha = float(tensors["alpha"]) if "alpha" in tensors else float(init_rank)
        plan = AdaloraPlan(
            rank=rank,
            init_rank=init_rank,
            target_rank=rank,
            alpha=alpha * init_rank / (init_rank + 1e-5),  # PEFT divides by ranknum + 1e-5
            t_init=0.0,
            t_final=0.0,
            interval=1,
            beta1=0.85,
            beta2=0.85,
            orthogonality=0.0,
        )
        adapter = cls(shape, plan)
        adapter.right.data = right.detach().float().reshape(rank, *adapter.shape[1:])
        adapter.values.data = values.detach().float().reshape(rank)
        adapter.left.data = left.detach().float().reshape(adapter.shape[0], rank)
        return adapter


def plan_adalora(spec: AdaloraSpec, shape: Shape, groups: int) -> AdaloraPlan:
    """The same initial rank everywhere, cut to what the layer has."""
    rank, note = settled_rank(spec.init_rank, shape)
    return AdaloraPlan(
        rank=rank,
        init_rank=spec.init_rank,
        target_rank=min(spec.target_rank, spec.init_rank),
        alpha=spec.alpha,
        t_init=spec.t_init,
        t_final=spec.t_final,
        interval=spec.interval,
        beta1=spec.beta1,
        beta2=spec.beta2,
        orthogonality=spec.orthogonality,
        note=note,
    )


def build_adalora(plan: AdaloraPlan, weight: Tensor, groups: int, generator: torch.Generator) -> Adalora:
    """A fresh AdaLoRA: orthonormal P and Q, Λ = 0, so that the penalty is at its minimum and ΔW = 0."""
    adapter = Adalora(weight.shape, plan)
    left = torch.randn(adapter.left.shape, generator=generator)
    right = torch.randn(adapter.right.flatten(1).shape, generator=generator)
    adapter.left.data = torch.linalg.qr(left).Q.contiguous()
    adapter.right.data = torch.linalg.qr(right.T).Q.T.reshape(adapter.right.shape).contiguous()
    return adapter


def go_on_adalora(plan: AdaloraPlan, read: Adapter, generator: torch.Generator) -> Adalora:
    """P Λ Q of a LoRA's (or AdaLoRA's) product by its SVD, exactly; free ranks start orthogonal to it, at Λ = 0."""
    if type(read) not in (Lora, Adalora) or read.magnitude is not None:
        raise ValueError(f"it is {'DoRA' if read.magnitude is not None else read.name} there")
    factors = read.low_rank()
    assert factors is not None
    down, up = (factor.detach().double().flatten(1) for factor in factors)
    outer, core_up = torch.linalg.qr(up)
    inner, core_down = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(core_up @ core_down.T, full_matrices=False)
    kept = int((values > values.max() * torch.finfo(torch.float32).eps).sum())
    rank = max(kept, plan.rank)
    adapter = build_adalora(replace(plan, rank=rank), torch.empty(read.shape), 1, generator)
    for own, found in (
        (adapter.left.data.T, (outer @ left)[:, :kept].T),
        (adapter.right.data.flatten(1), right[:kept] @ inner.T),
    ):
        free = own.double() - own.double() @ found.T @ found  # what is left of fresh directions beside those found
        own[:kept] = found.float()
        own[kept:] = torch.linalg.qr(free.T).Q.T[: rank - kept].float()
    adapter.values.data[:kept] = (values[:kept] / adapter.scale).float()
    return adapter


def orthogonality_penalty(adapters: Iterable[Adapter]) -> Tensor:
    """γ · mean over P and Q of ‖PᵀP − I‖² and ‖QQᵀ − I‖² (eq. 4)."""
    terms = []
    for adapter in adapters:
        assert isinstance(adapter, Adalora)
        eye = torch.eye(adapter.plan.rank, device=adapter.left.device)
        right = adapter.right.flatten(1)
        for gram in (adapter.left.T @ adapter.left, right @ right.T):
            terms.append(adapter.plan.orthogonality * (gram - eye).square().sum())
    return torch.stack(terms).mean()


def budget(step: int, total: int, plan: AdaloraPlan, *, first: float, last: float) -> float:
    """The cubic schedule b(t) from `first` to `last` ranks (eq. 12). `step` counts from 1."""
    begin, end = round(plan.t_init * total), total - round(plan.t_final * total)
    if step <= begin:
        return first
    if step >= end:
        return last
    left = 1 - (step - begin) / (end - begin)
    return last + (first - last) * left**3


def allocate(adapters: Sequence[Adapter], step: int, total: int) -> None:
    """Smooth the importance of every triplet, and at each interval keep the best ones over all sites (eq. 8 to 11).

    Sites that rules gave another schedule share their own budget among themselves.
    """
    shared: dict[tuple[float, ...], list[Adalora]] = {}
    for adapter in adapters:
        assert isinstance(adapter, Adalora)
        plan = adapter.plan
        schedule = (plan.t_init, plan.t_final, plan.interval, plan.beta1, plan.beta2)
        shared.setdefault(schedule, []).append(adapter)
    for sites in shared.values():
        _allocate(sites, step, total)


@torch.no_grad()
def _allocate(sites: Sequence[Adalora], step: int, total: int) -> None:
    plan = sites[0].plan
    for name in ("left", "values", "right"):
        _smooth([s for s in sites if getattr(s, name).grad is not None], name, plan)
    end = total - round(plan.t_final * total)
    interval = plan.interval or max(total // 100, 1)
    first = float(sum(site.plan.rank for site in sites))
    last = float(sum(min(site.plan.rank, site.plan.target_rank) for site in sites))
    was_taken = any(parameter.grad is not None for site in sites for parameter in site.parameters())
    is_due = step < end and step > round(plan.t_init * total) and step % interval == 0
    # The final ranks are chosen at `end`, also where that step overflowed in fp16 and was not taken, and later where a
    # run from before had missed it.
    is_missing = step > end and sum(int(site.alive.sum()) for site in sites) > round(last)
    if (is_due and was_taken) or step == end or is_missing:
        _keep_best(sites, round(budget(step, total, plan, first=first, last=last)))
    elif step > end:
        for site in sites:
            site.values.data *= site.alive


def _smooth(sites: Sequence[Adalora], name: str, plan: AdaloraPlan) -> None:
    """Moving averages of sensitivity |w · ∂L/∂w| and of its deviation (eq. 8, 9), fused over the sites."""
    if not sites:
        return
    weights = [getattr(site, name).data for site in sites]
    now = torch._foreach_abs(torch._foreach_mul(weights, [getattr(site, name).grad for site in sites]))
    smooth = [getattr(site, f"{name}_sensitivity") for site in sites]
    doubt = [getattr(site, f"{name}_uncertainty") for site in sites]
    torch._foreach_lerp_(smooth, now, 1 - plan.beta1)
    torch._foreach_lerp_(doubt, torch._foreach_abs(torch._foreach_sub(now, smooth)), 1 - plan.beta2)


def _importance(site: Adalora) -> Tensor:
    """Score of each triplet: s(λᵢ) + mean s(P column) + mean s(Q row), s = sensitivity x uncertainty (eq. 7, 10)."""
    left, values, right = (
        getattr(site, f"{name}_sensitivity") * getattr(site, f"{name}_uncertainty")
        for name in ("left", "values", "right")
    )
    return torch.as_tensor(values + left.mean(0) + right.flatten(1).mean(1))


def _keep_best(sites: Sequence[Adalora], count: int) -> None:
    """One global top-k over the triplets of all sites; Λ of the others becomes 0, and may grow back until t_final."""
    scores = torch.cat([_importance(site) for site in sites])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.topk(min(count, scores.numel())).indices] = True
    for site, alive in zip(sites, kept.split([site.plan.rank for site in sites]), strict=True):
        site.alive.copy_(alive)
        site.values.data *= alive


register(
    Method(
        name="adalora",
        title="AdaLoRA",
        summary="Moves its capacity to the layers that need it.",
        spec=AdaloraSpec,
        adapter=Adalora,
        plan=plan_adalora,
        build=build_adalora,
        recognises=lambda leaves: {"lora_A", "lora_E", "lora_B"} <= leaves,
        penalty=orthogonality_penalty,
        after_step=allocate,
        go_on=go_on_adalora,
    )
)
