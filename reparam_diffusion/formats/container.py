"""A .safetensors file written tensor by tensor, with kohya's hashes in its header: one tensor at a time is in memory.

Tensors go to a hidden file beside the target as they come, then behind a header in safetensors' own order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from reparam_diffusion.errors import UserError
from reparam_diffusion.files import beside, put_on_disk, telling

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_CHUNK = 1 << 20
_LEGACY = range(0x100000, 0x110000)
"""The bytes that kohya's first hash covers."""


@dataclass(frozen=True)
class _Entry:
    """One tensor's place in the hidden file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class TensorFile:
    """Leaving the context without `finish` leaves nothing behind. Raises UserError when the disk is full."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, _Entry] = {}
        self._size = 0
        self._open = ExitStack()

    def __enter__(self) -> TensorFile:
        with telling(self.path):
            self._hidden = self._open.enter_context(beside(self.path.with_name(f"{self.path.name}.data"), keep=False))
            self._data = self._open.enter_context(self._hidden.open("w+b"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor of a known number format."""
        assert name not in self._entries, f"{name} twice"
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with telling(self.path, size=self._size):
            self._data.write(content)
        self._entries[name] = _Entry(tensor.dtype, tuple(tensor.shape), self._size, len(content))
        self._size += len(content)

    def finish(self, header: Mapping[str, str]) -> Path:
        """Put the file in its place, with both hashes added to the header."""
        names = sorted(self._entries, key=lambda name: (-self._entries[name].dtype.itemsize, name))
        hashes = _Hashes(self._head(names, {key: value for key, value in header.items() if key.startswith("ss_")}))
        with telling(self.path, size=self._size), beside(self.path) as hidden, hidden.open("wb") as stream:
            stream.write(self._head(names, {**header, **hashes.told()}))
            for chunk in self._chunks(names):
                hashes.update(chunk)
                stream.write(chunk)
            stream.seek(0)
            stream.write(self._head(names, {**header, **hashes.told()}))
            put_on_disk(stream)
        return self.path

    def _head(self, names: list[str], metadata: Mapping[str, str]) -> bytes:
        """Length and JSON, padded to eight bytes, as safetensors writes them."""
        table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        at = 0
        for name in names:
            entry = self._entries[name]
            offsets = [at, at + entry.size]
            table[name] = {"dtype": _TYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
            at += entry.size
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _chunks(self, names: list[str]) -> Iterator[bytes]:
        self._data.flush()
        for name in names:
            entry = self._entries[name]
            self._data.seek(entry.start)
            for at in range(0, entry.size, _CHUNK):
                yield self._data.read(min(_CHUNK, entry.size - at))


class _Hashes:
    """kohya's two hashes, from the bytes as they pass.

    `sshs_model_hash` covers the data alone, so it is the file's whatever the header (A1111, Civitai's AutoV3);
    `sshs_legacy_hash` covers 64 KiB after the first MiB of the file as it were with its ss_ keys only.
    """

    def __init__(self, head: bytes) -> None:
        self._whole, self._legacy, self._at = hashlib.sha256(), hashlib.sha256(), 0
        self._pass(head)

    def update(self, data: bytes) -> None:
        self._whole.update(data)
        self._pass(data)

    def _pass(self, data: bytes) -> None:
        start, stop = max(_LEGACY.start - self._at, 0), max(_LEGACY.stop - self._at, 0)
        self._legacy.update(data[start:stop])
        self._at += len(data)

    def told(self) -> dict[str, str]:
        return {"sshs_model_hash": self._whole.hexdigest(), "sshs_legacy_hash": self._legacy.hexdigest()[:8]}


def data_hash(path: Path) -> str:
    """sha256 of a file's tensors, whatever its header: what A1111 and Civitai (AutoV3) know an adapter by."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            stream.seek(8 + int.from_bytes(stream.read(8), "little"))
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path.name} cannot be read.", str(error.strerror or error), "Check the file.") from None
    return digest.hexdigest()
