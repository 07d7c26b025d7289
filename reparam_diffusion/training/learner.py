"""Everything that changes while a run goes on: adapters, optimizer, schedule, moving average; and how it is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from reparam_diffusion.adapters.base import METHODS, Adapter
from reparam_diffusion.config import TrainConfig
from reparam_diffusion.errors import UserError
from reparam_diffusion.inject import Injection, attach
from reparam_diffusion.models.encode import last_layers
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.words import Word, add_words, take_words
from reparam_diffusion.targets import TEXT_SETS, SitePlan, build_adapters, plan_sites, sites_of
from reparam_diffusion.training.batch import trains_text
from reparam_diffusion.training.optim import is_schedule_free, make_optimizer, make_schedule
from reparam_diffusion.training.processes import Processes
from reparam_diffusion.training.start import started


def plan_run(model: Model, config: TrainConfig, *, start: Path | None = None) -> list[SitePlan]:
    """What every layer of a run gets, before anything is built. `start` is a kept copy of what it starts from."""
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
    sites = plan_sites(model.parts, targets, config.adapter, rules, last_layers=layers)
    if not config.training.start_from:
        return sites
    file = start or Path(config.training.start_from).expanduser()
    found = started(file, model.parts, sites, seed=config.training.seed)
    return [found[site.site][0] if site.site in found else site for site in sites]


class Learner:
    """The trainable side of a run. Adapters and optimizer are fp32 whatever the model's number format is."""

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        sites: list[SitePlan],
        processes: Processes,
        *,
        start: Path | None = None,
        word: Word | None = None,
    ) -> None:
        training = config.training
        self.config = config
        self.processes = processes
        self.adapters: dict[str, Adapter] = build_adapters(model.parts, sites, seed=training.seed)
        if start is not None:
            found = started(start, model.parts, sites, seed=training.seed)
            self.adapters |= {site: adapter for site, (_, adapter) in found.items()}
        self.injection: Injection = attach(model.parts, self.adapters, device=model.device)
        self.word = word
        self._model = model
        with ExitStack() as undo:  # after an error the model is as it was
            undo.callback(self.injection.remove)
            if word is not None:
                add_words(model, [word])
                undo.callback(take_words, model, [word])
            self._begin()
            undo.pop_all()

    def _begin(self) -> None:
        """Optimizer, schedule, moving average and scaler over what is learned."""
        model, config, training = self._model, self.config, self.config.training
        learned = self._by_part()
        self.parameters = [parameter for part in learned.values() for parameter in part]
        self.optimizer = make_optimizer(training, learned, embedding_rate=config.embedding.learning_rate)
        self.schedule = make_schedule(training, self.optimizer)
        self.average = _make_average(self.parameters, training.ema)
        scaled = model.dtype == torch.float16 and model.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=scaled)
        self.best: float | None = None
        self._is_elsewhere = False
        self.by_method: dict[str, list[Adapter]] = {}
        for adapter in self.adapters.values():
            self.by_method.setdefault(adapter.name, []).append(adapter)

    def _by_part(self) -> dict[str, list[nn.Parameter]]:
        """What is learned, by the model part it belongs to."""
        parts: dict[str, list[nn.Parameter]] = {}
        for site, adapter in self.adapters.items():
            parts.setdefault(site.partition(".")[0], []).extend(p for p in adapter.parameters() if p.numel())
        if self.word is not None:
            parts["embedding"] = [v for v in self.word.vectors.values() if isinstance(v, nn.Parameter)]
        return parts

    def __enter__(self) -> Learner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take adapters and word off the model."""
        self.injection.remove()
        if self.word is not None:
            take_words(self._model, [self.word])

    @property
    def count(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def word_bytes(self) -> int:
        """What the learned word adds to the file."""
        each = 4 if self.config.output.file_precision == "fp32" else 2
        return 0 if self.word is None else each * sum(v.numel() for v in self.word.vectors.values())

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
        self._after_step(step)
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
        self._after_step(step)  # without gradients: what is due at this step (AdaLoRA's final ranks) is still done

    def _after_step(self, step: int) -> None:
        """The methods' own work after a step."""
        for name, adapters in self.by_method.items():
            after = METHODS[name].after_step
            if after is not None:
                after(adapters, step, self.config.training.steps)

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
        """What is learned at its average, where one is kept: the moving one, or schedule-free's own."""
        averages_itself = is_schedule_free(self.optimizer)
        if self._is_elsewhere or (self.average is None and not averages_itself):
            yield
            return
        now = self.kept()
        if self.average is not None:
            self.average.copy_to(self.parameters)
        else:
            self.optimizer.eval()
        for adapter in self.adapters.values():
            adapter.settle()
        try:
            yield
        finally:
            if averages_itself:
                self.optimizer.train()
            self._put(now)  # bit for bit, which schedule-free's way back is not

    def kept(self) -> list[torch.Tensor]:
        """A copy of what is trained, as it is now, in host memory."""
        return [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    @contextmanager
    def at(self, values: list[torch.Tensor]) -> Iterator[None]:
        """What is trained as it was kept, while the body runs; no average is taken of it."""
        now = self.kept()
        self._put(values)
        self._is_elsewhere = True
        try:
            yield
        finally:
            self._is_elsewhere = False
            self._put(now)

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def ranks(self) -> dict[str, int]:
        """Live ranks by site, for methods that have them."""
        found = {site: adapter.live_rank() for site, adapter in self.adapters.items()}
        return {site: rank for site, rank in found.items() if rank is not None}

    def state(self) -> dict[str, Any]:
        """Everything a resume needs, as tensors and plain values."""
        return {
            "adapters": {site: adapter.state() for site, adapter in self.adapters.items()},
            "word": {} if self.word is None else {part: v.detach().cpu() for part, v in self.word.vectors.items()},
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
        for part, vectors in ({} if self.word is None else self.word.vectors).items():
            vectors.data.copy_(state["word"][part])
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
