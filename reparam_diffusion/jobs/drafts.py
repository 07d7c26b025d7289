"""Drafts: pictures and captions that a person has chosen and not started with yet, kept so that a reload loses nothing.

A draft is a folder like a dataset's, under datasets/.drafts/; its draft.json spares looking at the pictures again.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

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
    _write(folder, write_set(chosen, folder))
    return name


def read(name: str | None, workspace: Path) -> PictureSet | None:
    """A draft's set; None for a name that is none, or a draft that is gone."""
    folder = _folder(name, workspace)
    if folder is None:
        return None
    try:
        kept = json.loads((folder / "draft.json").read_text(encoding="utf-8"))
        pictures = [
            Picture(**{**row, "path": folder / row["path"], "notes": tuple(row["notes"])}) for row in kept["pictures"]
        ]
        refused = [Refused(Path(row["path"]), row["why"]) for row in kept["refused"]]
        about = About(**kept["about"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return PictureSet(tuple(pictures), tuple(refused), about)


def set_caption(name: str, workspace: Path, picture: str, caption: str) -> PictureSet:
    """Give a picture another caption; an empty one leaves it to the template. Raises UserError when it is gone."""
    text = " ".join(caption.split())
    if len(text) > LONGEST_CAPTION:
        raise UserError(
            "This caption is too long.", f"It has {len(text)} characters.", f"Use at most {LONGEST_CAPTION}."
        )
    return _changed(name, workspace, picture, text or None)


def leave_out(name: str, workspace: Path, picture: str) -> PictureSet:
    """Take a picture out of a draft. The last one stays: a draft has pictures."""
    chosen = known(name, workspace)
    left = tuple(one for one in chosen.pictures if one.path.name != picture)
    if not left:
        raise UserError("This is the last picture.", do="Choose other pictures instead.")
    changed = replace(chosen, pictures=left)
    _write(_home(workspace) / name, changed)
    return changed


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
    if not name or not re.fullmatch(r"[0-9a-f]{16}", name):
        return None
    folder = _home(workspace) / name
    return folder if folder.is_dir() else None


def known(name: str, workspace: Path) -> PictureSet:
    """A draft's set. Raises UserError when it is gone."""
    chosen = read(name, workspace)
    if chosen is None:
        raise UserError("These pictures are gone.", "They were not touched for a week.", "Choose them again.")
    return chosen


def _changed(name: str, workspace: Path, picture: str, caption: str | None) -> PictureSet:
    chosen = known(name, workspace)
    if picture not in {one.path.name for one in chosen.pictures}:
        raise UserError(f"There is no picture called {picture} any more.", do="Reload the page.")
    pictures = tuple(replace(one, caption=caption) if one.path.name == picture else one for one in chosen.pictures)
    changed = replace(chosen, pictures=pictures)
    _write(_home(workspace) / name, changed)
    return changed


def _write(folder: Path, chosen: PictureSet) -> None:
    kept = {
        "pictures": [{**asdict(picture), "path": picture.path.name} for picture in chosen.pictures],
        "refused": [{"path": bad.path.name, "why": bad.why} for bad in chosen.refused],
        "about": asdict(chosen.about),
    }
    write_whole(folder / "draft.json", json.dumps(kept, ensure_ascii=False, indent=1))
