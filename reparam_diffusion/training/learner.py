"""Everything that changes while a run goes on: adapters, optimizer, schedule, moving average; and how it is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from reparam_diffusion.adapters.base import METHODS, Adapter
from reparam_diffusion.config import TrainConfig
from reparam_diffusion.errors import UserError
from reparam_diffusion.inject import Injection, attach
from reparam_diffusion.models.encode import last_layers
from reparam_diffusion.models.load import Model
from reparam_diffusion.targets import TEXT_SETS, SitePlan, build_adapters, plan_sites, sites_of
from reparam_diffusion.training.batch import trains_text
from reparam_diffusion.training.optim import make_optimizer, make_schedule
from reparam_diffusion.training.processes import Processes


def plan_run(model: Model, config: TrainConfig) -> list[SitePlan]:
    """What every layer of a run gets, before anything is built."""
    targets: dict[str, str | list[str]] = {}
    if config.targets.unet not in ("none", []):
        targets["unet"] = config.targets.unet
    if trains_text(config):
        wanted = config.targets.text_encoder
        for part in (name for name in model.parts if name != "unet"):
            if isinstance(wanted, str) and wanted in TEXT_SETS:
                targets[part] = wanted
                continue
            globs = [wanted] if isinstance(wanted, str) else wanted
            own = [glob for glob in globs if sites_of(part, model.parts[part], glob)]
            if own:
                targets[part] = own
        if not targets.keys() - {"unet"}:
            raise UserError(
                f"No layer of a text encoder matches {wanted}.",
                f"This model's encoders are called {', '.join(part for part in model.parts if part != 'unet')}.",
                'Write globs such as "te1.*q_proj".',
                place="targets.text_encoder",
            )
    rules = [(rule.match, rule.adapter) for rule in config.targets.rules]
    layers = last_layers(model, clip_skip=config.model.clip_skip)
    return plan_sites(model.parts, targets, config.adapter, rules, last_layers=layers)


class Learner:
    """The trainable side of a run. Adapters and optimizer are fp32 whatever the model's number format is."""

    def __init__(self, model: Model, config: TrainConfig, sites: list[SitePlan], processes: Processes) -> None:
        training = config.training
        self.config = config
        self.processes = processes
        self.adapters: dict[str, Adapter] = build_adapters(model.parts, sites, seed=training.seed)
        self.injection: Injection = attach(model.parts, self.adapters, device=model.device)
        self.parameters = [p for p in self.injection.parameters() if p.numel()]
        self.optimizer = make_optimizer(training, self.adapters)
        self.schedule = make_schedule(training, self.optimizer)
        self.average = _make_average(self.parameters, training.ema)
        scaled = model.dtype == torch.float16 and model.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=scaled)
        self.best: float | None = None
        self.by_method: dict[str, list[Adapter]] = {}
        for adapter in self.adapters.values():
            self.by_method.setdefault(adapter.name, []).append(adapter)

    def penalty(self) -> torch.Tensor | None:
        """The methods' own terms of the loss, such as AdaLoRA's orthogonality."""
        terms = [
            METHODS[name].penalty(adapters)  # type: ignore[misc]  # asked for on the line below
            for name, adapters in self.by_method.items()
            if METHODS[name].penalty is not None
        ]
        return torch.stack(terms).sum() if terms else None

    def update(self, step: int) -> float | None:
        """One optimizer step from the gradients at hand; returns their norm, None if they overflowed."""
        training = self.config.training
        self.processes.mean_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        limit = training.clip or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            self._skip(step)
            return None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for name, adapters in self.by_method.items():
            after = METHODS[name].after_step
            if after is not None:
                after(adapters, step, training.steps)
        if self.average is not None:
            self.average.step(self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return norm

    def _skip(self, step: int) -> None:
        """A step whose gradient overflowed is not taken: fp16 lowers its scale and goes on, other formats are lost."""
        if not self.scaler.is_enabled():
            raise UserError(
                f"The gradient is no number any more at step {step}.",
                "The learning rate is too high for these settings.",
                "Start again with a lower learning rate.",
            )
        self.scaler.step(self.optimizer)  # sees the overflow and leaves the weights alone
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def check_gradients(self) -> None:
        """After the first backward: every site must have been reached. Raises UserError naming those that were not."""
        dead = self.injection.uncalled()
        for site, adapter in self.adapters.items():
            trainable = [p for p in adapter.parameters() if p.numel()]
            if trainable and all(p.grad is None for p in trainable):
                dead.append(site)
        if dead:
            raise UserError(
                f"{len(set(dead))} targeted layers are never used by this model.",
                f"The first is {sorted(set(dead))[0]}.",
                "Leave them out of the targets.",
                place="targets",
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The adapters at their moving average, where one is kept."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        for adapter in self.adapters.values():
            adapter.settle()
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def ranks(self) -> dict[str, int]:
        """Live ranks by site, for methods that have them."""
        found = {site: adapter.live_rank() for site, adapter in self.adapters.items()}
        return {site: rank for site, rank in found.items() if rank is not None}

    def state(self) -> dict[str, Any]:
        """Everything a resume needs, as tensors and plain values."""
        return {
            "adapters": {site: adapter.state() for site, adapter in self.adapters.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`. Raises UserError when the run's layers are not the checkpoint's."""
        if state["adapters"].keys() != self.adapters.keys():
            raise UserError(
                "The checkpoint does not fit this run.", "It was made for other layers.", "Use the run's own settings."
            )
        for site, adapter in self.adapters.items():
            adapter.load_state(state["adapters"][site])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.best = state["best"]
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
            self.average.to(self.parameters[0].device)


def _make_average(parameters: list[nn.Parameter], decay: float) -> Any:
    """diffusers' moving average over the adapters, or None."""
    if not decay:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=decay)
