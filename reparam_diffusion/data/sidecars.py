"""What lies beside a picture a.png: its caption a.txt, a.caption or a.png.txt, and its mask a-masklabel.png."""

from __future__ import annotations

import codecs
from pathlib import Path

MASK_ENDING = "-masklabel"
"""How the stem of a mask beside its picture ends, as OneTrainer names it."""
MASK_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def find_sidecar(picture: Path) -> Path | None:
    """The text file that belongs to a picture, or None."""
    for name in (f"{picture.stem}.txt", f"{picture.stem}.caption", f"{picture.name}.txt", f"{picture.name}.caption"):
        if (picture.parent / name).is_file():
            return picture.parent / name
    return None


def is_mask(file: Path) -> bool:
    """Whether a file is named as the mask of a picture."""
    return file.stem.endswith(MASK_ENDING) and file.suffix.lower() in MASK_SUFFIXES


def find_mask(picture: Path) -> Path | None:
    """The mask beside a picture, or None."""
    files = (picture.with_name(f"{picture.stem}{MASK_ENDING}{suffix}") for suffix in MASK_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def read_caption(file: Path) -> str:
    """A caption on one line. UTF-8 with or without its mark, UTF-16 with it, or an old Windows file."""
    raw = file.read_bytes()
    encodings = ["utf-8-sig", "cp1252", "latin-1"]
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings.insert(0, "utf-16")
    for encoding in encodings:
        try:
            return " ".join(raw.decode(encoding).split())
        except UnicodeDecodeError:
            continue
    raise AssertionError("latin-1 decodes every byte")
