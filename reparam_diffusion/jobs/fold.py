"""A run's state as a fold of its events. Feeding a few new events costs little, however long the run."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from reparam_diffusion import events as e

State = Literal["created", "queued", "running", "paused", "stopped", "failed", "finished", "lost"]
WAITING = "waiting for the device"
"""The phase of a worker that waits its turn."""
POINTS = 300


@dataclass(frozen=True)
class RunState:
    """What there is to know about a run now. Paths are relative to the run's folder; "" where there is none yet."""

    state: State = "created"
    step: int = 0
    steps: int = 0
    phase: str = ""
    phase_done: int = 0
    phase_total: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    rates: list[tuple[int, float]] = field(default_factory=list)
    validations: list[e.Validated] = field(default_factory=list)
    samples: list[e.Sampled] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    message: str = ""
    seconds_per_step: float = 0.0
    seconds_left: float | None = None
    seconds: float = 0.0
    checkpoint: int | None = None
    adapter: str = ""
    gallery: str = ""
    started: e.Started | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    pid: int = 0
    last_step_at: float = 0.0
    """Seconds since 1970."""
    waiting_for: str | None = None
    """What holds its device while it waits, in words: "run X (process 12, since 15:08)"."""
    place: int = 0
    """Its place in the queue; 0 where it does not wait there."""
    where: str = ""
    """How it is run, where that is not one process of this machine: "2 processes", "Ray job …"."""

    @property
    def is_live(self) -> bool:
        """Whether a process works on it, or waits to."""
        return self.state in ("running", "queued")

    @property
    def can_resume(self) -> bool:
        """Whether going on from the last checkpoint, or from the start, makes sense."""
        return self.state in ("paused", "stopped", "failed", "lost", "created")


class Fold:
    """Takes events one by one; `state` tells where they lead. A step that comes again replaces what it was."""

    def __init__(self) -> None:
        self.last: e.Event | None = None  # the last event that says where the run stands
        self.finished: e.Finished | None = None
        self.launched: e.Launched | None = None
        self.started: e.Started | None = None
        self.phase = e.Prepared("", 0, 0)
        self.steps = array("q")
        self.losses = array("d")
        self.rates = array("d")
        self.last_step_at = 0.0
        self.recent: deque[float] = deque(maxlen=20)
        self.validations: dict[int, e.Validated] = {}
        self.samples: dict[tuple[int, str, int], e.Sampled] = {}
        self.warnings: list[str] = []
        self.checkpoint: int | None = None
        self.adapter = ""
        self.gallery = ""
        self.ranks: dict[str, int] = {}
        self.seconds = 0.0
        self.job = ""

    def feed(self, event: e.Event) -> None:
        """Take in one event."""
        match event:
            case e.Warned():
                if event.message not in self.warnings:
                    self.warnings.append(event.message)
                return  # a warning says nothing about where the run stands
            case e.Launched():
                self.launched = event
                self.job = event.job or self.job
                self.phase = e.Prepared("starting", 0, 0)
            case e.Started():
                self.started, self.finished = event, None
                self._rewind(event.first_step)
                self.ranks = dict(event.ranks)
                self.phase = e.Prepared("first step", 0, 0)
            case e.Prepared():
                self.phase = event
            case e.Step():
                self._take_step(event)
            case e.Validated():
                self.validations[event.step] = event
            case e.Sampled():
                self.samples[(event.step, event.prompt, event.seed)] = event
            case e.Ranked():
                self.ranks = dict(event.ranks)
            case e.Saved():
                self._take_saved(event)
            case e.Failed(what=e.FINISHED_BEFORE) if self.finished is not None:
                event = self.finished  # an earlier version said so when a finished run was resumed
            case e.Finished() | e.Stopped():
                if isinstance(event, e.Finished):
                    self.finished = event
                self.adapter = event.path or self.adapter
                self._rewind(event.step + 1)
            case e.Paused():
                self._rewind(event.step + 1)
        self.last = event

    def _take_step(self, event: e.Step) -> None:
        self._rewind(event.step)
        self.steps.append(event.step)
        self.losses.append(event.loss)
        self.rates.append(next(iter(event.learning_rates.values()), 0.0))
        self.last_step_at = event.time
        self.recent.append(event.seconds)
        self.seconds += event.seconds
        self.phase = e.Prepared("training", 0, 0)

    def _rewind(self, first: int) -> None:
        """Forget the steps from `first` on: a run that was resumed before them does them anew."""
        if not self.steps or first > self.steps[-1]:
            return
        at = bisect_left(self.steps, first)
        del self.steps[at:], self.losses[at:], self.rates[at:]
        self.validations = {step: row for step, row in self.validations.items() if step < first}
        self.samples = {key: row for key, row in self.samples.items() if key[0] < first}

    def _take_saved(self, event: e.Saved) -> None:
        if event.kind == "checkpoint":
            self.checkpoint = event.step
        elif event.kind == "gallery":
            self.gallery = event.path
        else:
            self.adapter = event.path

    def state(self, *, is_held: bool) -> RunState:
        """Where the run stands; `is_held`: whether a living process works on it."""
        now = self._now(is_held)
        step = self.steps[-1] if self.steps else 0
        total = self.started.steps if self.started else 0
        pace = median(self.recent) if self.recent else 0.0
        left = (total - step) * pace if pace and now == "running" else None
        return RunState(
            state=now,
            step=step,
            steps=total,
            phase=self.phase.phase,
            phase_done=self.phase.done,
            phase_total=self.phase.total,
            losses=thinned(self.steps, self.losses),
            rates=thinned(self.steps, self.rates, points=POINTS // 3),
            validations=[self.validations[key] for key in sorted(self.validations)],
            samples=sorted(self.samples.values(), key=lambda sample: sample.step),
            warnings=list(self.warnings),
            message=self._message(now),
            seconds_per_step=pace,
            seconds_left=left,
            seconds=self.seconds,
            checkpoint=self.checkpoint,
            adapter=self.adapter,
            gallery=self.gallery,
            started=self.started,
            ranks=dict(self.ranks),
            pid=self.launched.pid if self.launched else 0,
            last_step_at=self.last_step_at,
            waiting_for=self.phase.waiting_for or None if now == "queued" else None,
            where=self._where(),
        )

    def _now(self, is_held: bool) -> State:
        match self.last:
            case None:
                return "running" if is_held else "created"
            case e.Finished():
                return "finished"
            case e.Stopped():
                return "stopped"
            case e.Paused():
                return "paused"
            case e.Failed():
                return "failed"
        if not is_held:
            return "lost"
        return "queued" if isinstance(self.last, e.Prepared) and self.last.phase == WAITING else "running"

    def _where(self) -> str:
        count = self.started.processes if self.started else 1
        places = [f"{count} processes" if count > 1 else "", f"Ray job {self.job}" if self.job else ""]
        return ", ".join(place for place in places if place)

    def _message(self, now: State) -> str:
        if now == "failed" and isinstance(self.last, e.Failed):
            return " ".join(part for part in (self.last.what, self.last.why, self.last.do) if part)
        if now == "lost":
            place = "It had no checkpoint yet, so it begins anew."
            if self.checkpoint is not None:
                place = f"Its last checkpoint is at step {self.checkpoint}; Resume goes on from there."
            why = self.last.why if isinstance(self.last, e.Lost) else "The program ended without a word."
            return f"{why} {place}"
        return ""


def thinned(steps: array[int], values: array[float], *, points: int = POINTS) -> list[tuple[int, float]]:
    """At most `points` pairs: the mean value of equal stretches, at each stretch's last step."""
    width = -(-len(steps) // points) or 1
    stretches = range(0, len(steps), width)
    if width == 1:
        return list(zip(steps, values, strict=True))
    means = []
    for first in stretches:
        part = values[first : first + width]
        means.append((steps[first + len(part) - 1], sum(part) / len(part)))
    return means
