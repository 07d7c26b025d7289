"""Drawn pictures on disk: PNGs under images/<date>/ that carry their recipe, so that each can be drawn again."""

from __future__ import annotations

import hashlib
import heapq
import os
from datetime import datetime
from pathlib import Path

from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from reparam_diffusion.data.images import open_file, open_picture
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import beside, telling
from reparam_diffusion.gallery.image_metadata import EXACT, TEXT, read_metadata
from reparam_diffusion.gallery.recipe import Recipe, to_text, told_of

SOURCES = "sources"
"""The folder beside the days' where pictures lie that others were begun from, and masks; each by its pixels' hash."""
_LONGEST = 4096  # pixels of a side that are kept


def images_of(workspace: Path) -> Path:
    """The folder where a workspace keeps its drawn pictures."""
    return workspace / "images"


def new_name(workspace: Path, ending: str) -> Path:
    """A free name for a picture drawn now; names sort by time."""
    now = datetime.now()
    folder = images_of(workspace) / f"{now:%Y-%m-%d}"
    stem = f"{now:%H%M%S}-{now.microsecond // 1000:03d}-{ending}"
    number = 1
    while (file := folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")).exists():
        number += 1
    return file


def save_picture(picture: Image.Image, recipe: Recipe, file: Path) -> Path:
    """Write a picture with its recipe, every value of it filled in."""
    note = PngInfo()
    note.add_text(TEXT, to_text(recipe))
    told = {"model": told_of(recipe.model), "vae": told_of(recipe.vae)}
    note.add_itxt(EXACT, recipe.model_copy(update=told).model_dump_json())
    with telling(file), beside(file) as hidden:
        picture.save(hidden, "PNG", pnginfo=note)
    return file


def settings_of(file: Path) -> Recipe:
    """What an image was made from, by us or by another program. Raises UserError when it does not say."""
    return read_metadata(file).recipe


# --- pictures to begin from ------------------------------------------------------------------------------------------
def source_name(picture: Image.Image) -> str:
    """The path in a workspace of a picture that another is begun from, or of a mask: by its pixels."""
    sign = hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()[:24]
    return f"images/{SOURCES}/{sign}.png"


def keep_source(picture: Image.Image, workspace: Path) -> str:
    """Keep a picture that another is begun from ("RGB"), or a mask ("L"); gives its path in the workspace."""
    if max(picture.size) > _LONGEST:
        picture = picture.copy()
        picture.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    name = source_name(picture)
    file = workspace / name
    if not file.exists():
        with telling(file), beside(file) as hidden:
            picture.save(hidden, "PNG")
    return name


def keep_file(file: Path, workspace: Path, *, is_mask: bool = False) -> str:
    """As `keep_source`, for a file of any kind of picture."""
    opened = open_file(file.expanduser())
    if not is_mask:
        return keep_source(opened.image, workspace)
    mask = opened.image.convert("L")
    if opened.alpha is not None:  # drawing programs save masks see-through, which is laid on white otherwise
        mask = ImageChops.multiply(mask, opened.alpha)
    return keep_source(mask, workspace)


def source_of(name: str, workspace: Path) -> Path:
    """The file of a picture to begin from, or of a mask. Raises UserError when it is gone."""
    file = (workspace / name).resolve()
    if not file.is_relative_to(images_of(workspace.resolve())) or not file.is_file():
        raise UserError(
            "The picture to start from is not there.", f"{name} was deleted or moved.", "Choose it again, or clear it."
        )
    return file


def open_sources(recipe: Recipe, workspace: Path) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture that a recipe begins from, and its mask. Raises UserError when one is gone or cannot be read."""
    picture, mask = (open_picture(source_of(name, workspace)) if name else None for name in (recipe.image, recipe.mask))
    return picture, mask


def history(workspace: Path, *, most: int) -> list[Path]:
    """The last pictures, the newest first."""
    folder = images_of(workspace)
    found: list[Path] = []
    days = (day for day in folder.iterdir() if day.is_dir() and day.name != SOURCES) if folder.is_dir() else ()
    for day in sorted(days, reverse=True):
        names = (name for name in os.listdir(day) if name.endswith(".png") and not name.startswith("."))
        found += [day / name for name in heapq.nlargest(most - len(found), names)]
        if len(found) == most:
            break
    return found
