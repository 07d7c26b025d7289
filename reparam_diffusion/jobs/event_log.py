"""Writing a run's events: one line each in events.jsonl, whole, also after a kill and on a full disk."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from reparam_diffusion.events import Event

_RESERVED = 8192
"""Bytes that are kept for the last event of a run whose disk becomes full."""


class EventLog:
    """Appends to a run's events.jsonl: one write call a line, so that a reader never sees two lines mixed."""

    def __init__(self, folder: Path) -> None:
        self._is_torn = False
        self._reserve = folder / ".reserve"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self._fd = os.open(folder / "events.jsonl", flags, 0o644)
        if _ends_torn(folder / "events.jsonl"):
            self._is_torn = True  # a killed worker's half line must not swallow our first one

    def append(self, event: Event) -> None:
        """Write one event. Raises OSError (ENOSPC) when it does not fit on the disk."""
        line = event.to_json().encode() + b"\n"
        if self._is_torn:
            line = b"\n" + line
        written = os.write(self._fd, line)
        self._is_torn = written < len(line)
        if self._is_torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def reserve(self) -> None:
        """Take room for the last event while there is some."""
        with suppress(OSError):
            self._reserve.write_bytes(os.urandom(_RESERVED))  # not zeros, which some disks do not store

    def append_last(self, event: Event) -> None:
        """Write the last event, into the reserved room where the disk is full; without any it is not written."""
        self._reserve.unlink(missing_ok=True)
        with suppress(OSError):
            self.append(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reserve.unlink(missing_ok=True)
        os.close(self._fd)


def _ends_torn(file: Path) -> bool:
    with file.open("rb") as lines:
        if lines.seek(0, os.SEEK_END) == 0:
            return False
        lines.seek(-1, os.SEEK_END)
        return lines.read(1) != b"\n"
