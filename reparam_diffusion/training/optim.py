"""Optimizer and schedule for the adapters: torch's own and diffusers' own, one group a model part."""

from __future__ import annotations

from typing import Any

import torch

from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.config import TrainingSettings
from reparam_diffusion.errors import UserError

_FUSED = ("adamw", "adam", "sgd")


def make_optimizer(settings: TrainingSettings, adapters: dict[str, Adapter]) -> torch.optim.Optimizer:
    """One group for each model part ("unet", "te1", …) with its own learning rate."""
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for site, adapter in adapters.items():
        parts.setdefault(site.partition(".")[0], []).extend(p for p in adapter.parameters() if p.numel())
    text_rate = settings.text_learning_rate or settings.learning_rate / 2
    groups: list[dict[str, Any]] = [  # Any: torch's own group format
        {"params": parameters, "lr": settings.learning_rate if part == "unet" else text_rate, "part": part}
        for part, parameters in parts.items()
    ]
    kinds: dict[str, type[torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
        "adafactor": torch.optim.Adafactor,
        "radam": torch.optim.RAdam,
        "nadam": torch.optim.NAdam,
        "rmsprop": torch.optim.RMSprop,
    }
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer in ("adamw", "adam", "radam", "nadam"):
        options["betas"] = settings.betas
    if settings.optimizer == "sgd":
        options["momentum"] = settings.betas[0]
    if settings.optimizer in _FUSED:
        options["fused"] = True
    return kinds[settings.optimizer](groups, **options)


def make_schedule(settings: TrainingSettings, optimizer: torch.optim.Optimizer) -> Any:
    """diffusers' learning rate schedule over the run's optimizer steps."""
    from diffusers.optimization import get_scheduler

    name = settings.schedule
    warmup = round(settings.warmup * settings.steps)
    if name == "constant" and warmup:
        name = "constant_with_warmup"
    try:
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=settings.steps)
    except ValueError as error:  # polynomial ends at 1e-7, which must lie below
        raise UserError(
            f"The schedule {name} does not go with this learning rate.", str(error), "Choose another schedule."
        ) from error


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate of each model part now."""
    return {group["part"]: float(group["lr"]) for group in optimizer.param_groups}
