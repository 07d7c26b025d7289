"""Small squares of the adapters' pictures, made once and kept in workspace/.cache/thumbs/, which may be deleted."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import ImageOps

from reparam_diffusion.data.images import open_picture
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import beside

SIDE = 256  # pixels


def thumbs_of(workspace: Path) -> Path:
    """The folder of the small pictures."""
    return workspace / ".cache" / "thumbs"


def thumb_of(picture: Path, workspace: Path) -> Path | None:
    """The small square of a picture; None where it cannot be read."""
    try:
        age = picture.stat().st_mtime_ns
    except OSError:
        return None
    name = hashlib.sha256(f"{picture.resolve()} {age}".encode()).hexdigest()[:24]
    thumb = thumbs_of(workspace) / f"{name}.webp"
    if thumb.is_file():
        return thumb
    try:
        image = open_picture(picture)
        with beside(thumb) as hidden:
            ImageOps.fit(image, (SIDE, SIDE)).save(hidden, "WEBP", quality=82)
    except (UserError, OSError):  # no picture, or no room for a small one: the list goes without
        return None
    return thumb
