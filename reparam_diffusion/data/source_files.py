"""Listing the files of a data set by what they are: images, captions and masks, and what is not used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from reparam_diffusion.data.sidecars import is_caption, is_mask
from reparam_diffusion.errors import UserError

_IGNORED = {".toml", ".md", ".ini", ".db", ".npz", ".safetensors"}
_LISTS: Final = {".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".parquet", ".xml"}
"""Files in which other programs keep captions; they are not read."""
_SUFFIXES: Final = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .gif .bmp .tif .tiff .avif .heic .heif .jp2 .ppm .pgm .ico .psd .qoi".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Files:
    """The files of a folder or a list, by what they are."""

    images: list[Path]
    sidecars: list[Path]
    """Captions and masks; those `beside` were not named themselves and are not missed where they belong to no image."""
    beside: list[Path]
    unused: list[tuple[Path, str]]
    """What is not used, and why."""


def files_of(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The images to look at by their names, in natural order for a folder, as given for a list."""
    files = sort_source(source, look_beside=False)
    if not files.images:
        raise UserError("There are no images among the files.", do="Choose other files.", place="data.images")
    return files.images


def sort_source(source: str | Path | Sequence[str | Path], *, look_beside: bool = True) -> Files:
    """The files of a folder or a list by what they are. Raises UserError for a folder that cannot be read or is empty.

    `look_beside` also takes the captions and masks in the folders of the listed images.
    """
    if isinstance(source, str | Path):
        if not str(source).strip():
            raise UserError("No pictures were chosen.", do="Choose a folder or some files.", place="data.images")
        path = Path(source).expanduser()
        if not path.is_file():
            return _sort_folder(path)
        source = [path]
    named = [Path(entry).expanduser() for entry in source if str(entry).strip()]
    if not named:
        raise UserError("No pictures were chosen.", do="Choose a folder or some files.", place="data.images")
    folders = [_sort_folder(path) for path in named if path.is_dir()]
    files = _sort_files([path for path in named if not path.is_dir()])
    total = Files(
        [*files.images, *(image for folder in folders for image in folder.images)],
        [*files.sidecars, *(file for folder in folders for file in folder.sidecars)],
        [],
        [*files.unused, *(bad for folder in folders for bad in folder.unused)],
    )
    if look_beside:
        places = dict.fromkeys(image.parent for image in files.images)
        known = {*total.images, *total.sidecars}
        total.beside.extend(
            file
            for place in places
            if place.is_dir()
            for file in sorted(place.iterdir())
            if (is_caption(file) or is_mask(file)) and file not in known and file.is_file()
        )
    return total


def _sort_files(files: Sequence[Path]) -> Files:
    """Files by their names."""
    sidecars = [file for file in files if is_caption(file) or is_mask(file)]
    lists = [file for file in files if file.suffix.lower() in _LISTS]
    why = "Captions are not read from it. Give each image a .txt file of its name."
    images = [file for file in files if file not in {*sidecars, *lists} and file.suffix.lower() not in _IGNORED]
    return Files(images, sidecars, [], [(file, why) for file in lists])


def list_folder(folder: Path) -> list[Path]:
    """What a folder holds, in natural order, without what is hidden. Raises UserError where it cannot be read."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.", do="Check the path.", place="data.images")
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read.", f"{error.strerror}.", place="data.images") from None
    return sorted(entries, key=lambda file: _natural(file.name))


def _sort_folder(folder: Path) -> Files:
    """A folder's files; sub-folders with images are told as not used. Raises UserError where it has no image."""
    entries = list_folder(folder)
    inner = [entry for entry in entries if entry.is_dir()]
    files = _sort_files([entry for entry in entries if not entry.is_dir()])
    if not files.images:
        why = f"It has only sub-folders: {', '.join(entry.name for entry in inner)}." if inner else "It is empty."
        if len(entries) > len(inner):
            why = "It has files, but no picture among them."
        do = "Choose one of the sub-folders, or put pictures into this one." if inner else "Put pictures into it."
        raise UserError(f"The folder {folder} holds no pictures.", why, do, place="data.images")
    for entry in inner:
        if count := count_images(entry):
            what = f"Its {count} images are" if count > 1 else "Its image is"
            why = f"{what} in a sub-folder, and sub-folders beside images are not read."
            files.unused.append((entry, f"{why} Move them up, or add it as a further set."))
    return files


def count_images(folder: Path) -> int:
    """How many files with an image's suffix a folder holds itself; 0 where it cannot be read."""
    try:
        return sum(file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") for file in folder.iterdir())
    except OSError:
        return 0


def list_masks(folder: Path) -> list[Path]:
    """The images of a folder of masks, those with a mask's ending too. Raises UserError where there are none."""
    files = _sort_files([entry for entry in list_folder(folder) if not entry.is_dir()])
    masks = [*files.images, *(file for file in files.sidecars if is_mask(file))]
    if not masks:
        raise UserError(f"The folder {folder} holds no pictures.", do="Put pictures into it.", place="data.images")
    return masks


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key by which picture2 comes before picture10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name
