"""Masks: white is learned, black counts as little as `rest` says, greys in between.

A mask is a file of its own or its picture's transparency; it goes through its picture's turn, crop and bucket, and its
mean over each latent is how much the loss there counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from reparam_diffusion.data.buckets import Size, fit
from reparam_diffusion.data.images import Opened, Picture, Refused, open_file, unchanged
from reparam_diffusion.data.sidecars import MASK_ENDING, match_name
from reparam_diffusion.data.source_files import list_masks
from reparam_diffusion.errors import UserError

ALPHA, BESIDE = "alpha", "beside"
BLACK = 8
"""Up to this grey of 255 a mask counts as black: a JPEG's black is not quite so."""


@dataclass(frozen=True)
class Mask:
    """Where a picture's mask lies (in the picture itself when `is_alpha`), its SHA-256, and how much black counts."""

    path: Path
    hash: str
    is_alpha: bool
    rest: float


def find_masks(pictures: Sequence[Picture], masks: str, *, rest: float, place: str) -> list[Mask | None]:
    """Each picture's mask, looked at; None where the whole picture counts. `masks` is as data.masks is.

    Raises UserError for what is missing, black or of another shape.
    """
    if not masks:
        return [None] * len(pictures)
    if masks == ALPHA:
        return [_in_alpha(picture, rest, place) for picture in pictures]
    files = mask_files(pictures, masks, place=place)
    return [_in_file(file, picture, rest, place) for file, picture in zip(files, pictures, strict=True)]


def mask_files(
    pictures: Sequence[Picture], masks: str, *, place: str, spelled: Callable[[str], str] = str
) -> list[Path]:
    """Each picture's mask file, beside it or in the folder `masks`. Raises UserError naming those that have none.

    In a folder names are compared as in `match_name`, then as they are `spelled`.
    """
    if masks == BESIDE:
        found = [picture.mask for picture in pictures]
        where = f"beside it, named like {pictures[0].path.stem}{MASK_ENDING}.png"
    else:
        found = _match_folder(pictures, Path(masks).expanduser(), place, spelled)
        where = f"of its own name in {masks}"
    missing = [picture.path.name for picture, file in zip(pictures, found, strict=True) if file is None]
    if missing:
        named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(
            f"{len(missing)} of {len(pictures)} pictures {'has' if len(missing) == 1 else 'have'} no mask: {named}.",
            f"Each picture needs a mask {where}.",
            "Add the missing ones (an all-white mask learns the whole picture), or take these pictures out.",
            place=place,
        )
    return [file for file in found if file is not None]


def find_unused_masks(pictures: Sequence[Picture], masks: str, *, place: str) -> list[Refused]:
    """The files of a folder of masks that belong to no picture; none where masks are elsewhere."""
    if masks in ("", ALPHA, BESIDE):
        return []
    folder = Path(masks).expanduser()
    used = _match_folder(pictures, folder, place, str)
    why = f"It is in the folder of masks {folder}, but there is no image of its name."
    return [Refused(file, why) for file in _list_masks(folder, place) if file not in used]


def _match_folder(
    pictures: Sequence[Picture], folder: Path, place: str, spelled: Callable[[str], str]
) -> list[Path | None]:
    """Each picture's mask in a folder. Raises UserError where a name fits several pictures or several masks."""
    files = _list_masks(folder, place)
    stems = [file.stem for file in files]
    owners: dict[Path, Picture] = {}
    found: list[Path | None] = []
    for picture in pictures:
        stem = Path(picture.given_name or picture.path.name).stem
        if spelled is str or picture.given_name:
            hits = match_name(f"{stem}{MASK_ENDING}", stems) or match_name(stem, stems)
        else:  # a copy that has lost its name: only what no other name is spelled like
            alike = (spelled(f"{stem}{MASK_ENDING}"), spelled(stem))
            hits = [at for at, name in enumerate(stems) if spelled(name) in alike]
            hits = hits if len({stems[at] for at in hits}) == 1 else []
        if len({files[at].read_bytes() for at in hits}) > 1:
            named = " and ".join(files[at].name for at in hits)
            raise UserError(
                f"Several masks could belong to {picture.path.name}.",
                f"{folder} has {named}.",
                "Keep the right one.",
                place=place,
            )
        mask = files[hits[0]] if hits else None
        other = owners.setdefault(mask, picture) if mask else picture
        if other.path.stem != picture.path.stem or other.path.parent != picture.path.parent:
            raise UserError(
                f"{mask.name if mask else ''} could be the mask of several images.",
                f"Its name fits {other.path} and {picture.path}.",
                'Put each mask beside its image (a-masklabel.png) and use "beside", or rename the images.',
                place=place,
            )
        found.append(mask)
    return found


def _list_masks(folder: Path, place: str) -> list[Path]:
    try:
        return list_masks(folder)
    except UserError as error:
        do = 'Give a folder of masks, or write "alpha" or "beside".'
        raise UserError(error.what.replace("pictures", "masks"), error.why, do, place=place) from None


def _in_alpha(picture: Picture, rest: float, place: str) -> Mask | None:
    opened = open_file(picture.path)
    if opened.alpha is None:
        return None
    _require_light(opened.alpha, f"{picture.path.name} is see-through all over.", place)
    return Mask(picture.path, opened.hash, True, rest)


def _in_file(file: Path, picture: Picture, rest: float, place: str) -> Mask:
    try:
        opened = open_file(file)
    except UserError as error:
        raise UserError(error.what, error.why, error.do, place=place) from None
    grey = _beside_picture(opened, picture)
    if not _has_shape_of(grey, picture):
        raise UserError(
            f"The mask {file.name} has another shape than its picture.",
            f"It is {grey.width} × {grey.height} pixels, and {picture.path.name} is {picture.width} × "
            f"{picture.height}.",
            "Make the mask anew from the picture; it may be larger or smaller, but of the same shape.",
            place=place,
        )
    _require_light(grey, f"The mask {file.name} is black all over.", place)
    return Mask(file, opened.hash, False, rest)


def _require_light(grey: Image.Image, what: str, place: str) -> None:
    _, lightest = grey.getextrema()
    assert isinstance(lightest, int)
    if lightest <= BLACK:
        raise UserError(
            what,
            "There is nothing in its picture to learn.",
            "Paint what should be learned white, or take the picture out.",
            place=place,
        )


def _beside_picture(opened: Opened, picture: Picture) -> Image.Image:
    """A mask file as greys (mode L) that lie on the upright picture; see-through parts are black.

    A mask that has the upright picture's shape is upright; one that only has the stored shape, as from a program that
    does not read EXIF data, is turned with its picture.
    """
    grey = opened.image.convert("L")
    if opened.alpha is not None:  # see-through parts were laid on white: take that white off again
        grey = ImageChops.subtract(grey, ImageChops.invert(opened.alpha))
    if opened.turn is None and not _has_shape_of(grey, picture):
        turn = open_file(picture.path).turn
        return grey if turn is None else grey.transpose(turn)
    return grey


def _has_shape_of(grey: Image.Image, picture: Picture) -> bool:
    """Whether the shapes agree but for the rounding of one pixel."""
    difference = abs(grey.width * picture.height - grey.height * picture.width)
    return difference <= max(*grey.size, picture.width, picture.height)


def read_mask(mask: Mask, picture: Picture, size: Size, *, pixels_per_latent: int) -> Tensor:
    """How much the loss counts at each latent (height, width), from `rest` to 1, of the picture trained at a size.

    Raises UserError when the file has changed or nothing of it is left after the crop.
    """
    opened = unchanged(open_file(mask.path), mask.path, mask.hash)
    grey = opened.alpha if mask.is_alpha else _beside_picture(opened, picture)
    assert grey is not None, "the same file had an alpha before"
    cropped = fit(grey.convert("F"), size, Image.Resampling.BILINEAR)  # floats: no rounding to 256 greys between
    learned = torch.from_numpy(np.array(cropped)).div(255)  # (height, width) in pixels
    if float(learned.max()) * 255 <= BLACK:
        raise UserError(
            f"Nothing of {picture.path.name} is left to learn.",
            f"What its mask leaves is cut off when the picture is cropped to {size[0]} × {size[1]} pixels.",
            "Crop the picture around what should be learned, or take it out.",
        )
    mean = torch.nn.functional.avg_pool2d(learned[None], pixels_per_latent)[0]
    return mask.rest + (1 - mask.rest) * mean
