"""A .safetensors file, checked and mapped: its tensors are views that are read when they are used and can be let go.

The header is checked before anything is read, so that a damaged or hostile file costs no memory.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reparam_diffusion.errors import UserError

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LONGEST = 32_000_000
"""Bytes of a header; that of a whole SDXL is under one million, and a picture may lie in it."""
_PICKLES = (b"\x80", b"PK")
"""How a pickle begins, and the zip that torch puts around one."""


@dataclass(frozen=True)
class Mapped:
    """An open file. Its tensors stay valid while they are held; `let_go` frees the memory that reading them took."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    _map: mmap.mmap

    def let_go(self) -> None:
        """Forget the pages that were read; they are read again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def open_mapped(file: Path) -> Mapped:
    """Open a .safetensors file. Raises UserError, in a person's words, for anything that is none."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(size - 8, _LONGEST):
                raise _refused(file, _no_length(start))
            header = _header(file, stream.read(length))
            # Private to this process: torch wants a buffer it may write to, and nothing is ever written.
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise UserError(f"{file.name} cannot be read.", str(error.strerror or error), "Check the file.") from None
    metadata = header.pop("__metadata__", {})
    places = _places(file, header, size - 8 - length)
    tensors = {key: _view(mapped, 8 + length + place.start, place) for key, place in places.items()}
    return Mapped(tensors, {_text(key): _text(value) for key, value in metadata.items()}, mapped)


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def _view(mapped: mmap.mmap, offset: int, place: _Place) -> Tensor:
    if place.start == place.end:
        return torch.zeros(0, dtype=place.dtype)
    return torch.frombuffer(mapped, dtype=place.dtype, count=math.prod(place.shape), offset=offset).reshape(place.shape)


def _no_length(start: bytes) -> str:
    if start.startswith(_PICKLES):
        return "It is a pickle under another name; pickles can run programs and are never opened"
    return "It is empty" if not start else "Its header ends outside of the file"


def _header(file: Path, text: bytes) -> dict[str, Any]:  # Any: what JSON holds
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except _TwiceError as error:
        raise _refused(file, f"Its header has {_short(str(error))} twice") from None
    except (ValueError, RecursionError):
        raise _refused(file, "Its header is not JSON") from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise _refused(file, "Its header is not a table of tensors")
    return header


class _TwiceError(Exception):
    """A name that stands twice in one table."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        raise _TwiceError(next(name for name, _ in pairs if name in seen or seen.add(name)))  # type: ignore[func-returns-value]  # add returns None
    return table


def _places(file: Path, header: dict[str, Any], data: int) -> dict[str, _Place]:
    """Where each tensor lies; all of them together fill the data without gaps or overlaps."""
    places = {key: _place(file, key, entry) for key, entry in header.items()}
    at = 0
    for key, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != at:
            raise _refused(file, f"{_short(key)} overlaps another tensor or leaves a gap")
        at = place.end
    if at != data:
        raise _refused(file, f"It has {data} bytes of tensors where its header tells of {at}")
    return places


def _place(file: Path, key: str, entry: Any) -> _Place:
    try:
        name, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _refused(file, f"Its header does not say where {_short(key)} lies") from None
    if name not in _TYPES:
        raise _refused(file, f"{_short(key)} has numbers of the kind {str(name)[:20]}, which is not known")
    numbers = [*shape, start, end]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise _refused(file, f"{_short(key)} has a shape or a place that is no whole number")
    if end - start != math.prod(shape) * _TYPES[name].itemsize:
        raise _refused(file, f"{_short(key)} has a shape of {math.prod(shape)} numbers and {end - start} bytes")
    return _Place(_TYPES[name], shape, start, end)


def _text(value: Any) -> str:
    """A header's entry as text; what a terminal would obey stays out. Values that are no text are kept as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.replace("\r\n", "\n"))


def _short(key: str) -> str:
    key = _text(key[:80])
    return key if len(key) < 80 else f"{key[:77]}…"


def _refused(file: Path, why: str) -> UserError:
    return UserError(
        f"{file.name} cannot be read.", f"It is not a whole .safetensors file: {why}.", "Download or copy it again."
    )
