"""Writing whole or not at all: beside the target, then one rename. Readers see the old file or the new one."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from reparam_diffusion.errors import UserError


def cache_file(name: str) -> Path:
    """A file in the user's cache folder: what was measured on this machine, and the locks of its devices."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "reparam-diffusion" / name


@contextmanager
def beside(path: Path, *, keep: bool = True) -> Iterator[Path]:
    """A hidden name in the same folder to write to, moved to `path` when the body ends well and removed otherwise.

    Without `keep` it is removed in any case: a place for what is needed on the way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield hidden
        if keep:
            hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """As `beside`, for a whole folder; `path` must not exist yet."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with telling(path):
            hidden.mkdir(parents=True)
        yield hidden
        with telling(path):
            hidden.rename(path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def telling(path: Path, *, size: int = 0) -> Iterator[None]:
    """Turn a failure to write `path`, of about `size` bytes, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why, do = "The disk is full.", f"Free {size / 1e6:.0f} MB and try again."
        else:
            why, do = f"{error.strerror}.", "Check the folder and its permissions."
        raise UserError(f"{path.name} could not be written.", why, do) from error


def put_on_disk(stream: BinaryIO) -> None:
    """Everything written so far, on the disk for good."""
    stream.flush()
    os.fsync(stream.fileno())


def new_folder(home: Path, name: str) -> Path:
    """A folder that nobody else has: `name`, or with a number behind it where that is taken."""
    number = 1
    while True:
        folder = home / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        return folder


def write_whole(path: Path, content: bytes | str) -> Path:
    """Put `content` (text as UTF-8) at `path`, on the disk for good. Raises UserError when it cannot be written."""
    data = content.encode() if isinstance(content, str) else content
    with telling(path, size=len(data)), beside(path) as hidden, hidden.open("wb") as stream:
        stream.write(data)
        put_on_disk(stream)
    return path
