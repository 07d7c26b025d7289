"""The change that an adapter makes to a live layer, ΔW and Δb, as a low-rank product where it is one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.adapters.foreign import Stack
from reparam_diffusion.adapters.lokr import Lokr
from reparam_diffusion.adapters.lora import Lora
from reparam_diffusion.errors import UserError
from reparam_diffusion.maths.change import Change, total
from reparam_diffusion.maths.kronecker import kron


@torch.no_grad()
def change_of(adapter: Adapter, module: nn.Module) -> Change:
    """Δ of an adapter at its module, in fp32 on the CPU. Raises UserError where it needs weights that are not there."""
    if isinstance(adapter, Stack) and not adapter.reads_weight:
        return total([change_of(inner, module) for inner in adapter.inner()])
    weight = weight_for(adapter, module)
    bias = adapter.delta_bias(_bias_of(module))
    bias = None if bias is None else bias.detach().float().cpu()
    rows, columns = adapter.shape[0], weight[0].numel()
    factors = None if adapter.magnitude is not None else _factors(adapter)
    if factors is not None and (isinstance(adapter, Lora) or factors[0].shape[1] <= min(rows, columns)):
        up, down = (factor.detach().float().cpu() for factor in factors)
        return Change(adapter.shape, up=up, down=down.flatten(1), bias=bias)
    return Change(adapter.shape, whole=adapter.delta(weight).detach().float().cpu().reshape(rows, -1), bias=bias)


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor] | None:
    """`up` and `down` of ΔW = up · down, the Kronecker product included: (C₁C₂) ⊗ (M₁M₂) = (C₁ ⊗ M₁)(C₂ ⊗ M₂)."""
    if not isinstance(adapter, Lokr):
        found = adapter.low_rank()
        return None if found is None else (found[1], found[0])
    plan = adapter.plan
    if not plan.rank_large:
        return None  # a whole M is as good as of full rank
    small = adapter.small_factor() * plan.scale
    l, m = small.shape
    left, right = (small, torch.eye(m)) if m <= l else (torch.eye(l), small)
    return kron(left, adapter.large_up), kron(right, adapter.large_down)


def weight_for(adapter: Adapter, module: nn.Module) -> Tensor:
    """The weight that ΔW is taken from; zeros that take no memory where it makes no difference."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not adapter.reads_weight:
        return torch.zeros(()).expand(weight.shape)
    if weight.is_meta:
        raise UserError(
            f"The change of this {adapter.name.upper()} adapter depends on the base model's weights.",
            "Rotations, weight decomposition, (IA)³ and GLoRA change a weight by what it is.",
            "Name the base model with --model.",
        )
    return weight.detach().float().cpu()


def _bias_of(module: nn.Module) -> Tensor | None:
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return None if bias is None or bias.is_meta else bias.detach().cpu()
