"""The studio's requests: folders under studio/requests/ that ask for pictures, and tell what became of them.

    requests/<time>/  request.json  what to draw    events.jsonl  what happened    ask/  "cancel", "ahead"
                      todo          there until it has ended
    looks/<time>/     <number>.webp, early looks at its pictures

Whoever asks writes a folder and looks at it; jobs.studio_worker, one process a workspace, draws.
"""

from __future__ import annotations

import datetime
import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reparam_diffusion import events as e
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import new_folder, write_whole
from reparam_diffusion.gallery import images, shelf
from reparam_diffusion.gallery.recipe import Recipe
from reparam_diffusion.jobs import locks, runs, worker
from reparam_diffusion.workspace import require_workspace

MODULE = "reparam_diffusion.jobs.studio_worker"
MOST_PICTURES = 64
KEPT = 100
"""How many ended requests stay on disk. Their pictures lie elsewhere and stay."""
WAITING = "waiting for the device"

State = Literal["queued", "waiting", "drawing", "finished", "failed", "cancelled", "lost"]
Ask = Literal["cancel", "ahead"]


class Request(BaseModel):
    """Pictures to draw. With `rows` and `columns` they fill a sheet row by row, else `labels` name them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipes: tuple[Recipe, ...] = Field(min_length=1, max_length=MOST_PICTURES)
    kind: Literal["pictures", "sweep", "grid"] = "pictures"
    about: str = ""
    labels: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    device: str = "auto"

    @model_validator(mode="after")
    def _names_fit(self) -> Request:
        assert not self.labels or len(self.labels) == len(self.recipes)
        assert not self.rows or len(self.rows) * len(self.columns) == len(self.recipes)
        return self


@dataclass(frozen=True)
class RequestState:
    """Where a request stands. `pictures` and `looks` by their number; `done` of `total` counts steps."""

    state: State = "queued"
    phase: str = ""
    done: int = 0
    total: int = 0
    pictures: dict[int, Path] = field(default_factory=dict)
    looks: dict[int, Path] = field(default_factory=dict)
    sheet: Path | None = None
    warnings: tuple[str, ...] = ()
    message: str = ""
    seconds: float = 0.0
    waiting_for: str = ""
    """The process that holds the device, in words, while the request waits for it."""

    @property
    def is_live(self) -> bool:
        """Whether something is still to come."""
        return self.state in ("queued", "waiting", "drawing")


def studio_of(workspace: Path) -> Path:
    """The studio's own folder."""
    return workspace.resolve() / "studio"


def workspace_of(folder: Path) -> Path:
    """The workspace that a request belongs to."""
    return folder.resolve().parents[2]


def looks_of(folder: Path) -> Path:
    """Where early looks at a request's pictures are; a folder of its own, since browsers fetch from it."""
    return folder.parents[1] / "looks" / folder.name


def log_file(workspace: Path) -> Path:
    """Where the studio's output goes."""
    return studio_of(workspace) / "log.txt"


def studio_lock(workspace: Path) -> Path:
    """What the studio's process holds for its life."""
    return studio_of(workspace) / "lock"


# --- asking ----------------------------------------------------------------------------------------------------------
def submit(workspace: Path, request: Request) -> Path:
    """Ask for pictures; gives the request's folder. The studio is started if there is none.

    Raises UserError for an adapter that is not there, or a picture to begin from.
    """
    for name in {use.name for recipe in request.recipes for use in recipe.adapters}:
        adapter_file(name, workspace)
    for name in {name for recipe in request.recipes for name in (recipe.image, recipe.mask) if name}:
        images.source_of(name, workspace)
    require_workspace(workspace, "studio")
    folder = new_folder(studio_of(workspace) / "requests", f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}")
    write_whole(folder / "request.json", request.model_dump_json())
    (folder / "todo").touch()  # from here on it counts
    wake(workspace, folder)
    return folder


def wake(workspace: Path, folder: Path | None = None) -> None:
    """Start the studio unless it is there; `folder` is the request that it is started for."""
    studio_of(workspace).mkdir(parents=True, exist_ok=True)
    with locks.try_hold(studio_lock(workspace), patience=0.2) as is_free:  # whoever looks holds it for an instant
        pass
    if not is_free:
        return
    with log_file(workspace).open("ab") as log:
        process = worker.start_detached([sys.executable, "-m", MODULE, str(workspace.resolve())], log)
    if folder is not None:
        with runs.EventLog(folder) as events:
            events.append(e.Launched(process.pid, str(folder)))


def ask(folder: Path, request: Ask) -> None:
    """Leave word for the studio: cancel, or go ahead although a run holds the device."""
    (folder / "ask").mkdir(exist_ok=True)
    (folder / "ask" / request).touch()


def cancel(folder: Path) -> None:
    """Ask for no more of a request's pictures; those that are finished stay."""
    ask(folder, "cancel")


def is_asked(folder: Path, request: Ask) -> bool:
    """Whether that word was left."""
    return (folder / "ask" / request).exists()


def adapter_file(name: str, workspace: Path) -> Path:
    """An adapter by its name on the shelf, or by its path inside the workspace's runs. Raises UserError."""
    workspace = workspace.resolve()
    if name.startswith("runs/"):
        file = (workspace / name).resolve()
        if file.is_relative_to(workspace / "runs") and file.suffix == ".safetensors" and file.is_file():
            return file
        raise UserError(f"The checkpoint {name} is not there.", "It may have been deleted.", "Choose another one.")
    if "/" in name or "\\" in name or name.startswith("~"):
        raise UserError(f'"{name}" is no adapter of this gallery.', do="Use its name there.")
    return shelf.find(name, workspace)


# --- looking ---------------------------------------------------------------------------------------------------------
def list_requests(workspace: Path) -> list[Path]:
    """The folders of all requests, the newest first."""
    found = (studio_of(workspace) / "requests").glob("*/request.json")
    return sorted((file.parent for file in found), key=lambda folder: folder.name, reverse=True)


def todo(workspace: Path) -> list[Path]:
    """Requests that have not ended, the oldest first."""
    return sorted(file.parent for file in (studio_of(workspace) / "requests").glob("*/todo"))


def read_request(folder: Path) -> Request:
    """What was asked for. Raises UserError when the folder is no request."""
    try:
        return Request.model_validate_json((folder / "request.json").read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        why = "It is damaged, or of another version." if isinstance(error, ValidationError) else f"{error.strerror}."
        raise UserError("This request cannot be read.", why, "Generate again.") from None


def find_request(workspace: Path, name: str | None) -> Path | None:
    """The folder of a request by its name; None when it is not there."""
    folder = studio_of(workspace) / "requests" / (name or "-")
    is_name = name is not None and name.replace("-", "").isdecimal()
    return folder if is_name and (folder / "request.json").is_file() else None


class Reader:
    """Looks at requests again and again, each time reading only what is new. Any number of threads may look."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[int, list[e.Event]]] = {}
        self._lock = threading.Lock()

    def state_of(self, folder: Path) -> RequestState:
        """Where a request stands now."""
        held = locks.is_held(studio_lock(workspace_of(folder)))  # asked first: who lets go of it has written before
        with self._lock:
            offset, events = self._known.get(folder, (0, []))
            new, offset = runs.read_events(folder, offset)
            for event in new:
                if isinstance(event, e.Prepared) and events and isinstance(events[-1], e.Prepared):
                    events[-1] = event  # only the last one counts
                else:
                    events.append(event)
            self._known[folder] = offset, events
            while len(self._known) > KEPT:
                del self._known[next(iter(self._known))]
            return _seen(folder, tuple(events), held=held)


def state_of(folder: Path) -> RequestState:
    """Where a request stands now, read from the start."""
    return Reader().state_of(folder)


def _seen(folder: Path, events: Sequence[e.Event], *, held: bool) -> RequestState:
    """What events say, and what they cannot: a cancel that nobody has read, a studio that is gone, early looks."""
    state = _folded(events, workspace_of(folder))
    if not state.is_live:
        return state
    if is_asked(folder, "cancel") and state.state == "queued":
        return replace(state, state="cancelled")
    if not held and not any(runs.is_starting(event) for event in events):
        return replace(state, state="lost", message="The studio ended without a word. Draw again to start it anew.")
    looks = {int(file.stem): file for file in looks_of(folder).glob("*.webp") if file.stem.isdecimal()}
    return replace(state, looks={number: file for number, file in looks.items() if number not in state.pictures})


def _folded(events: Sequence[e.Event], workspace: Path) -> RequestState:
    """A request's events, taken together."""
    values: dict[str, object] = {}
    pictures: dict[int, Path] = {}
    warnings: list[str] = []
    for event in events:
        match event:
            case e.Prepared():
                state = "waiting" if event.phase == WAITING else "drawing"
                values |= {"state": state, "phase": event.phase, "done": event.done, "total": event.total}
                values["waiting_for"] = event.waiting_for
            case e.Drawn(sheet=True):
                values["sheet"] = workspace / event.path
            case e.Drawn():
                pictures[event.number] = workspace / event.path
            case e.Warned():
                warnings.append(event.message)
            case e.Failed():
                words = " ".join(part for part in (event.what, event.why, event.do) if part)
                values |= {"state": "failed", "message": words}
            case e.Cancelled():
                values["state"] = "cancelled"
            case e.Finished():
                values |= {"state": "finished", "seconds": event.seconds}
    return RequestState(**values, pictures=pictures, warnings=tuple(dict.fromkeys(warnings)))  # type: ignore[arg-type]  # fields by name


def tidy(workspace: Path) -> None:
    """Forget the oldest requests that have ended."""
    for folder in list_requests(workspace)[KEPT:]:
        if not (folder / "todo").exists():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(looks_of(folder), ignore_errors=True)
