"""The shelf of finished and imported adapters: <slug>.safetensors, its picture <slug>.png and its notes <slug>.json.

A PEFT adapter is a folder <slug>/ in the place of the file. An adapter is never rewritten and never overwritten; what
a person edits is in the notes. Its file keeps its name for good, so that <lora:slug:1> in old prompts goes on working.
"""

from __future__ import annotations

import difflib
import filecmp
import os
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from reparam_diffusion.errors import UserError, unknown_name
from reparam_diffusion.files import hidden_part, sweep_leftovers, telling, write_whole
from reparam_diffusion.gallery.notes import Notes, changed_notes, new_notes, read_notes, write_notes

ENDING = ".safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICTURES = tuple(
    f"{kind}{ending}" for kind in ("", ".preview") for ending in (".png", ".webp", ".jpg", ".jpeg", ".gif")
)
"""What may follow an adapter's name in the name of its picture. Ours are .png; other programs write the rest."""


@dataclass(frozen=True)
class Shelved:
    """One adapter on the shelf, with its picture and its notes where it has them."""

    file: Path
    name: str
    thumbnail: Path | None = None
    facts: Notes = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """What prompts and addresses call it."""
        return stem_of(self.file)


def make_slug(name: str, *, otherwise: str = "adapter") -> str:
    """A file name from any text: letters and digits in lower case with single hyphens between, 48 at most."""
    plain = unicodedata.normalize("NFKC", name).lower()
    words = "".join(letter if letter.isalnum() else " " for letter in plain).split()
    return "-".join(words)[:48].strip("-") or otherwise


def shelf_of(workspace: Path) -> Path:
    """The folder where a workspace keeps its adapters."""
    return workspace / "adapters"


def stem_of(file: Path) -> str:
    """An adapter's own name: its file's without .safetensors, or its folder's."""
    return file.name.removesuffix(ENDING)


def companion(file: Path, ending: str) -> Path:
    """What lies beside an adapter under its name: companion(teddy.safetensors, ".json") is teddy.json."""
    return file.with_name(stem_of(file) + ending)


@contextmanager
def changing(workspace: Path) -> Iterator[None]:
    """One at a time, whichever process or browser it is. Everything that changes the shelf or the bin holds this."""
    shelf = shelf_of(workspace)
    lock = FileLock(shelf / ".lock", thread_local=False)
    with telling(shelf):
        shelf.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# --- putting things on it --------------------------------------------------------------------------------------------
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
    with changing(workspace), copied(file, shelf_of(workspace)) as copy:
        target, is_new = _settle_name(copy, make_slug(name))
        if is_new:
            if thumbnail is not None and thumbnail.is_file():
                write_whole(companion(target, ".png"), thumbnail.read_bytes())
            write_notes(companion(target, ".json"), new_notes(name or make_slug(name), facts or {}))
    return target


@contextmanager
def copied(file: Path, folder: Path) -> Iterator[Path]:
    """A hidden copy of a file or folder inside `folder`, for the body to move into place; removed if it did not."""
    sweep_leftovers(folder)
    copy = hidden_part(folder / file.name)
    try:
        with telling(folder / file.name):
            if file.is_dir():
                _copy_peft(file, copy)
            else:
                shutil.copyfile(file, copy)
        yield copy
    finally:
        _remove(copy)


def _copy_peft(folder: Path, copy: Path) -> None:
    """Copy what makes up a PEFT adapter, and nothing that may lie around it."""
    for file in folder.rglob("*"):
        if file.name in (PEFT_CONFIG, PEFT_WEIGHTS) and file.is_file():
            target = copy / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _settle_name(copy: Path, slug: str) -> tuple[Path, bool]:
    """Give the copy its final name: slug, slug-2, slug-3 … or the name under which the same bytes lie there already."""
    stem = ""
    for stem in numbered(slug):
        there = _lying(copy.with_name(stem))
        if there is None:
            break
        if is_same(there, copy):
            return there, False
    target = copy.with_name(stem if copy.is_dir() else stem + ENDING)
    copy.rename(target)
    return target, True


def numbered(slug: str) -> Iterator[str]:
    """Names to try in turn: slug, slug-2, slug-3 …"""
    yield slug
    number = 2
    while True:
        yield f"{slug}-{number}"
        number += 1


def _lying(place: Path) -> Path | None:
    """The adapter that has a name already, file or folder."""
    return next((path for path in (place.with_name(place.name + ENDING), place) if path.exists()), None)


def free_name(folder: Path, stem: str) -> str:
    """The first of stem, stem-2, stem-3 … that no adapter in the folder has."""
    return next(name for name in numbered(stem) if _lying(folder / name) is None)


def is_same(one: Path, other: Path) -> bool:
    """Whether two files, or two folders of files, are equal byte for byte."""
    if one.is_dir() != other.is_dir():
        return False
    if not one.is_dir():
        return filecmp.cmp(one, other, shallow=False)
    inside = [sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file()) for path in (one, other)]
    return inside[0] == inside[1] and all(filecmp.cmp(one / file, other / file, shallow=False) for file in inside[0])


# --- what lies on it -------------------------------------------------------------------------------------------------
def list_adapters(workspace: Path, *, most: int | None = None) -> list[Shelved]:
    """Everything on the shelf, or the `most` newest, the newest first."""
    names = names_in(shelf_of(workspace))
    found = []
    for file in adapters_in(shelf_of(workspace)):
        with suppress(FileNotFoundError):  # deleted at this very moment
            found.append((-file.stat().st_mtime_ns, file.name, file))
    return [shelved_at(file, names) for _, _, file in sorted(found)[:most]]


def folder_sign(folder: Path) -> int:
    """Changes whenever something comes into the folder, leaves it, or is replaced in it."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def names_in(folder: Path) -> frozenset[str]:
    """The names of everything in a folder; of nothing, where there is none."""
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def adapters_in(folder: Path) -> list[Path]:
    """The adapters in a folder: .safetensors files and PEFT folders."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    return [
        folder / entry.name
        for entry in shown
        if entry.name.endswith(ENDING) or (entry.is_dir() and is_peft(folder / entry.name))
    ]


def is_peft(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter, or holds one for each part of a model."""
    from reparam_diffusion.formats.load import FOLDERS

    return any((folder / part / PEFT_CONFIG).is_file() for part in ("", *FOLDERS))


def shelved_at(file: Path, names: frozenset[str] | None = None) -> Shelved:
    """The adapter at a path. `names` are those of its folder, when they are known."""
    names = names_in(file.parent) if names is None else names
    stem = stem_of(file)
    notes = read_notes(companion(file, ".json")) if f"{stem}.json" in names else {}
    picture = next((file.with_name(stem + ending) for ending in PICTURES if stem + ending in names), None)
    name = notes.get("name")
    return Shelved(file, name if isinstance(name, str) and name else stem, picture, notes)


def at(stem: str, workspace: Path) -> Path:
    """The adapter of exactly this stem. Raises UserError when it is not, or no longer, on the shelf."""
    shelf = shelf_of(workspace)
    names = names_in(shelf)  # so that no stem leads out of the shelf
    if stem + ENDING in names and not stem.startswith("."):
        return shelf / (stem + ENDING)
    if stem in names and not stem.startswith(".") and is_peft(shelf / stem):
        return shelf / stem
    raise gone(stem)


def gone(stem: str) -> UserError:
    """What to tell when an adapter is not there."""
    return UserError(f'There is no adapter "{stem}" on the shelf.', "It may have been moved to the bin meanwhile.")


def edit(stem: str, workspace: Path, changes: Mapping[str, object]) -> Shelved:
    """Write down what a person says of an adapter; only the keys that changed, so that two people may do so at once.

    Renaming is a change of "name", which is shown: the file keeps its own. Raises UserError for what cannot be noted.
    """
    with changing(workspace):
        file = at(stem, workspace)
        sidecar = companion(file, ".json")
        write_notes(sidecar, changed_notes(sidecar, changes))
        return shelved_at(file)


def find(name: str, workspace: Path) -> Path:
    """An adapter of the gallery by its file's name, its slug, or the name that a user gave it. Never a path.

    Raises UserError with the nearest name.
    """
    known: dict[str, Path] = {}
    shelved = list_adapters(workspace)
    for one in reversed(shelved):  # the newest of two with one name wins
        for alias in (one.name, make_slug(one.name)):
            known[alias.lower()] = one.file
    for one in shelved:  # but a file's own name comes before any given name
        known[one.stem.lower()] = one.file
    wanted = name.removesuffix(ENDING)
    for key in (wanted.lower(), make_slug(wanted, otherwise="")):
        if key in known:
            return known[key]
    stems = {stem_of(file) for file in known.values()}
    names = [*stems, *known] if difflib.get_close_matches(wanted.lower(), list(known), 1, 0.5) else stems
    empty = "The gallery is empty: train an adapter first, or import a .safetensors file."
    raise unknown_name("adapter", name, names, do=empty)


def locate(name: str, workspace: Path) -> Path:
    """An adapter as the command line and Python name it: by its path, or by its name in the gallery.

    A bare name is the gallery's, whatever lies in the working directory under it. Raises UserError with the nearest
    name.
    """
    if not name.strip():
        raise UserError("The name of an adapter is missing.", do="Give a path or a name of the gallery.")
    path = Path(name).expanduser()
    is_path = len(path.parts) > 1 or name.startswith((".", "~")) or "\\" in name or path.suffix == ENDING
    if is_path and path.exists():
        return path
    try:
        return find(name, workspace)
    except UserError as error:
        if not is_path and (path.is_file() or (path.is_dir() and is_peft(path))):
            return path
        if len(path.parts) > 1:
            raise UserError(f"There is no adapter at {name}.", "No such file or folder.", "Check the path.") from None
        raise error from None
