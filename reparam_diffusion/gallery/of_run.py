"""One run, one entry on the shelf: what a resumed run learned takes the place of what it had shelved before."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from reparam_diffusion.files import write_whole
from reparam_diffusion.gallery import shelf, waste
from reparam_diffusion.gallery.notes import write_notes

RUN, HASH = "run", "run file sha256"
"""Sidecar keys: the run that made an adapter, and the hash of the file as the run put it there."""


def shelve(
    file: Path,
    workspace: Path,
    *,
    run: str,
    name: str,
    thumbnail: Path | None = None,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Put a run's adapter on the shelf and say where.

    The run's earlier entry, if it still is what the run put there, keeps its name and its notes and gets the new file;
    the old file goes to the bin.
    """
    marks = {RUN: run, HASH: _hash(file)}
    with shelf.changing(workspace):
        old = _earlier(run, workspace)
        if old is not None:
            return _take_place(file, old, workspace, thumbnail=thumbnail, marks=marks)
    return shelf.add(file, workspace, name=name, thumbnail=thumbnail, facts=dict(facts or {}) | marks)


def _earlier(run: str, workspace: Path) -> shelf.Shelved | None:
    """The run's entry whose file nobody has changed since."""
    for one in shelf.list_adapters(workspace):
        if one.facts.get(RUN) == run and one.file.is_file() and one.facts.get(HASH) == _hash(one.file):
            return one
    return None


def _take_place(
    file: Path, old: shelf.Shelved, workspace: Path, *, thumbnail: Path | None, marks: Mapping[str, object]
) -> Path:
    if old.facts.get(HASH) == marks[HASH]:
        return old.file
    with shelf.copied(file, shelf.shelf_of(workspace)) as copy:
        place = waste.keep_sides(old.file, workspace, now=datetime.now())
        shutil.copyfile(old.file, place / old.file.name)
        copy.replace(old.file)  # at no moment is there no adapter of this name
    if thumbnail is not None and thumbnail.is_file():
        write_whole(shelf.companion(old.file, ".png"), thumbnail.read_bytes())
    write_notes(shelf.companion(old.file, ".json"), {**old.facts, **marks})
    return old.file


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
