"""What a training run, or a drawing, says while it works: frozen values, one JSON line each."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict, dataclass, field, fields


@dataclass(frozen=True)
class Event:
    """Something that happened. `time` is seconds since 1970."""

    time: float = field(default_factory=time.time, kw_only=True)

    def to_json(self) -> str:
        """One line without a newline, with the event's name under "event"."""
        return json.dumps({"event": type(self).__name__, **asdict(self)}, ensure_ascii=False)


@dataclass(frozen=True)
class Launched(Event):
    """A run has begun in `folder`; nothing is loaded yet."""

    pid: int
    folder: str
    job: str = ""
    """Ray's name for it, where Ray runs it."""
    host: str = field(default_factory=socket.gethostname)
    """The machine whose number `pid` is. A line without it, from an older version, reads as this machine's."""


@dataclass(frozen=True)
class Started(Event):
    """The model is loaded and the adapters are attached."""

    method: str
    steps: int
    first_step: int
    sites: int
    parameters: int
    file_bytes: int
    device: str
    precision: str
    pictures: int
    ranks: dict[str, int] = field(default_factory=dict)
    sets: list[str] = field(default_factory=list)
    """Where there are several sets: each in words, such as "sks toy: 6 pictures, weight 0.5"."""
    processes: int = 1


@dataclass(frozen=True)
class Prepared(Event):
    """A part of the preparation moved on: `phase` is a plain word such as "class pictures" or "latents"."""

    phase: str
    done: int
    total: int
    waiting_for: str = ""
    """The process that holds the device, in words, while the run waits for it."""


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step. `seconds` is this step alone; `learning_rates` by model part; no norm: it overflowed."""

    step: int
    loss: float
    learning_rates: dict[str, float]
    seconds: float
    gradient_norm: float | None


@dataclass(frozen=True)
class Validated(Event):
    """Loss with fixed noise; `held_out` says whether the pictures were kept out of training."""

    step: int
    loss: float
    held_out: bool
    best: bool = False


@dataclass(frozen=True)
class Sampled(Event):
    """A preview picture was drawn; `path` is relative to the run's folder. Step 0 is the base model."""

    step: int
    prompt: str
    seed: int
    path: str


@dataclass(frozen=True)
class Ranked(Event):
    """How many ranks are alive at each site now (AdaLoRA)."""

    step: int
    ranks: dict[str, int]


@dataclass(frozen=True)
class Saved(Event):
    """A file was written: `kind` is "checkpoint", "adapter" (finished) or "gallery"; `path` is relative to the run."""

    step: int
    path: str
    kind: str


@dataclass(frozen=True)
class Warned(Event):
    """Something a person should know that does not end the run."""

    message: str


@dataclass(frozen=True)
class Paused(Event):
    """The run saved its place and ended; it can be resumed."""

    step: int


@dataclass(frozen=True)
class Stopped(Event):
    """The run was asked to stop, saved its adapter and ended; it can be resumed."""

    step: int
    path: str


@dataclass(frozen=True)
class Failed(Event):
    """The run ended with an error, told as UserError tells it."""

    what: str
    why: str = ""
    do: str = ""


FINISHED_BEFORE = "This run is finished."
"""The Failed with which version 0.1 answered the resume of a finished run."""


@dataclass(frozen=True)
class Lost(Event):
    """The run ended without a word of its own; who started it knows why."""

    why: str


@dataclass(frozen=True)
class Finished(Event):
    """All steps are done and the adapter is written."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True)
class Drawn(Event):
    """A picture of a request is finished; `path` is relative to the workspace. `sheet`: it shows all of them."""

    number: int
    path: str
    seconds: float
    sheet: bool = False


@dataclass(frozen=True)
class Cancelled(Event):
    """A request was cancelled; what was drawn before stays."""


_KINDS = {kind.__name__: kind for kind in Event.__subclasses__()}


def from_json(line: str) -> Event:
    """The event in one line of events.jsonl. Raises ValueError for a torn or foreign line."""
    row = json.loads(line)
    if not isinstance(row, dict) or row.get("event") not in _KINDS:
        raise ValueError("not an event")
    kind = _KINDS[row.pop("event")]
    known = {f.name for f in fields(kind)}
    try:
        return kind(**{key: value for key, value in row.items() if key in known})
    except TypeError as error:
        raise ValueError(f"not a whole {kind.__name__} event") from error
