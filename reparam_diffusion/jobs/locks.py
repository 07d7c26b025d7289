"""Locks that end with their process, however it ends: one on each run, one on each device of the machine."""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from reparam_diffusion.errors import UserError


def run_lock(folder: Path) -> Path:
    """The file that a run's worker holds for its life."""
    return folder / "lock"


def device_lock(device: str) -> Path:
    """The file that whoever computes on a device holds. It belongs to the machine and the user, not to a workspace."""
    user = str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()
    name = re.sub(r"[^a-z0-9]+", "-", f"{user}-{device}".lower())
    return Path(tempfile.gettempdir()) / f"reparam-diffusion-{name}.lock"


def device_name(device: str) -> str:
    """A device's name with its number, under which it is locked: "auto" and "cuda" may mean the same one."""
    from reparam_diffusion.models.precision import pick_device

    place = pick_device(device)
    if place.type != "cuda":
        return place.type
    number = place.index or 0
    visible = [card.strip() for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return f"cuda:{visible[number] if number < len(visible) and visible[number] else number}"


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
def try_hold(lock: Path, *, patience: float = 0.0) -> Iterator[bool]:
    """Hold the lock for the body if nobody else does for `patience` seconds; says whether it is held."""
    held = FileLock(lock, timeout=patience, poll_interval=0.02, thread_local=False)
    try:
        held.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        held.release()


@contextmanager
def try_hold_all(locks: Sequence[Path]) -> Iterator[bool]:
    """Hold all of these locks for the body if each is free, else none; says whether they are held."""
    with ExitStack() as held:
        has_all = all(held.enter_context(try_hold(lock)) for lock in locks)
        if not has_all:
            held.close()
        yield has_all
