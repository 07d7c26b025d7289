"""How long a piece of work takes on this machine: what runs and probes have measured, kept by what time depends on.

One JSON line a measurement in the user's cache folder; the last one for a piece counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from reparam_diffusion import events as e
from reparam_diffusion.config import TrainConfig
from reparam_diffusion.files import beside, cache_file
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.precision import processor_name

Unit = Literal["loading", "latents", "captions", "class picture", "preview", "step", "fixed-noise loss", "checkpoint"]

_PHASES: dict[str, Unit] = {"latents": "latents", "captions": "captions", "class pictures": "class picture"}
FOUND_BELOW = 0.003
"""Seconds for one item below which it was not made but found in a cache."""
_MOST_BYTES = 1_000_000
"""Size of the book at which its older half goes."""
_WARM_UP = 3
"""First steps of a run that are slower than the rest."""


@dataclass(frozen=True)
class Piece:
    """A kind of work. Time is about proportional to `amount` among pieces that are `like` each other."""

    unit: str
    like: str
    """Machine, model, method, layers: nothing scales over these."""
    exact: str = ""
    """Settings that move the time a little, such as the rank."""
    amount: float = 1.0
    """Sampling steps, or pictures a step, times the megapixels of each."""


@dataclass(frozen=True)
class Pace:
    """Seconds for a piece, and whether this very piece was timed here or a similar one scaled to it."""

    seconds: float
    is_measured: bool


class Book:
    """All measurements of this user on this machine."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or cache_file("measured.jsonl")

    def read(self) -> Mapping[Piece, float]:
        """The last number for each piece."""
        try:
            status = self.file.stat()
        except OSError:
            return {}
        return _read(self.file, status.st_mtime_ns, status.st_size)

    def write(self, rows: Mapping[Piece, float]) -> None:
        """Keep these measurements. Where nothing can be written they are taken anew, nothing else."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as book:
                book.write(_lines(rows))
            if self.file.stat().st_size > _MOST_BYTES:  # the older half goes
                known = list(self.read().items())
                with beside(self.file) as hidden:
                    hidden.write_text(_lines(dict(known[len(known) // 2 :])), encoding="utf-8")
        except OSError:
            return

    def expect(self, piece: Piece) -> Pace | None:
        """What to expect of a piece: its own time, else its likes' scaled to it; None when none was taken."""
        known = self.read()
        if piece in known:
            return Pace(known[piece], True)
        likes = {other: value for other, value in known.items() if (other.unit, other.like) == (piece.unit, piece.like)}
        if not likes:
            return None
        same = {other: value for other, value in likes.items() if other.exact == piece.exact} or likes
        return Pace(scaled({other.amount: value for other, value in same.items()}, piece.amount), False)


def _lines(rows: Mapping[Piece, float]) -> str:
    return "".join(json.dumps({**asdict(piece), "value": value}) + "\n" for piece, value in rows.items())


@lru_cache(maxsize=4)
def _read(file: Path, changed: int, size: int) -> Mapping[Piece, float]:
    """What the file held when it was changed and as large as that."""
    known: dict[Piece, float] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            value = float(row.pop("value"))
            piece = Piece(**row)
            known.pop(piece, None)  # the newest comes last
            known[piece] = value
        except (ValueError, TypeError, KeyError, AttributeError):  # torn, or of another version
            continue
    return known


def scaled(known: Mapping[float, float], amount: float) -> float:
    """Seconds for an amount: along the line through the two nearest known ones, in proportion where there is one."""
    nearest = sorted(known, key=lambda other: abs(other - amount))
    first = nearest[0]
    if len(nearest) > 1:
        slope = (known[nearest[1]] - known[first]) / (nearest[1] - first)
        on_line = known[first] + slope * (amount - first)
        if slope >= 0 and on_line > 0:
            return on_line
    return known[first] * amount / first


def machine_name(device: torch.device, threads: int) -> str:
    """What computes: the processor with its threads, or the GPU; and torch's version."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{processor_name()}, torch {torch.__version__}, {threads} threads, {device.type}"


def pieces_of(model: Model, shape: str, config: TrainConfig, machine: str) -> dict[Unit, Piece]:
    """The pieces of a run's work. `shape` is the model's shape key."""
    training = config.training
    side = config.data.resolution or model.size
    area, drawn = side * side / 1e6, model.size**2 / 1e6
    base = f"{machine}, {shape}, {config.model.precision}"
    base += ", 8 bits" * config.model.base_8bit + ", blocks offloaded" * config.model.block_offload
    rules = [(rule.match, rule.adapter.method) for rule in config.targets.rules]
    layers = json.dumps([config.adapter.method, config.targets.unet, config.targets.text_encoder, rules])
    adapted = f"{base}, {layers}"
    exact = json.dumps([config.adapter.model_dump(), [rule.adapter.model_dump() for rule in config.targets.rules]])
    upkeep = [training.optimizer, training.ema > 0, config.model.clip_skip]
    way = [training.gradient_checkpointing, training.compile, config.data.shuffle_tags, config.embedding.vectors > 0]
    shown = training.batch * training.accumulation * (2 if config.prior.weight else 1)
    return {
        "loading": Piece("loading", base),
        "latents": Piece("latents", base, amount=area),
        "captions": Piece("captions", base),
        "class picture": Piece("class picture", base, amount=drawn * (config.prior.steps or model.habits.steps)),
        "preview": Piece("preview", adapted, exact, drawn * model.habits.steps),
        "step": Piece("step", f"{adapted}, {json.dumps(way)}", f"{exact}, {json.dumps(upkeep)}", area * shown),
        "fixed-noise loss": Piece("fixed-noise loss", adapted, exact, area),
        "checkpoint": Piece("checkpoint", adapted, exact),
    }


def seconds_of(events: Sequence[e.Event], *, looked_at: int, found_below: float = FOUND_BELOW) -> dict[Unit, float]:
    """Seconds for one piece of each kind of work in a run's last session.

    An event is told when its work is done, so the time since the one before it is what it took. `looked_at` pictures
    gave the fixed-noise loss.
    """
    taken: dict[Unit, list[float]] = {}
    session = _last_session(events)
    for before, event in pairwise(session):
        gap = event.time - before.time
        match event:
            case e.Step():
                taken.setdefault("step", []).append(event.seconds)
            case e.Validated():
                taken.setdefault("fixed-noise loss", []).append(gap / looked_at)
            case e.Sampled():
                taken.setdefault("preview", []).append(gap)
            case e.Saved(kind="checkpoint"):
                taken.setdefault("checkpoint", []).append(gap)
            case e.Prepared() if event.phase in _PHASES and isinstance(before, e.Prepared):
                made = event.done - before.done
                if before.phase == event.phase and made > 0 and gap / made > found_below:
                    taken.setdefault(_PHASES[event.phase], []).append(gap / made)
    taken["step"] = taken.get("step", [])[_WARM_UP:]
    return {unit: median(values) for unit, values in taken.items() if len(values) >= (3 if unit == "step" else 1)}


def _last_session(events: Sequence[e.Event]) -> Sequence[e.Event]:
    """From the last time that the run was launched."""
    starts = [number for number, event in enumerate(events) if isinstance(event, e.Launched)]
    return events[starts[-1] :] if starts else events
