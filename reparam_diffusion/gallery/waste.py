"""The bin: deleted adapters with their notes and pictures, each in workspace/bin/adapters/<time>-<stem>/."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import shelf

SIDES = (".json", ".civitai.info", *shelf.PICTURES)
"""What belongs to an adapter and goes where it goes."""


@dataclass(frozen=True)
class Binned:
    """One deleted adapter. `key` names its folder in the bin."""

    key: str
    shelved: shelf.Shelved

    @property
    def when(self) -> str:
        """When it was deleted, as "2026-11-24 03:52"."""
        day, time = self.key[:8], self.key[9:13]
        return f"{day[:4]}-{day[4:6]}-{day[6:]} {time[:2]}:{time[2:]}"


def bin_of(workspace: Path) -> Path:
    """The folder of deleted adapters."""
    return workspace / "bin" / "adapters"


def put(stem: str, workspace: Path, *, now: datetime) -> str:
    """Move an adapter from the shelf to the bin; returns its key there. Raises UserError when it is gone already."""
    with shelf.changing(workspace):
        file = shelf.at(stem, workspace)
        place = keep_sides(file, workspace, now=now)
        shutil.move(file, place / file.name)  # not a rename: the shelf may be a link to another disk
        for ending in SIDES:
            shelf.companion(file, ending).unlink(missing_ok=True)
    return place.name


def keep_sides(file: Path, workspace: Path, *, now: datetime) -> Path:
    """A new folder in the bin with copies of what lies beside an adapter, for the adapter itself to follow.

    In this order, so that whatever is interrupted leaves the adapter with its notes in one of the two places.
    """
    bin_of(workspace).mkdir(parents=True, exist_ok=True)
    wanted = f"{now:%Y%m%d-%H%M%S}-{shelf.stem_of(file)}"
    for key in shelf.numbered(wanted):
        place = bin_of(workspace) / key
        if not place.exists():
            break
    place.mkdir()
    for ending in SIDES:
        side = shelf.companion(file, ending)
        if side.is_file():
            shutil.copy2(side, place / side.name)
    return place


def list_bin(workspace: Path) -> list[Binned]:
    """What is in the bin, the last deleted first."""
    keys = sorted(shelf.names_in(bin_of(workspace)), reverse=True)
    return [one for key in keys for one in _inside(key, workspace)]


def binned(key: str, workspace: Path) -> Binned:
    """One thing in the bin. Raises UserError when it is not, or no longer, there."""
    if key in shelf.names_in(bin_of(workspace)):  # so that no key leads out of the bin
        for one in _inside(key, workspace):
            return one
    raise UserError("This is not in the bin any more.", "It may have been restored or deleted meanwhile.")


def _inside(key: str, workspace: Path) -> list[Binned]:
    """The adapter in one folder of the bin; none in what is no such folder."""
    if not re.match(r"\d{8}-\d{6}-", key):
        return []
    return [Binned(key, shelf.shelved_at(file)) for file in shelf.adapters_in(bin_of(workspace) / key)[:1]]


def restore(key: str, workspace: Path) -> Path:
    """Put a deleted adapter back on the shelf and say where: under its old name, or with a number if that is taken."""
    with shelf.changing(workspace):
        old = binned(key, workspace).shelved.file
        stem = shelf.free_name(shelf.shelf_of(workspace), shelf.stem_of(old))
        target = shelf.shelf_of(workspace) / (stem + old.name.removeprefix(shelf.stem_of(old)))
        for ending in SIDES:
            side = shelf.companion(old, ending)
            if side.is_file():
                shutil.copy2(side, shelf.companion(target, ending))
        shutil.move(old, target)
        shutil.rmtree(old.parent)
    return target


def empty(workspace: Path, keys: Iterable[str] | None = None) -> int:
    """Delete for good: these, or everything in the bin. Returns how many that were."""
    with shelf.changing(workspace):
        there = {one.key: one for one in list_bin(workspace)}
        gone = [there[key] for key in (there if keys is None else keys) if key in there]
        for one in gone:
            shutil.rmtree(one.shelved.file.parent)
    return len(gone)
