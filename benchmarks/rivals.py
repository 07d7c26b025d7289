"""One model, many libraries: each puts its own adapters on the same attention projections.

A contender shares the frozen weights with every other one (its own modules around the same tensors), so that all fit in
memory and their steps can be timed in turn.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LIBRARIES = ("ours", "peft", "lycoris", "lycoris-bypass")
METHODS = ("lora", "adalora", "loha", "lokr", "oft")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TOTAL_STEPS = 1000
"""What the adaptive methods take as the length of the run; the steps measured lie in its falling part."""


@dataclass
class Contender:
    """A model with adapters on it. `penalty` is added to the loss, `after_step` runs once the optimizer has stepped."""

    model: nn.Module
    parameters: list[nn.Parameter]
    penalty: Callable[[], Tensor] | None = None
    after_step: Callable[[int], None] | None = None


def twin(model: nn.Module) -> nn.Module:
    """The same model with modules of its own around the same tensors."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def build(library: str, method: str, base: nn.Module) -> Contender | None:
    """A library's adapters of a method on a twin of the base model; None where the library has no such method."""
    model = twin(base)
    if library == "ours":
        return _ours(method, model)
    if library == "peft":
        return _peft(method, model)
    return None if method == "adalora" else _lycoris(method, model, bypass=library == "lycoris-bypass")


def _ours(method: str, model: nn.Module) -> Contender:
    from reparam_diffusion.adapters import METHODS as KNOWN
    from reparam_diffusion.config import spec_of
    from reparam_diffusion.inject import attach
    from reparam_diffusion.targets import build_adapters, plan_sites

    settings: dict[str, dict[str, Any]] = {  # Any: each method's own settings
        "lora": {"rank": 16, "alpha": 16},
        "adalora": {"init_rank": 12, "target_rank": 8, "alpha": 12},
        "loha": {"rank": 8, "alpha": 8},
        "lokr": {"factor": 8},
        "oft": {"block_size": 8},
    }
    parts = {"unet": model}
    sites = plan_sites(parts, {"unet": "attention"}, spec_of(method, **settings[method]))
    adapters = build_adapters(parts, sites, seed=0)
    injection = attach(parts, adapters)
    known, rows = KNOWN[method], list(adapters.values())
    penalty, after_step = known.penalty, known.after_step
    return Contender(
        model,
        injection.parameters(),
        penalty=None if penalty is None else lambda: penalty(rows),
        after_step=None if after_step is None else lambda step: after_step(rows, step, TOTAL_STEPS),
    )


def _peft(method: str, model: nn.Module) -> Contender:
    import peft

    targets = list(TARGETS)
    if method == "adalora":
        return _peft_adalora(model)
    configs: dict[str, Callable[[], Any]] = {  # Any: PEFT's configurations share no useful type
        "lora": lambda: peft.LoraConfig(r=16, lora_alpha=16, target_modules=targets),
        "loha": lambda: peft.LoHaConfig(r=8, alpha=8, target_modules=targets),
        "lokr": lambda: peft.LoKrConfig(r=10_000, alpha=10_000, decompose_factor=8, target_modules=targets),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=False, target_modules=targets),
    }
    peft.inject_adapter_in_model(configs[method](), model)
    return Contender(model, trainable(model))


def _peft_adalora(model: nn.Module) -> Contender:
    import peft

    config = peft.AdaLoraConfig(
        init_r=12, target_r=8, lora_alpha=12, tinit=100, tfinal=350, deltaT=10, total_step=TOTAL_STEPS,
        orth_reg_weight=0.5, target_modules=list(TARGETS),
    )  # fmt: skip
    tuner = peft.tuners.AdaLoraModel(model, config, "default")
    names = [name for name, _ in model.named_parameters() if "lora_A" in name or "lora_B" in name]

    def penalty() -> Tensor:
        """As AdaLoraModel.forward adds it to a model's own loss."""
        terms = []
        for name in names:
            factor = model.get_parameter(name)
            gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
            terms.append(
                torch.norm(gram - torch.eye(*gram.size(), out=torch.empty_like(gram).requires_grad_(False)), p="fro")
            )
        return config.orth_reg_weight * sum(terms, torch.zeros(())) / len(terms)

    return Contender(model, trainable(model), penalty=penalty, after_step=tuner.update_and_allocate)


def _lycoris(method: str, model: nn.Module, *, bypass: bool) -> Contender:
    """LyCORIS with a preset of our own, since its "full" fails on SD UNets in 4.1.3 (duplicate names)."""
    logging.disable(logging.WARNING)
    from lycoris import LycorisNetwork

    LycorisNetwork.apply_preset(
        {"enable_conv": False, "target_module": [], "target_name": [f".*{target}" for target in TARGETS]}
    )
    algorithms: dict[str, dict[str, Any]] = {  # Any: each algorithm's own settings
        "lora": {"network_module": "locon", "lora_dim": 16, "alpha": 16},
        "loha": {"network_module": "loha", "lora_dim": 8, "alpha": 8},
        "lokr": {"network_module": "lokr", "lora_dim": 100_000, "alpha": 1, "factor": 8, "full_matrix": True},
        "oft": {"network_module": "diag-oft", "lora_dim": 8, "alpha": 0},
    }
    network = LycorisNetwork(model, **algorithms[method], bypass_mode=bypass or None)
    network.apply_to()
    logging.disable(logging.NOTSET)
    model.__dict__["lycoris_network"] = network  # kept alive with the model, outside its modules
    # Its bypass_mode multiplies adapter and base tensors as they are, so it works in one dtype only: the base's.
    host = next(model.parameters())
    if host.dtype != torch.float32:  # and its rotations come out in fp32, which the next layer refuses
        for adapter in network.loras:
            _in_its_inputs_dtype(adapter.org_module[0])
    return Contender(model, trainable(network.to(host.device), dtype=host.dtype))


def _in_its_inputs_dtype(module: nn.Module) -> None:
    """Cast a layer's output to the dtype of its input."""
    inner = module.forward
    module.forward = lambda x: inner(x).to(x.dtype)


def trainable(module: nn.Module, *, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """The adapter's parameters, in fp32 for every library that can."""
    found = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in found:
        parameter.data = parameter.data.to(dtype)
    return found
