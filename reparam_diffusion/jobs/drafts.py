"""Drafts: pictures and captions that a person has chosen and not started with yet, kept so that a reload loses nothing.

A draft is a folder like a dataset's, under datasets/.drafts/; its draft.json spares looking at the pictures again.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from reparam_diffusion.data.images import Picture, Refused
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import write_whole
from reparam_diffusion.jobs.datasets import About, PictureSet, write_set

KEPT_SECONDS = 7 * 86400.0
LONGEST_CAPTION = 4000  # characters


def keep(chosen: PictureSet, workspace: Path) -> str:
    """Copy a set into a new draft; gives the draft's name."""
    name = secrets.token_hex(8)
    folder = _home(workspace) / name
    folder.mkdir(parents=True)
    tidy(workspace)
    _write(folder, write_set(chosen, folder))
    return name


def read(name: str | None, workspace: Path) -> PictureSet | None:
    """A draft's set; None for a name that is none, or a draft that is gone."""
    folder = _folder(name, workspace)
    if folder is None:
        return None
    try:
        kept = json.loads((folder / "draft.json").read_text(encoding="utf-8"))
        pictures = [_picture(row, folder) for row in kept["pictures"]]
        refused = [Refused(Path(row["path"]), row["why"]) for row in kept["refused"]]
        about = About(**kept["about"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    (folder / "draft.json").touch()  # looked at is not forgotten
    return PictureSet(tuple(pictures), tuple(refused), about)


def _picture(row: dict[str, Any], folder: Path) -> Picture:
    """A picture as draft.json has it. Any: JSON's own values."""
    mask = folder / row["mask"] if row.get("mask") else None
    return Picture(**{**row, "path": folder / row["path"], "notes": tuple(row["notes"]), "mask": mask})


def set_caption(name: str, workspace: Path, picture: str, caption: str, *, only_empty: bool = False) -> PictureSet:
    """Give a picture another caption; an empty one leaves it to the template. Raises UserError when it is gone.

    `only_empty` leaves a caption alone that somebody has written meanwhile.
    """
    text = " ".join(caption.split())
    if len(text) > LONGEST_CAPTION:
        raise UserError(
            "This caption is too long.", f"It has {len(text)} characters.", f"Use at most {LONGEST_CAPTION}."
        )
    with _one_at_a_time(name, workspace) as chosen:
        if picture not in {one.path.name for one in chosen.pictures}:
            raise UserError(f"There is no picture called {picture} any more.", do="Reload the page.")
        pictures = tuple(
            replace(one, caption=text or None)
            if one.path.name == picture and not (only_empty and one.caption is not None)
            else one
            for one in chosen.pictures
        )
        return _write(_home(workspace) / name, replace(chosen, pictures=pictures))


def leave_out(name: str, workspace: Path, picture: str) -> PictureSet:
    """Take a picture out of a draft. The last one stays: a draft has pictures."""
    with _one_at_a_time(name, workspace) as chosen:
        left = tuple(one for one in chosen.pictures if one.path.name != picture)
        if not left:
            raise UserError("This is the last picture.", do="Choose other pictures instead.")
        return _write(_home(workspace) / name, replace(chosen, pictures=left))


@contextmanager
def _one_at_a_time(name: str, workspace: Path) -> Iterator[PictureSet]:
    """The draft as it is now, for one change: a second tab and the describer change it too."""
    with FileLock(folder_of(name, workspace) / ".lock", thread_local=False):
        yield known(name, workspace)


def tidy(workspace: Path, *, now: float | None = None) -> None:
    """Forget drafts that nobody has touched for a week."""
    oldest = (time.time() if now is None else now) - KEPT_SECONDS
    for file in _home(workspace).glob("*/draft.json"):
        if file.stat().st_mtime < oldest:
            shutil.rmtree(file.parent, ignore_errors=True)


def folder_of(name: str, workspace: Path) -> Path:
    """Where a draft lies. Raises UserError when it is gone."""
    known(name, workspace)
    return _home(workspace) / name


def _home(workspace: Path) -> Path:
    return workspace / "datasets" / ".drafts"


def _folder(name: str | None, workspace: Path) -> Path | None:
    """The draft's folder; names come from browsers, so only our own kind is looked up."""
    if not isinstance(name, str) or not re.fullmatch(r"[0-9a-f]{16}", name):
        return None
    folder = _home(workspace) / name
    return folder if folder.is_dir() else None


def known(name: str, workspace: Path) -> PictureSet:
    """A draft's set. Raises UserError when it is gone."""
    chosen = read(name, workspace)
    if chosen is None:
        raise UserError("These pictures are gone.", "They were not touched for a week.", "Choose them again.")
    return chosen


def _write(folder: Path, chosen: PictureSet) -> PictureSet:
    kept = {
        "pictures": [
            {**asdict(picture), "path": picture.path.name, "mask": picture.mask.name if picture.mask else None}
            for picture in chosen.pictures
        ],
        "refused": [{"path": bad.path.name, "why": bad.why} for bad in chosen.refused],
        "about": asdict(chosen.about),
    }
    write_whole(folder / "draft.json", json.dumps(kept, ensure_ascii=False, indent=1))
    return chosen
