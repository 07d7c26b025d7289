"""All runs of a workspace at a glance: each look reads only what is new, and runs that ended are not asked twice."""

from __future__ import annotations

import shutil
import threading
import time
from functools import cache
from pathlib import Path

from reparam_diffusion.data import disk_cache
from reparam_diffusion.errors import UserError, unknown_name
from reparam_diffusion.jobs import queue, runs
from reparam_diffusion.jobs.fold import RunState

SERVED_FOR = 10.0
"""Seconds until it is seen to again that whoever serves the waiting runs is there."""


class Overview:
    """Follows every run of a workspace. Any number of threads may look."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace.resolve()
        self._followers: dict[Path, runs.Follower] = {}
        self._ended: dict[Path, tuple[int, RunState]] = {}
        self._lock = threading.Lock()
        self._served_until = time.monotonic() + SERVED_FOR

    def look(self) -> list[tuple[Path, RunState]]:
        """Every run with its state, the newest first."""
        line = set(runs.read_queue(self.workspace))
        folders = runs.list_runs(self.workspace)
        with self._lock:
            for gone in self._followers.keys() - set(folders):
                del self._followers[gone]
                self._ended.pop(gone, None)
        rows = [(folder, self.state_of(folder, line)) for folder in folders]
        if time.monotonic() > self._served_until and any(state.is_live for _, state in rows):
            self._served_until = time.monotonic() + SERVED_FOR
            queue.ensure_served(self.workspace)
        return rows

    def state_of(self, folder: Path, line: set[str] | None = None) -> RunState:
        """One run's state. `line` are the names of those that wait, when they are known."""
        with self._lock:
            line = set(runs.read_queue(self.workspace)) if line is None else line
            size = _size_of(folder / "events.jsonl")
            kept = self._ended.get(folder)
            if kept is not None and kept[0] == size and folder.name not in line:
                return kept[1]
            follower = self._followers.setdefault(folder, runs.Follower(folder))
            state = follower.look()
            if state.is_live:
                self._ended.pop(folder, None)
            else:
                self._ended[folder] = (size, state)
            return state

    def find(self, name: str | None) -> Path:
        """The folder of a run. Raises UserError when there is none of that name."""
        known = {folder.name: folder for folder in runs.list_runs(self.workspace)}
        if name not in known:
            raise unknown_name("run", name or "", known, do="Train one first.")
        return known[name]

    def newest(self, wanted: str | None = None) -> str | None:
        """Which run to show first: the one that is wanted, else the newest that is live, else the newest."""
        rows = self.look()
        names = [folder.name for folder, _ in rows]
        if wanted in names:
            return wanted
        live = (folder.name for folder, state in rows if state.state == "running")
        return next(live, names[0] if names else None)

    def bin(self, folder: Path) -> Path:
        """Move a run that is not live to the workspace's bin; says where. Its adapter in the gallery stays."""
        if self.state_of(folder).is_live:
            raise UserError("This run is at work.", "Only one that has ended can go to the bin.", "Stop it first.")
        place = self.workspace / "bin" / "runs"
        place.mkdir(parents=True, exist_ok=True)
        target, number = place / folder.name, 1
        while target.exists():
            number += 1
            target = place / f"{folder.name}-{number}"
        shutil.move(folder, target)
        return target


def clear_caches(workspace: Path) -> int:
    """Delete the workspace's caches; says how many bytes are free again. Raises UserError while a run is live."""
    live = [folder.name for folder in runs.list_runs(workspace) if runs.state_of(folder).state == "running"]
    if live:
        raise UserError("The caches are in use.", f"The run {live[0]} is training.", "Wait for it, or stop it first.")
    return disk_cache.clear_caches(workspace)


@cache
def overview_of(workspace: Path) -> Overview:
    """The one overview of a workspace that this process needs."""
    return Overview(workspace)


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
