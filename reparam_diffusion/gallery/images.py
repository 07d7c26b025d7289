"""Drawn pictures on disk: PNGs under images/<date>/ that carry their recipe, so that each can be drawn again."""

from __future__ import annotations

import heapq
import os
from datetime import datetime
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError

from reparam_diffusion.errors import UserError
from reparam_diffusion.files import beside
from reparam_diffusion.gallery.recipe import Recipe, from_text, to_text, told_of

TEXT, EXACT = "parameters", "reparam"
"""PNG text chunks: A1111's, which other programs read too, and ours, which loses nothing."""


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
    note.add_itxt(EXACT, recipe.model_copy(update={"model": told_of(recipe.model)}).model_dump_json())
    try:
        with beside(file) as hidden:
            picture.save(hidden, "PNG", pnginfo=note)
    except OSError as error:
        raise UserError(f"{file} cannot be written.", str(error.strerror), "Choose another place.") from error
    return file


def settings_of(file: Path) -> Recipe:
    """What a picture was drawn from, by us or by another program. Raises UserError when it does not say."""
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            picture.load()  # text may stand behind the pixels
            chunks = {key: str(value) for key, value in picture.info.items() if key in (TEXT, EXACT)}
    except UnidentifiedImageError:
        raise UserError("This is not a PNG picture.", do="Only PNGs carry their settings.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError("This picture cannot be read.", f"{error}.", "Use another one.") from None
    try:
        return Recipe.model_validate_json(chunks[EXACT])
    except (KeyError, ValidationError):  # another program's, or of another version: its plain text tells the same
        pass
    if TEXT not in chunks:
        raise UserError(
            "There are no settings in this picture.", "It may have been edited or sent through a chat.", "Use another."
        )
    return from_text(chunks[TEXT])


def history(workspace: Path, *, most: int) -> list[Path]:
    """The last pictures, the newest first."""
    folder = images_of(workspace)
    found: list[Path] = []
    for day in sorted((day for day in folder.iterdir() if day.is_dir()), reverse=True) if folder.is_dir() else ():
        names = (name for name in os.listdir(day) if name.endswith(".png") and not name.startswith("."))
        found += [day / name for name in heapq.nlargest(most - len(found), names)]
        if len(found) == most:
            break
    return found
