"""Sets of pictures: the bundled examples, what a person dropped, and their home in workspace/datasets/."""

from __future__ import annotations

import filecmp
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import tomlkit

from reparam_diffusion.config import read_settings
from reparam_diffusion.data.captions import replace_words
from reparam_diffusion.data.images import Picture, Refused, find_pictures
from reparam_diffusion.data.masks import mask_files
from reparam_diffusion.data.sidecars import MASK_ENDING
from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.shelf import make_slug

EXAMPLES = Path(__file__).resolve().parents[2] / "assets" / "examples"
MOST_FILES = 200
MOST_BYTES = 2 * 1024**3
LEAST_SIDE = 32  # pixels; the run itself asks for what its base model needs


@dataclass(frozen=True)
class About:
    """What a set of pictures shows: what dataset.toml says."""

    title: str = ""
    trigger: str = ""
    class_word: str = ""
    kind: str = "subject"


@dataclass(frozen=True)
class PictureSet:
    """Pictures with the captions that came with them, and the files that cannot be used."""

    pictures: tuple[Picture, ...]
    refused: tuple[Refused, ...] = ()
    about: About = About()
    left_out: tuple[Picture, ...] = ()
    """Images of a draft that the user has left out; a run does not get them."""


def example_sets() -> list[PictureSet]:
    """The bundled examples, subjects first."""
    sets = [open_dataset(file.parent) for file in sorted(EXAMPLES.glob("*/dataset.toml"), reverse=True)]
    return sorted(sets, key=lambda one: one.about.kind != "subject")


def open_dataset(folder: Path) -> PictureSet:
    """The set in a folder; what it shows is told by its dataset.toml where there is one."""
    pictures, refused = find_pictures(folder, least_side=LEAST_SIDE)
    file = folder / "dataset.toml"
    return PictureSet(
        tuple(pictures), tuple(refused), About(**read_settings(file)) if file.is_file() else About(folder.name)
    )


def sort_files(files: Sequence[Path]) -> PictureSet:
    """Files in any order, such as uploads: images with the captions and masks among the files, and what is not used.

    Raises UserError when there is too much of it, or no usable image.
    """
    require_few(files)
    pictures, refused = find_pictures(files, least_side=LEAST_SIDE, look_beside=False)
    return PictureSet(tuple(pictures), tuple(refused))


def require_few(files: Sequence[Path]) -> None:
    """Raise UserError for more files than the page takes at once."""
    if len(files) > MOST_FILES:
        raise UserError(
            f"These are {len(files)} files.", f"At most {MOST_FILES} go at once.", "Choose the best of them."
        )
    if sum(file.stat().st_size for file in files) > MOST_BYTES:
        raise UserError("These files are more than 2 GB together.", do="Choose fewer or smaller pictures.")


def with_masks(chosen: PictureSet, folder: str) -> PictureSet:
    """The set with a folder's masks beside its pictures. Raises UserError naming the pictures that have none.

    Pictures are renamed when they come into the workspace, so names are compared as they are written there.
    """
    files = mask_files(chosen.pictures, folder, place="data.masks", spelled=make_slug)
    pictures = tuple(replace(picture, mask=file) for picture, file in zip(chosen.pictures, files, strict=True))
    return replace(chosen, pictures=pictures)


def with_words(chosen: PictureSet, *, trigger: str, class_word: str) -> PictureSet:
    """The set for another trigger and class word: captions that name the old ones name the new ones instead."""
    about = chosen.about
    old = f"{about.trigger} {about.class_word}".strip()
    new = f"{trigger} {class_word}".strip()
    pictures = chosen.pictures
    if old and new and old != new:

        def rename(caption: str) -> str:
            return replace_words(replace_words(caption, old, new), about.trigger, trigger or new)

        pictures = tuple(
            picture if picture.caption is None else replace(picture, caption=rename(picture.caption))
            for picture in pictures
        )
    about = About(about.title or new, trigger, class_word, about.kind)
    return replace(chosen, pictures=pictures, about=about)


def add_dataset(chosen: PictureSet, workspace: Path) -> Path:
    """Copy a set into workspace/datasets/<slug>/ and say where. The very same set is kept once."""
    home = workspace / "datasets"
    slug = make_slug(chosen.about.title, otherwise="pictures")
    home.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{slug}.", dir=home))
    try:
        write_set(chosen, beside)
        number = 1
        while True:
            folder = home / (slug if number == 1 else f"{slug}-{number}")
            if _is_same(folder, beside):
                return folder
            if not folder.exists():
                with suppress(OSError):  # somebody was quicker: the next look tells whether it is the same set
                    beside.rename(folder)
                    folder.chmod(0o755)  # mkdtemp's are its owner's alone
                    return folder
                continue
            number += 1
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_set(chosen: PictureSet, folder: Path) -> PictureSet:
    """Copy the pictures, their captions and dataset.toml into a folder; gives the set as it lies there."""
    taken: set[str] = set()
    written = []
    for picture in chosen.pictures:
        copied = copy_image(picture, folder, taken)
        if picture.caption is not None:
            copied.path.with_suffix(".txt").write_text(picture.caption + "\n", encoding="utf-8")
        written.append(copied)
    about = tomlkit.document()
    for key, value in vars(chosen.about).items():
        about.add(key, value)
    (folder / "dataset.toml").write_text(tomlkit.dumps(about), encoding="utf-8")
    return replace(chosen, pictures=tuple(written))


def copy_image(picture: Picture, folder: Path, taken: set[str]) -> Picture:
    """Copy an image and its mask into a folder under a name that is not `taken` yet; gives it as it lies there."""
    stem = make_slug(picture.path.stem, otherwise="picture")
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    target = folder / f"{name}{picture.path.suffix.lower()}"
    shutil.copyfile(picture.path, target)
    mask = None if picture.mask is None else copy_mask(picture.mask, target)
    return replace(picture, path=target, mask=mask, given_name=picture.given_name or picture.path.name)


def copy_mask(mask: Path, image: Path) -> Path:
    """Copy a mask to its place beside an image."""
    target = image.with_name(f"{image.stem}{MASK_ENDING}{mask.suffix.lower()}")
    shutil.copyfile(mask, target)
    return target


def _is_same(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    if not folder.is_dir():
        return False
    names = sorted(file.name for file in other.iterdir())
    if names != sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")):
        return False
    return not any(filecmp.cmpfiles(folder, other, names, shallow=False)[1:])
