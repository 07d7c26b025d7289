"""Optimizer and schedule for what is learned: torch's own, bitsandbytes', Prodigy and schedule-free; one group a part.

Lion: Chen et al. 2023, arXiv:2302.06675.  8-bit states: Dettmers et al. 2022, arXiv:2110.02861.
Prodigy: Mishchenko and Defazio 2024, arXiv:2306.06101.  Schedule-free: Defazio et al. 2024, arXiv:2405.15682.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn

from reparam_diffusion.config import TrainConfig, TrainingSettings
from reparam_diffusion.errors import UserError

TORCHS: dict[str, str] = {
    "adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "adafactor": "Adafactor", "radam": "RAdam", "nadam": "NAdam",
    "rmsprop": "RMSprop",
}  # fmt: skip
"""Our name -> the class in torch.optim."""
EXTRA: dict[str, tuple[str, str]] = {
    "adamw8bit": ("bitsandbytes", "AdamW8bit"),
    "lion": ("bitsandbytes", "Lion"),
    "lion8bit": ("bitsandbytes", "Lion8bit"),
    "prodigy": ("prodigyopt", "Prodigy"),
    "adamw_schedulefree": ("schedulefree", "AdamWScheduleFree"),
}
"""Our name -> the package that may be missing, and the class in it."""
PRODIGY, SCHEDULE_FREE = "prodigy", "adamw_schedulefree"
_WITH_BETAS = ("adamw", "adam", "radam", "nadam", *EXTRA)
_FUSED = ("adamw", "adam", "sgd")
_SMALL_PRODIGY = 0.1
"""Prodigy multiplies the rate that it finds by the setting, which is 1 where nothing is wrong."""

Learned = Mapping[str, Sequence[nn.Parameter]]
"""What is learned, by the part that it belongs to: "unet", "te1", "te2", "embedding"."""


def make_optimizer(settings: TrainingSettings, learned: Learned, *, embedding_rate: float = 0.0) -> Any:
    """One group for each part with its own learning rate; embeddings are not decayed. Any: packages without types."""
    name = settings.optimizer
    rates = {"unet": settings.learning_rate, "embedding": embedding_rate}
    if name == PRODIGY:
        rates = dict.fromkeys(learned, settings.learning_rate)
    groups: list[dict[str, Any]] = [  # Any: torch's own group format
        {"params": list(parameters), "lr": rates.get(part, text_rate(settings)), "part": part}
        | ({"weight_decay": 0.0} if part == "embedding" else {})
        for part, parameters in learned.items()
    ]
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if name in _WITH_BETAS:
        options["betas"] = settings.betas
    if name == "sgd":
        options["momentum"] = settings.betas[0]
    if name in _FUSED:
        options["fused"] = True
    if name == PRODIGY:  # as its authors advise for diffusion models
        options |= {"use_bias_correction": True, "safeguard_warmup": True}
    if name == SCHEDULE_FREE:
        options["warmup_steps"] = _warmup(settings)
    with redirect_stdout(io.StringIO()):  # Prodigy prints that it decays weights
        optimizer = _kind_of(name)(groups, **options)
    if is_schedule_free(optimizer):
        optimizer.train()
    return optimizer


def _kind_of(name: str) -> Any:
    """The optimizer's class. Raises UserError when its package is not installed. Any: packages without types."""
    if name in TORCHS:
        return getattr(torch.optim, TORCHS[name])
    package, kind = EXTRA[name]
    try:
        module = importlib.import_module("bitsandbytes.optim" if package == "bitsandbytes" else package)
    except ImportError as error:
        raise UserError(
            f"The optimizer {name} needs {package}, which is not installed.",
            str(error) if not isinstance(error, ModuleNotFoundError) else "",
            "Run `pip install -r requirements-extras.txt`, or choose another optimizer.",
            place="training.optimizer",
        ) from None
    return getattr(module, kind)


def is_schedule_free(optimizer: Any) -> bool:
    """Whether the optimizer keeps an average of its own, which `eval` shows and `train` hides. Any: as above."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


def text_rate(settings: TrainingSettings) -> float:
    """The learning rate of the text encoders' adapters."""
    if settings.optimizer == PRODIGY:
        return settings.learning_rate
    return settings.text_learning_rate or settings.learning_rate / 2


def schedule_of(settings: TrainingSettings) -> str:
    """The schedule in use; schedule-free has none."""
    return "constant" if settings.optimizer == SCHEDULE_FREE else settings.schedule


def _warmup(settings: TrainingSettings) -> int:
    return round(settings.warmup * settings.steps)


def check_optimizer(config: TrainConfig) -> None:
    """Raise UserError for an optimizer that is not installed, or that cannot do what the other settings ask."""
    settings = config.training
    _kind_of(settings.optimizer)
    if settings.optimizer != SCHEDULE_FREE:
        return
    if settings.ema:
        raise UserError(
            "Schedule-free and the moving average exclude each other.",
            "Schedule-free saves an average of its own.",
            "Set training.ema to 0, or choose another optimizer.",
            place="training.ema",
        )
    if not settings.betas[0]:
        raise UserError("Schedule-free needs a first beta above 0.", do="Take 0.9.", place="training.betas")
    if "adalora" in {config.adapter.method, *(rule.adapter.method for rule in config.targets.rules)}:
        raise UserError(
            "AdaLoRA does not go with schedule-free.",
            "The ranks that AdaLoRA takes away would live on in schedule-free's average.",
            "Choose another optimizer, or another method.",
            place="training.optimizer",
        )


def notes_on(config: TrainConfig) -> Iterator[str]:
    """What a person should know of settings that the optimizer takes otherwise than they say."""
    settings = config.training
    if settings.optimizer == PRODIGY:
        if settings.learning_rate < _SMALL_PRODIGY:
            yield (
                f"Prodigy finds the learning rate itself and multiplies it by training.learning_rate, which is "
                f"{settings.learning_rate:g}: it will learn next to nothing. Set training.learning_rate to 1."
            )
        if settings.text_learning_rate not in (0.0, settings.learning_rate):
            yield "Prodigy has one learning rate for all parts: training.text_learning_rate is not used."
    if settings.optimizer == SCHEDULE_FREE and settings.schedule not in ("constant", "constant_with_warmup"):
        yield f"Schedule-free has no schedule: its rate stays after the warmup, {settings.schedule} is not used."


def make_schedule(settings: TrainingSettings, optimizer: torch.optim.Optimizer) -> Any:
    """diffusers' learning rate schedule over the run's optimizer steps."""
    from diffusers.optimization import get_scheduler

    name, warmup = schedule_of(settings), _warmup(settings)
    if settings.optimizer == SCHEDULE_FREE:
        warmup = 0  # it warms up by itself
    if name == "constant" and warmup:
        name = "constant_with_warmup"
    try:
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=settings.steps)
    except ValueError as error:  # polynomial ends at 1e-7, which must lie below
        raise UserError(
            f"The schedule {name} does not go with this learning rate.", str(error), "Choose another schedule."
        ) from error


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate at which each part takes its next step."""
    return {group["part"]: float(group["lr"]) * _found_by_itself(group) for group in optimizer.param_groups}


def _found_by_itself(group: Mapping[str, Any]) -> float:
    """What an optimizer multiplies a group's rate with: Prodigy's d, schedule-free's warmup."""
    if "d0" in group:
        return float(group["d"])
    warmup = group.get("warmup_steps", 0)
    return min(1.0, (group["k"] + 1) / warmup) if warmup else 1.0
