"""Drafts: images and captions that a user has chosen and not started with yet, kept so that nothing is lost.

A draft is a folder like a dataset's, under datasets/.drafts/. Its draft.json is the one place that says which images
there are, their captions and which are left out: the page shows it and a run gets it. Captions, masks and choices
belong to a file's content (its hash), so that adding files again, in another order or another browser keeps them.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from reparam_diffusion.data.images import EMPTY_CAPTION, Picture, Reading, Refused, read_images
from reparam_diffusion.data.sidecars import is_caption, is_mask
from reparam_diffusion.data.source_files import sort_source
from reparam_diffusion.data.text_files import make_one_line
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import write_whole
from reparam_diffusion.jobs.datasets import (
    LEAST_SIDE,
    MOST_FILES,
    About,
    PictureSet,
    copy_image,
    copy_mask,
    require_few,
    with_words,
)

KEPT_SECONDS = 7 * 86400.0
LONGEST_CAPTION = 4000  # characters


@dataclass(frozen=True)
class Entry:
    """One image of a draft; `given` is the caption that came with it as a file."""

    image: Picture
    given: str | None = None
    is_left_out: bool = False


@dataclass(frozen=True)
class Draft:
    """What draft.json says. `is_example` where it is a bundled example, which new images replace."""

    entries: tuple[Entry, ...] = ()
    refused: tuple[Refused, ...] = ()
    about: About = field(default_factory=About)
    is_example: bool = False

    @property
    def images(self) -> PictureSet:
        """The images as a run gets them, and those that are left out."""
        used = tuple(entry.image for entry in self.entries if not entry.is_left_out)
        left_out = tuple(entry.image for entry in self.entries if entry.is_left_out)
        return PictureSet(used, self.refused, self.about, left_out)


def keep(chosen: PictureSet, workspace: Path, *, is_example: bool = False) -> str:
    """Copy a set into a new draft; gives the draft's name."""
    name, folder = _make_folder(workspace)
    taken: set[str] = set()
    entries = [Entry(copy_image(one, folder, taken), one.caption) for one in chosen.pictures]
    _write(folder, Draft(tuple(entries), chosen.refused, chosen.about, is_example))
    return name


def add_files(files: Sequence[Path], workspace: Path, name: str | None = None) -> str:
    """Add images, captions and masks to a draft, or to a new one where there is none or it is an example.

    An image that is there already stays as it is; a caption or mask that differs from the one that came before
    replaces it. Gives the draft's name. Raises UserError when nothing of it can be used.
    """
    require_few(files)
    draft = read_draft(name, workspace)
    is_new = name is None or draft is None or draft.is_example
    if is_new:
        memory = _find_edits(workspace)
        name, folder = _make_folder(workspace)
        _write(folder, Draft())
    else:
        assert name is not None
        memory, folder = {}, folder_of(name, workspace)
    try:
        with _change(name, workspace) as draft:
            _write(folder, _merge(draft, files, folder, memory))
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return name


def _merge(draft: Draft, files: Sequence[Path], folder: Path, memory: dict[str, Entry]) -> Draft:
    """The draft with what the files bring; texts and masks that belong to no image yet wait for it."""
    waiting = sorted(folder.glob("waiting/*/*"))
    source = sort_source(files, look_beside=False)
    source.sidecars.extend(waiting)
    reading = read_images(source, least_side=LEAST_SIDE, earlier=[entry.image for entry in draft.entries])
    if not draft.entries and not reading.pictures:
        reasons = "; ".join(f"{bad.path.name}: {bad.why.rstrip('.')}" for bad in reading.refused)
        raise UserError("None of the pictures can be used.", f"{reasons}.", "Choose other pictures.")
    entries = [_update(entry, reading.others.get(at)) for at, entry in enumerate(draft.entries)]
    places = {entry.image.hash: at for at, entry in enumerate(entries)}
    taken = {entry.image.path.stem for entry in entries}
    for image in reading.pictures:
        if image.hash in places:
            at = places[image.hash]
            entries[at] = _update(entries[at], image)
            continue
        entries.append(_recall(Entry(copy_image(image, folder, taken), image.caption), memory))
    if len(entries) > MOST_FILES:
        raise UserError(
            f"These are {len(entries)} images.", f"At most {MOST_FILES} go at once.", "Choose the best of them."
        )
    _keep_waiting(reading.unmatched, waiting, folder)
    return replace(draft, entries=tuple(entries), refused=_join_refused(draft, reading))


def _update(entry: Entry, image: Picture | None) -> Entry:
    """An image that is there already with the caption and the mask that came now."""
    if image is None:
        return entry
    kept = entry.image
    if image.mask is not None:
        mask = copy_mask(image.mask, kept.path)
        if kept.mask not in (None, mask):
            kept.mask.unlink(missing_ok=True)
        kept = replace(kept, mask=mask)
    if image.caption is None or image.caption == entry.given:
        return replace(entry, image=kept)
    notes = tuple(dict.fromkeys(note for note in (*kept.notes, *image.notes) if note != EMPTY_CAPTION))
    kept = replace(kept, caption=image.caption, encoding=image.encoding, notes=notes)
    return replace(entry, image=kept, given=image.caption)


def _recall(entry: Entry, memory: dict[str, Entry]) -> Entry:
    """A new image with what the user did to the same file in another draft, unless its caption file is another one."""
    known = memory.get(entry.image.hash)
    if known is None or entry.given not in (None, known.given):
        return entry
    image = replace(entry.image, caption=known.image.caption, encoding="")
    if image.mask is None and known.image.mask is not None and known.image.mask.is_file():
        image = replace(image, mask=copy_mask(known.image.mask, image.path))
    if image.caption is not None:
        image = replace(image, notes=tuple(note for note in image.notes if note != EMPTY_CAPTION))
    return replace(entry, image=image, is_left_out=known.is_left_out)


def _find_edits(workspace: Path) -> dict[str, Entry]:
    """The images of other drafts by hash; the draft that was looked at last wins."""
    files = sorted(_home(workspace).glob("*/draft.json"), key=lambda file: file.stat().st_mtime)
    drafts = [draft for file in files if (draft := _read_file(file)) is not None and not draft.is_example]
    return {entry.image.hash: entry for draft in drafts for entry in draft.entries}


def _keep_waiting(unmatched: Sequence[Path], waiting: Sequence[Path], folder: Path) -> None:
    for file in waiting:
        if file not in unmatched:
            shutil.rmtree(file.parent)
    for file in unmatched:
        if file not in waiting:
            place = folder / "waiting" / secrets.token_hex(4)
            place.mkdir(parents=True)
            shutil.copyfile(file, place / file.name)


def _join_refused(draft: Draft, reading: Reading) -> tuple[Refused, ...]:
    """What is not used, once each: texts and masks are told anew, as an image may have come for them."""
    usable = {image.given_name or image.path.name for image in reading.pictures}
    before = [
        bad
        for bad in draft.refused
        if bad.path.name not in usable and not is_caption(bad.path) and not is_mask(bad.path)
    ]
    every = [Refused(Path(bad.path.name), bad.why) for bad in (*before, *reading.refused)]
    return tuple(dict.fromkeys(every))


def read(name: str | None, workspace: Path) -> PictureSet | None:
    """A draft's set; None for a name that is none, or a draft that is gone."""
    draft = read_draft(name, workspace)
    return None if draft is None else draft.images


def read_draft(name: str | None, workspace: Path) -> Draft | None:
    """A draft; None for a name that is none, or a draft that is gone."""
    folder = _folder(name, workspace)
    draft = None if folder is None else _read_file(folder / "draft.json")
    if folder is not None and draft is not None:
        (folder / "draft.json").touch()  # looked at is not forgotten
    return draft


def _read_file(file: Path) -> Draft | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        entries = tuple(_read_entry(row, file.parent) for row in kept["pictures"])
        refused = tuple(Refused(Path(row["path"]), row["why"]) for row in kept["refused"])
        return Draft(entries, refused, About(**kept["about"]), bool(kept.get("is_example")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_entry(row: dict[str, Any], folder: Path) -> Entry:
    """An image as draft.json has it; drafts of earlier versions do not say what was given. Any: JSON's own values."""
    row = dict(row)
    given, is_left_out = row.pop("given", row["caption"]), bool(row.pop("is_left_out", False))
    mask = folder / row["mask"] if row.get("mask") else None
    image = Picture(**{**row, "path": folder / row["path"], "notes": tuple(row["notes"]), "mask": mask})
    return Entry(image, given, is_left_out)


def set_caption(name: str, workspace: Path, picture: str, caption: str, *, only_empty: bool = False) -> PictureSet:
    """Give a picture another caption; an empty one leaves it to the template. Raises UserError when it is gone.

    `only_empty` leaves a caption alone that somebody has written meanwhile.
    """
    text = make_one_line(caption)
    if len(text) > LONGEST_CAPTION:
        raise UserError(
            "This caption is too long.", f"It has {len(text)} characters.", f"Use at most {LONGEST_CAPTION}."
        )

    def change(entry: Entry) -> Entry:
        image = entry.image
        if only_empty and image.caption is not None:
            return entry
        notes = tuple(note for note in image.notes if note != EMPTY_CAPTION)
        return replace(entry, image=replace(image, caption=text or None, encoding="", notes=notes))

    return _change_entry(name, workspace, picture, change)


def leave_out(name: str, workspace: Path, picture: str) -> PictureSet:
    """Take a picture out of a draft. The last one stays: a draft has pictures."""
    return _change_entry(name, workspace, picture, lambda entry: replace(entry, is_left_out=True), keep_one=True)


def put_back(name: str, workspace: Path, picture: str) -> PictureSet:
    """Use an image again that was left out."""
    return _change_entry(name, workspace, picture, lambda entry: replace(entry, is_left_out=False))


def set_words(name: str, workspace: Path, *, trigger: str, class_word: str) -> PictureSet:
    """Make captions that name the draft's trigger and class word name other ones, as Start does."""
    with _change(name, workspace) as draft:
        about = draft.about
        if not (about.trigger or about.class_word) or not (trigger or class_word):
            return draft.images
        every = PictureSet(tuple(entry.image for entry in draft.entries), (), about)
        renamed = with_words(every, trigger=trigger, class_word=class_word)
        entries = [replace(entry, image=image) for entry, image in zip(draft.entries, renamed.pictures, strict=True)]
        about = replace(about, trigger=trigger, class_word=class_word)
        return _write(_home(workspace) / name, replace(draft, entries=tuple(entries), about=about)).images


def _change_entry(
    name: str, workspace: Path, picture: str, change: Callable[[Entry], Entry], *, keep_one: bool = False
) -> PictureSet:
    """The draft with one image changed. Raises UserError when it is gone, or none is left to train on."""
    with _change(name, workspace) as draft:
        if picture not in {entry.image.path.name for entry in draft.entries}:
            raise UserError(f"There is no picture called {picture} any more.", do="Reload the page.")
        entries = tuple(change(entry) if entry.image.path.name == picture else entry for entry in draft.entries)
        if keep_one and all(entry.is_left_out for entry in entries):
            raise UserError("This is the last picture.", do="Choose other pictures instead.")
        return _write(_home(workspace) / name, replace(draft, entries=entries)).images


@contextmanager
def _change(name: str, workspace: Path) -> Iterator[Draft]:
    """The draft as it is now, for one change: a second tab and the describer change it too."""
    with FileLock(folder_of(name, workspace) / ".lock", thread_local=False):
        draft = read_draft(name, workspace)
        if draft is None:
            raise UserError("These pictures are gone.", "They were not touched for a week.", "Choose them again.")
        yield draft


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


def _make_folder(workspace: Path) -> tuple[str, Path]:
    """A new draft's name and folder."""
    name = secrets.token_hex(8)
    folder = _home(workspace) / name
    folder.mkdir(parents=True)
    tidy(workspace)
    return name, folder


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


def _write(folder: Path, draft: Draft) -> Draft:
    kept = {
        "pictures": [_make_row(entry) for entry in draft.entries],
        "refused": [{"path": bad.path.name, "why": bad.why} for bad in draft.refused],
        "about": asdict(draft.about),
        "is_example": draft.is_example,
    }
    write_whole(folder / "draft.json", json.dumps(kept, ensure_ascii=False, indent=1))
    return draft


def _make_row(entry: Entry) -> dict[str, Any]:
    """An entry as draft.json has it. Any: JSON's own values."""
    image = entry.image
    names = {"path": image.path.name, "mask": image.mask.name if image.mask else None}
    return {**asdict(image), **names, "given": entry.given, "is_left_out": entry.is_left_out}
