"""Locks that end with their process, however it ends: one on each run, one on each device of the machine.

The process that holds a device writes a Holder next to the lock, so that those that wait can name it.
"""

from __future__ import annotations

import datetime
import getpass
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it ships no types
from filelock import FileLock, Timeout

from reparam_diffusion.config import TrainConfig
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import beside, cache_file

UNKNOWN_HOLDER = "another process"
"""What is said of a device's holder that has left no name."""


@dataclass(frozen=True)
class Holder:
    """The process that uses a device. `task` is what it does, such as "run 20261128-…"; `since` in seconds (1970)."""

    task: str
    workspace: str
    pid: int = field(default_factory=os.getpid)
    since: float = field(default_factory=time.time)

    def describe(self, workspace: Path) -> str:
        """The holder in words, for a process of `workspace`: "run X (process 12, since 15:08)"."""
        begun = datetime.datetime.fromtimestamp(self.since)
        is_today = begun.date() == datetime.datetime.now().date()
        since = f"{begun:%H:%M}" if is_today else f"{begun:%Y-%m-%d %H:%M}"
        place = "" if Path(self.workspace) == workspace.resolve() else f" of the workspace {self.workspace}"
        return f"{self.task}{place} (process {self.pid}, since {since})"


def run_lock(folder: Path) -> Path:
    """The file that a run's worker holds for its life."""
    return folder / "lock"


def device_lock(device: str) -> Path:
    """The file that a process locks while it computes on a device. It belongs to the machine and the user, not to a
    workspace. A home that several machines share keeps their locks apart.
    """
    user = str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()
    name = re.sub(r"[^a-z0-9]+", "-", f"{socket.gethostname()}-{user}-{device}".lower())
    return _home() / f"reparam-diffusion-{name}.lock"


def _home() -> Path:
    """The folder of the device locks: the user's cache folder, or the temporary one where that cannot be written."""
    home = cache_file("locks")
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir())
    return home if os.access(home, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def read_holder(lock: Path) -> Holder | None:
    """The process that holds a device's lock; None where it has left no name, or where it has ended."""
    try:
        row = json.loads(_note(lock).read_text(encoding="utf-8"))
        holder = Holder(str(row["task"]), str(row["workspace"]), int(row["pid"]), float(row["since"]))
        process = psutil.Process(holder.pid)
        is_alive = process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= holder.since + 1
    except (OSError, ValueError, TypeError, KeyError, psutil.Error):
        return None
    return holder if is_alive else None


def describe_holder(lock: Path, workspace: Path) -> str:
    """The process that holds a device's lock, in words; "" where the lock is free."""
    if not is_held(lock):
        return ""
    holder = read_holder(lock)
    return UNKNOWN_HOLDER if holder is None else holder.describe(workspace)


def _note(lock: Path) -> Path:
    return lock.with_suffix(".json")


@contextmanager
def _named(lock: Path, holder: Holder) -> Iterator[None]:
    """While the body holds the lock, its holder's note lies next to it. Without room for the note the lock counts."""
    with suppress(OSError), beside(_note(lock)) as hidden:
        hidden.write_text(json.dumps(asdict(holder)), encoding="utf-8")
    try:
        yield
    finally:
        with suppress(OSError):
            _note(lock).unlink(missing_ok=True)


def device_name(device: str) -> str:
    """A device's name with its number, under which it is locked: "auto" and "cuda" may mean the same one."""
    from reparam_diffusion.models.precision import pick_device

    place = pick_device(device)
    if place.type != "cuda":
        return place.type
    number = place.index or 0
    visible = [card.strip() for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return f"cuda:{visible[number] if number < len(visible) and visible[number] else number}"


def device_of(config: TrainConfig) -> str:
    """The name under which the run's device, the first of several, is locked."""
    return device_name(config.model.device)


def devices_of(config: TrainConfig) -> list[str]:
    """The names of all devices of this machine that the run will lock; none where Ray gives them out."""
    launch = config.launch
    if launch.launcher == "ray":
        return []
    count = launch.processes
    if launch.launcher == "accelerate" and count == 1:  # then what was answered to `accelerate config` counts
        import torch

        count = torch.cuda.device_count()
    return several_devices(device_of(config), count)


def several_devices(first: str, count: int) -> list[str]:
    """The names of the devices of so many processes: a GPU each, or the one processor for all."""
    if count < 2 or not first.startswith("cuda"):
        return [first]
    return [device_name(f"cuda:{number}") for number in range(count)]


def is_held(lock: Path) -> bool:
    """Whether a living process holds the lock."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0, thread_local=False):
            return False
    except Timeout:
        return True


@contextmanager
def hold_run(folder: Path) -> Iterator[None]:
    """Hold a run for as long as the body works on it. Raises UserError when another process does.

    A second of patience: whoever looks at a run's state takes the lock for an instant.
    """
    lock = FileLock(run_lock(folder), timeout=1, thread_local=False)
    try:
        lock.acquire(poll_interval=0.02)
    except Timeout:
        raise UserError(
            f"The run {folder.name} is being worked on already.",
            "Another process holds it.",
            "Wait for it, or stop it first.",
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def try_hold(lock: Path, *, patience: float = 0.0, holder: Holder | None = None) -> Iterator[bool]:
    """Hold the lock for the body if nobody else does for `patience` seconds; says whether it is held.

    `holder` names this process to those that wait for the lock.
    """
    held = FileLock(lock, timeout=patience, poll_interval=0.02, thread_local=False)
    try:
        held.acquire()
    except Timeout:
        yield False
        return
    try:
        with ExitStack() as named:
            if holder is not None:
                named.enter_context(_named(lock, holder))
            yield True
    finally:
        held.release()


@contextmanager
def try_hold_all(locks: Sequence[Path], *, patience: float = 0.0, holder: Holder | None = None) -> Iterator[bool]:
    """Hold all of these locks for the body if each is free, else none; says whether they are held."""
    with ExitStack() as held:
        has_all = all(held.enter_context(try_hold(lock, patience=patience, holder=holder)) for lock in locks)
        if not has_all:
            held.close()
        yield has_all
