"""What PEFT keeps in adapter_config.json instead of the file: scales, kinds of rotation, sides; put into the leaves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.load import Config

Leaves = dict[str, Tensor]


def refuse_unknown(config: Config | None, name: str) -> None:
    """Raise UserError for a kind of PEFT adapter that we do not read."""
    if config is not None and _kind(config) not in _COMPLETERS:
        raise UserError(
            f"{name} cannot be read.",
            f"PEFT's {_kind(config)} is not known here.",
            "Choose a LoRA, LoHa, LoKr, OFT, BOFT, IA3 or AdaLoRA adapter.",
        )


def complete(leaves: Leaves, path: str, config: Config | None) -> None:
    """Add to a site's leaves what the configuration says.

    Without a configuration PEFT's defaults hold where one is needed: a scale of 1, the Neumann rotation.
    """
    if config is not None:
        _COMPLETERS[_kind(config)](leaves, path, config)
    elif "oft_R.weight" in leaves:
        _oft(leaves, path, {})


def _kind(config: Config) -> str:
    return str(config.get("peft_type", "LORA")).upper()


def for_module(patterns: object, path: str, default: float) -> float:
    """The value of the first pattern that ends `path`, as PEFT looks it up."""
    if isinstance(patterns, Mapping):
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return float(value)
    return default


def _number(value: float) -> Tensor:
    return torch.tensor(float(value))


def _lora(leaves: Leaves, path: str, config: Config) -> None:
    down = leaves.get("lora_down.weight")
    if down is None:
        return
    rank = down.shape[0]
    alpha = for_module(config.get("alpha_pattern"), path, float(config.get("lora_alpha", rank)))
    if config.get("use_rslora"):
        alpha *= rank**0.5
    leaves["alpha"] = _number(alpha)
    if "lora_up.bias" in leaves:
        leaves["bias_scale"] = _number(alpha / rank)


def _loha(leaves: Leaves, path: str, config: Config) -> None:
    leaves["alpha"] = _number(for_module(config.get("alpha_pattern"), path, float(config.get("alpha", 8))))


def _lokr(leaves: Leaves, path: str, config: Config) -> None:
    alpha = for_module(config.get("alpha_pattern"), path, float(config.get("alpha", 8)))
    leaves["alpha"] = _number(alpha)
    if "lokr_w1" in leaves and "lokr_w2" in leaves:  # PEFT scales whole factors too, everybody else does not
        rank = for_module(config.get("rank_pattern"), path, float(config.get("r", 8)))
        leaves["lokr_w1"] = leaves["lokr_w1"].float() * (alpha / rank)


def _oft(leaves: Leaves, path: str, config: Config) -> None:
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else 0
    leaves["oft_terms"] = _number(terms)
    leaves["oft_eps"] = _number(config.get("eps", 6e-5) if config.get("coft", False) else 0.0)


def _ia3(leaves: Leaves, path: str, config: Config) -> None:
    targets = config.get("feedforward_modules") or []
    if isinstance(targets, str):
        on_input = re.fullmatch(targets, path) is not None
    else:
        on_input = any(path.endswith(str(target)) for target in targets)
    leaves["on_input"] = _number(on_input)


def _adalora(leaves: Leaves, path: str, config: Config) -> None:
    if "lora_E" not in leaves:
        return
    initial = int(config.get("init_r", leaves["lora_E"].shape[0]))
    alpha = float(config.get("lora_alpha", initial))
    leaves["init_rank"] = _number(initial)
    leaves["alpha"] = _number(alpha if alpha > 0 else initial)


def _boft(leaves: Leaves, path: str, config: Config) -> None:
    """Everything is in the tensors."""


_COMPLETERS: dict[str, Callable[[Leaves, str, Config], None]] = {
    "LORA": _lora,
    "LOHA": _loha,
    "LOKR": _lokr,
    "OFT": _oft,
    "BOFT": _boft,
    "IA3": _ia3,
    "ADALORA": _adalora,
}
