"""Writing whole or not at all: beside the target, then one rename. Readers see the old file or the new one."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reparam_diffusion.errors import UserError


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A hidden name in the same folder to write to, moved to `path` when the body ends well and removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield hidden
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> Path:
    """Put `content` (text as UTF-8) at `path`, on the disk for good. Raises UserError when it cannot be written."""
    data = content.encode() if isinstance(content, str) else content
    try:
        with beside(path) as hidden, hidden.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why, do = "The disk is full.", f"Free {len(data) / 1e6:.0f} MB and try again."
        else:
            why, do = f"{error.strerror}.", "Check the folder and its permissions."
        raise UserError(f"{path.name} could not be written.", why, do) from error
    return path
