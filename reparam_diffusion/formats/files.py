"""Writing whole or not at all: beside the target, then one rename."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from reparam_diffusion.errors import UserError


def write_whole(path: Path, content: bytes) -> Path:
    """Put `content` at `path`; readers see the old file or the new one. Raises UserError when it cannot be written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError as error:
        if beside.is_file():
            beside.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why, do = "The disk is full.", f"Free {len(content) / 1e6:.0f} MB and try again."
        else:
            why, do = f"{error.strerror}.", "Check the folder and its permissions."
        raise UserError(f"{path.name} could not be written.", why, do) from None
    return path
