"""The caches of a workspace on disk: how large they are, how they stay bounded, and how they are cleared.

All of it can be made again: .cache/latents, .cache/texts, .cache/class (class images), .cache/thumbs, index.sqlite.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 20_000_000_000
"""Size at which what was not used for longest goes."""
PARTS = {"latents": "latents", "texts": "text embeddings", "class": "class images", "thumbs": "thumbnails"}
_INDEX = "index.sqlite"


@dataclass(frozen=True)
class _Unit:
    """What goes as a whole: a file, or the folder of one set of class images. `used` in seconds since 1970."""

    place: Path
    size: int
    used: float


def cache_sizes(workspace: Path) -> dict[str, int]:
    """Bytes of each cache of a workspace, by its name for the user."""
    home = workspace / ".cache"
    sizes = {name: sum(unit.size for unit in _units(home / part)) for part, name in PARTS.items()}
    return sizes | {"adapter headers": _size(workspace / _INDEX)}


def clear_caches(workspace: Path) -> int:
    """Delete the caches of a workspace in which no run is live; says how many bytes are free again."""
    before = sum(cache_sizes(workspace).values())
    for part in PARTS:
        shutil.rmtree(workspace / ".cache" / part, ignore_errors=True)
    for file in workspace.glob(f"{_INDEX}*"):
        file.unlink(missing_ok=True)
    return before - sum(cache_sizes(workspace).values())


def bound_cache(home: Path, *, since: float, most: int = MOST_BYTES) -> int:
    """Delete what was not used for longest until `home` (.cache) holds at most `most` bytes; says how many went.

    What was used after `since` (seconds since 1970) stays: a run needs it.
    """
    units = sorted((unit for part in PARTS for unit in _units(home / part)), key=lambda unit: unit.used)
    over, gone = sum(unit.size for unit in units) - most, 0
    for unit in units:
        if gone >= over or unit.used >= since:
            break
        if unit.place.is_dir():
            shutil.rmtree(unit.place, ignore_errors=True)
        else:
            unit.place.unlink(missing_ok=True)
        gone += unit.size
    return gone


def mark_used(place: Path) -> None:
    """Note that a cache's file or folder was used now."""
    with suppress(OSError):  # a read-only cache is not tidied either
        os.utime(place)


def _units(folder: Path) -> list[_Unit]:
    found = []
    try:
        places = list(folder.iterdir())
    except OSError:
        return []
    for place in places:
        try:
            used = place.stat().st_mtime
        except OSError:  # another process has tidied it
            continue
        size = sum(_size(file) for file in place.rglob("*")) if place.is_dir() else _size(place)
        found.append(_Unit(place, size, used))
    return found


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:
        return 0
