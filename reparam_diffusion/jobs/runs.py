"""Run folders: config.toml, events.jsonl, log.txt, lock and ask/. Whoever looks at them needs nothing else."""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]  # it ships no types

from reparam_diffusion.config import TrainConfig, adapter_name, choose_seeds, read_settings, settle, to_toml
from reparam_diffusion.data.masks import ALPHA, BESIDE
from reparam_diffusion.errors import NothingToDo, UserError
from reparam_diffusion.events import Event, Failed, Finished, Launched, Lost, Paused, Stopped, from_json
from reparam_diffusion.files import new_folder, write_whole
from reparam_diffusion.gallery.shelf import locate, make_slug
from reparam_diffusion.jobs import locks
from reparam_diffusion.jobs.event_log import EventLog
from reparam_diffusion.jobs.fold import Fold, RunState
from reparam_diffusion.jobs.locks import is_held, run_lock
from reparam_diffusion.jobs.ray_note import WAITING_FOR_RAY, RayNote, read_note
from reparam_diffusion.training.check import check_model_here, check_settings

__all__ = [
    "EventLog",
    "Follower",
    "RunState",
    "ask",
    "asked",
    "check_not_queued",
    "check_running",
    "check_unfinished",
    "clear_requests",
    "create_run",
    "devices_of",
    "has_ended",
    "has_worker",
    "is_starting",
    "list_runs",
    "log_file",
    "queue_file",
    "read_config",
    "read_events",
    "read_queue",
    "size_of_events",
    "state_of",
    "take_sample",
    "with_start",
    "workspace_of",
]

Request = Literal["stop", "pause", "sample"]
REQUESTS: tuple[Request, ...] = ("stop", "pause", "sample")
PATIENCE = 60.0  # seconds that a process of another machine is given until it must hold its lock


def create_run(config: TrainConfig, workspace: Path, *, now: datetime.datetime) -> Path:
    """A new run's folder with its complete config.toml. Pictures stay where they are; their paths become absolute."""
    check_settings(config)
    config = choose_seeds(_with_absolute_paths(with_start(config, workspace)))
    check_model_here(config)
    name = f"{now:%Y%m%d-%H%M%S}-{make_slug(adapter_name(config))}"
    folder = new_folder(workspace.resolve() / "runs", name)
    write_whole(folder / "config.toml", to_toml(config))
    return folder


def with_start(config: TrainConfig, workspace: Path) -> TrainConfig:
    """The settings with the whole path of the adapter to train on from. Raises UserError when there is none."""
    name = config.training.start_from
    if not name:
        return config
    try:
        found = locate(name, workspace)
    except UserError as error:
        raise UserError(error.what, error.why, error.do, place="training.start_from") from None
    training = config.training.model_copy(update={"start_from": str(found.resolve())})
    return config.model_copy(update={"training": training})


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    data = config.data
    images = _absolute(data.images) if isinstance(data.images, str) else [_absolute(image) for image in data.images]
    sets = [
        one.model_copy(
            update={
                "images": _absolute(one.images),
                "masks": None if one.masks is None else _masks_absolute(one.masks),
            }
        )
        for one in data.sets
    ]
    model = {
        name: str(Path(path).expanduser().resolve())
        for name, path in (("path", config.model.path), ("vae", config.model.vae))
        if path not in ("", "starter") and Path(path).expanduser().exists()
    }
    return config.model_copy(
        update={
            "data": data.model_copy(update={"images": images, "masks": _masks_absolute(data.masks), "sets": sets}),
            "model": config.model.model_copy(update=model),
        }
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path else ""


def _masks_absolute(masks: str) -> str:
    """data.masks with its folder's path made absolute; a word stays."""
    return masks if masks in (ALPHA, BESIDE) else _absolute(masks)


def workspace_of(folder: Path) -> Path:
    """The workspace that a run's folder lies in."""
    return folder.resolve().parent.parent


def log_file(folder: Path) -> Path:
    """Where the worker's output goes."""
    return folder / "log.txt"


def read_config(folder: Path) -> TrainConfig:
    """A run's settings. Raises UserError when the folder is no run."""
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder} is not a run.", "It has no config.toml.", "Check the path.")
    return settle(read_settings(folder / "config.toml"))


def list_runs(workspace: Path) -> list[Path]:
    """The folders of all runs, the newest first."""
    runs = (workspace.resolve() / "runs").glob("*/config.toml")
    return sorted((file.parent for file in runs), key=lambda folder: folder.name, reverse=True)


# --- the queue, as whoever looks at runs needs it --------------------------------------------------------------------
def queue_file(workspace: Path) -> Path:
    """Where a workspace keeps who waits; jobs.queue writes it."""
    return workspace / "queue.json"


def read_queue(workspace: Path) -> dict[str, bool]:
    """Names of the runs that wait, the next one first, and whether each goes on from a checkpoint.

    A damaged file is put aside: it holds an order of runs and no more.
    """
    try:
        rows = json.loads(queue_file(workspace).read_text(encoding="utf-8"))
        return {str(row["run"]): bool(row.get("resume")) for row in rows}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        with suppress(OSError):
            queue_file(workspace).replace(workspace / "queue.damaged.json")
        return {}


# --- events ----------------------------------------------------------------------------------------------------------
def read_events(folder: Path, offset: int = 0) -> tuple[list[Event], int]:
    """The events after a byte offset, and the offset to go on from. A torn last line is left for the next time."""
    try:
        with (folder / "events.jsonl").open("rb") as file:
            file.seek(offset)
            new = file.read()
    except FileNotFoundError:
        return [], offset
    whole = new[: new.rfind(b"\n") + 1]
    found = []
    for line in whole.splitlines():
        try:
            found.append(from_json(line.decode()))
        except ValueError:  # torn by a kill, or from a newer version: the other lines still tell the run
            continue
    return found, offset + len(whole)


def size_of_events(folder: Path) -> int:
    """Bytes that a run has told so far: from there on its events are new."""
    try:
        return (folder / "events.jsonl").stat().st_size
    except FileNotFoundError:
        return 0


class Follower:
    """Follows one run: each look reads only what is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fold = Fold()
        self._offset = 0

    def look(self) -> RunState:
        """The run's state now."""
        # The lock is asked first: whoever lets go of it has written its last event before.
        held = is_held(run_lock(self.folder))
        self._read()
        last = self._fold.last
        note = read_note(self.folder)
        held = held or note is not None or is_starting(last)
        state = self._fold.state(is_held=held)
        if state.state == "lost" and is_held(run_lock(self.folder)):
            state = self._fold.state(is_held=True)  # a worker took it between the two looks
        if note is not None and _waits(note, last) and not is_held(run_lock(self.folder)):
            state = replace(state, state="queued", phase=WAITING_FOR_RAY, phase_total=0, message="")
        if state.is_live:
            trouble = note.trouble if note else ""
            return replace(state, warnings=[trouble, *state.warnings]) if trouble else state
        line = list(read_queue(workspace_of(self.folder)))
        if self.folder.name not in line:
            return state
        place = line.index(self.folder.name) + 1
        return replace(state, state="queued", place=place, message="", waiting_for=_holders(self.folder) or None)

    def _read(self) -> None:
        file = self.folder / "events.jsonl"
        if self._offset and (not file.exists() or file.stat().st_size < self._offset):
            self._fold, self._offset = Fold(), 0  # the file was replaced
        new, self._offset = read_events(self.folder, self._offset)
        for event in new:
            self._fold.feed(event)


def devices_of(folder: Path) -> frozenset[str]:
    """The devices that a run wants, read again when its settings have changed."""
    try:
        age = (folder / "config.toml").stat().st_mtime_ns
    except FileNotFoundError:
        age = 0
    return _devices_at(folder, age)


@lru_cache(maxsize=1024)
def _devices_at(folder: Path, age: int) -> frozenset[str]:
    return frozenset(locks.devices_of(read_config(folder)))


def _holders(folder: Path) -> str:
    """The processes that hold the devices of a run in the queue, in words; "" where they are free."""
    try:
        wanted = sorted(devices_of(folder))
    except UserError:  # its settings are damaged; the queue says so at its turn
        return ""
    workspace = workspace_of(folder)
    named = (locks.describe_holder(locks.device_lock(device), workspace) for device in wanted)
    return ", ".join(dict.fromkeys(filter(None, named)))


def _waits(note: RayNote, last: Event | None) -> bool:
    """Whether Ray has not begun with a run. While Ray is silent the run's own words are newer than the note."""
    return note.status == "NEW" or (note.waits and isinstance(last, Launched))


def has_worker(folder: Path) -> bool:
    """Whether a process works on the run, or was launched for it and is on its way to the lock, or Ray has it."""
    return is_held(run_lock(folder)) or read_note(folder) is not None or is_starting(_last_event(folder))


def has_ended(folder: Path) -> bool:
    """Whether a run's last word says that it has ended, and how."""
    return isinstance(_last_event(folder), Finished | Stopped | Paused | Failed | Lost)


def check_unfinished(folder: Path) -> None:
    """Raise NothingToDo for a run that has done all of its steps: a finished run stays finished."""
    if not isinstance(_last_event(folder), Finished | Failed | Launched):
        return
    fold = Fold()
    for event in read_events(folder)[0]:
        fold.feed(event)
    if isinstance(fold.last, Finished) and read_config(folder).training.steps <= fold.last.step:
        raise NothingToDo(
            f"The run {folder.name} is finished.",
            f"It has done all {fold.last.step} steps.",
            "To train longer, start a new run that continues from its adapter.",
        )


def check_running(folder: Path, *, or_queued: bool = False) -> None:
    """Raise UserError for a run that is not running and so cannot be asked for anything."""
    state = state_of(folder).state
    if state != "running" and not (or_queued and state == "queued"):
        raise UserError(f"The run {folder.name} is not running.", f"It is {state}.")


def check_not_queued(folder: Path) -> None:
    """Raise UserError for a run that is in its workspace's queue."""
    line = list(read_queue(workspace_of(folder)))
    if folder.name in line:
        raise UserError(
            f"The run {folder.name} is in the queue already.",
            f"Its place is {line.index(folder.name) + 1} of {len(line)}.",
            "It starts by itself; to start it here, take it out of the queue first (stop).",
        )


def _last_event(folder: Path) -> Event | None:
    """The last line of events.jsonl that is whole."""
    try:
        with (folder / "events.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().splitlines()
        return from_json(lines[-1].decode()) if lines else None
    except (OSError, ValueError):
        return None


def is_starting(last: Event | None) -> bool:
    """Whether a process was launched that lives but has not got as far as the lock.

    A process of another machine is never looked up here, where its number is somebody else's: only its lock tells.
    """
    if not isinstance(last, Launched) or last.pid <= 0:
        return False
    if last.host != socket.gethostname():
        return time.time() - last.time < PATIENCE
    return _is_alive(last.pid, started=last.time)


def _is_alive(pid: int, *, started: float) -> bool:
    """Whether this very process lives: not a zombie, and not a later one with the same number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= started + 1
    except psutil.Error:
        return False


def state_of(folder: Path) -> RunState:
    """A run's state, read from the start."""
    return Follower(folder).look()


# --- requests --------------------------------------------------------------------------------------------------------
def ask(folder: Path, request: Request) -> None:
    """Leave a request for a run's worker: stop, pause, or draw a preview now."""
    if request not in REQUESTS:
        raise UserError(f'A run cannot be asked to "{request}".', do=f"Ask for one of {', '.join(REQUESTS)}.")
    (folder / "ask").mkdir(exist_ok=True)
    (folder / "ask" / request).touch()


def asked(folder: Path) -> str:
    """ "stop" or "pause" when that was asked for, else ""."""
    return next((request for request in ("stop", "pause") if (folder / "ask" / request).exists()), "")


def take_sample(folder: Path) -> str:
    """ "sample" once for each request for previews, else ""."""
    try:
        (folder / "ask" / "sample").unlink()
    except FileNotFoundError:
        return ""
    return "sample"


def clear_requests(folder: Path) -> None:
    """Forget what was asked."""
    for request in REQUESTS:
        (folder / "ask" / request).unlink(missing_ok=True)
