"""The shelf of finished and imported adapters: <slug>.safetensors, its picture <slug>.png and its notes <slug>.json.

The notes are what a person edits, in A1111's sidecar keys, so that its extra-networks page shows them as they are.
An adapter's file is never rewritten and never overwritten.
"""

from __future__ import annotations

import difflib
import filecmp
import json
import os
import shutil
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from reparam_diffusion.errors import UserError
from reparam_diffusion.files import write_whole

NO_FACTS: dict[str, object] = {
    "activation text": "",
    "preferred weight": 1.0,
    "notes": "",
    "description": "",
    "sd version": "Unknown",
}


@dataclass(frozen=True)
class Shelved:
    """One adapter on the shelf, with its picture and its notes where it has them."""

    file: Path
    name: str
    thumbnail: Path | None = None
    facts: dict[str, object] = field(default_factory=dict)


def make_slug(name: str, *, otherwise: str = "adapter") -> str:
    """A file name from any text: letters and digits in lower case with single hyphens between, 48 at most."""
    plain = unicodedata.normalize("NFKC", name).lower()
    words = "".join(letter if letter.isalnum() else " " for letter in plain).split()
    return "-".join(words)[:48].strip("-") or otherwise


def shelf_of(workspace: Path) -> Path:
    """The folder where a workspace keeps its adapters."""
    return workspace / "adapters"


def add(
    file: Path,
    workspace: Path,
    *,
    name: str,
    thumbnail: Path | None = None,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Put a copy of an adapter on the shelf and say where. A taken name gets a number, unless it is the same file.

    `thumbnail` is a PNG. `facts` are sidecar keys such as "activation text"; the rest keep their defaults.
    """
    shelf = shelf_of(workspace)
    shelf.mkdir(parents=True, exist_ok=True)
    slug = make_slug(name)
    beside = shelf / f".{slug}.{os.getpid()}.part"
    try:
        shutil.copyfile(file, beside)
        target, is_new = _settle_name(beside, slug)
    finally:
        beside.unlink(missing_ok=True)
    if is_new:
        if thumbnail is not None and thumbnail.is_file():
            write_whole(target.with_suffix(".png"), thumbnail.read_bytes())
        notes = {"name": name or slug} | NO_FACTS | dict(facts or {})
        write_whole(target.with_suffix(".json"), json.dumps(notes, ensure_ascii=False, indent=2))
    return target


def _settle_name(beside: Path, slug: str) -> tuple[Path, bool]:
    """Give the copy its final name: slug, slug-2, slug-3 … or the name under which the same bytes lie there already."""
    number = 1
    while True:
        target = beside.with_name(f"{slug}.safetensors" if number == 1 else f"{slug}-{number}.safetensors")
        if target.exists():
            if filecmp.cmp(beside, target, shallow=False):
                return target, False
            number += 1
            continue
        try:
            os.link(beside, target)  # fails where another process was quicker, unlike a rename
        except FileExistsError:
            continue
        except OSError:  # a disk without hard links
            beside.replace(target)
        return target, True


def list_adapters(workspace: Path) -> list[Shelved]:
    """Everything on the shelf, the newest first."""
    files = [file for file in shelf_of(workspace).glob("*.safetensors") if not file.name.startswith(".")]
    files.sort(key=lambda file: (-file.stat().st_mtime, file.name))
    return [_read(file) for file in files]


def _read(file: Path) -> Shelved:
    facts: dict[str, object] = {}
    with suppress(OSError, ValueError):  # no notes, or notes that a person broke: the adapter is there all the same
        found = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        facts = found if isinstance(found, dict) else {}
    thumbnail = file.with_suffix(".png")
    name = facts.get("name")
    return Shelved(
        file=file,
        name=name if isinstance(name, str) and name else file.stem,
        thumbnail=thumbnail if thumbnail.is_file() else None,
        facts=facts,
    )


def find(name: str, workspace: Path) -> Path:
    """An adapter by its file's name, its slug, the name a person gave it, or a path to a .safetensors file.

    Raises UserError with the nearest name.
    """
    path = Path(name).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        return path
    known: dict[str, Path] = {}
    for shelved in reversed(list_adapters(workspace)):  # the newest of two with one name wins
        for alias in (shelved.name, make_slug(shelved.name)):
            known[alias.lower()] = shelved.file
    for shelved in list_adapters(workspace):  # but a file's own name comes before any given name
        known[shelved.file.stem.lower()] = shelved.file
    wanted = name.removesuffix(".safetensors")
    for key in (wanted.lower(), make_slug(wanted)):
        if key in known:
            return known[key]
    close = difflib.get_close_matches(make_slug(wanted), sorted(known), 1, 0.4)
    if close:
        hint = f'Did you mean "{close[0]}"?'
    elif known:
        hint = f"There are: {', '.join(sorted({file.stem for file in known.values()})[:12])}."
    else:
        hint = "The gallery is empty: train an adapter first, or give the path of a .safetensors file."
    raise UserError(f'There is no adapter called "{name}".', do=hint)
