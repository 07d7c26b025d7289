"""The caption beside a picture: a.txt, a.caption or a.png.txt for a.png."""

from __future__ import annotations

import codecs
from pathlib import Path


def find_sidecar(picture: Path) -> Path | None:
    """The text file that belongs to a picture, or None."""
    for name in (f"{picture.stem}.txt", f"{picture.stem}.caption", f"{picture.name}.txt", f"{picture.name}.caption"):
        if (picture.parent / name).is_file():
            return picture.parent / name
    return None


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
