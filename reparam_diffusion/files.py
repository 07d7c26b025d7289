"""Writing whole or not at all: beside the target, then one rename. Readers see the old file or the new one."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from reparam_diffusion.errors import UserError

_PART = re.compile(r"\..*?\.(?:(?P<place>[0-9a-f]{8})\.)?(?P<pid>\d+)-\d+\.part")
_LONGEST = 120
"""Bytes of the target's name in the name of a hidden file, which file systems limit to 255."""
_DAY = 86400.0
_FOLDERS = ("adapters", "models", "exports", "images", "bin")
_numbers = itertools.count()
_swept: set[Path] = set()


# --- before the work -------------------------------------------------------------------------------------------------
def require_writable(place: Path) -> None:
    """Check that a file or a folder can be written at `place`, whose parents may be missing. Leaves nothing behind.

    Raises UserError for a read-only disk, missing rights, a full disk, and a file where a folder is needed.
    """
    what = f"{place} cannot be written."
    try:
        with suppress(FileNotFoundError):
            os.lstat(place)  # raises for a name that no disk takes
        nearest = place
        while not os.path.lexists(nearest) and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            if nearest != place:
                raise UserError(what, f"{nearest} is a file, not a folder.", "Choose another folder.")
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except NotADirectoryError:
        file = next(folder for folder in place.parents if folder.is_file())
        raise UserError(what, f"{file} is a file, not a folder.", "Choose another folder.") from None
    except OSError as error:
        raise _tell(place, error) from error
    except ValueError as error:  # a NUL in the name
        raise UserError(what, f"The name is not valid: {error}.", "Choose another name.") from None


def require_new_file(out: Path, *, sources: Iterable[Path] = ()) -> None:
    """Check that a new file can be written at `out`. Raises UserError where something is there already.

    `sources` are the files that are read: a result that would replace one of them is refused by name, also through a
    link or another spelling of its path.
    """
    for source in sources:
        if is_same_place(out, source) or (source.is_dir() and source.resolve() in out.resolve().parents):
            raise UserError(
                f"{out} would replace the input.",
                f"The result would overwrite {source.name}, which is read.",
                "Choose another name for the result.",
                place="out",
            )
    if os.path.lexists(out):
        raise UserError(
            f"{out} exists already.", "Files are never overwritten.", "Choose another name, or delete it.", place="out"
        )
    require_writable(out)


def is_same_place(one: Path, other: Path) -> bool:
    """Whether two paths are one file: spelled in another way, through links, or on a disk that ignores case."""
    try:
        if one.samefile(other):
            return True
    except OSError:
        pass
    return one.resolve() == other.resolve()


# --- writing ---------------------------------------------------------------------------------------------------------
def hidden_part(path: Path) -> Path:
    """A new hidden name in the same folder, with the machine and the process that it belongs to."""
    start = os.fsencode(path.name)[:_LONGEST].decode(errors="ignore")
    return path.with_name(f".{start}.{_machine()}.{os.getpid()}-{next(_numbers)}.part")


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
    _sweep_once(path.parent)
    hidden = hidden_part(path)
    try:
        yield hidden
        if keep:
            hidden.replace(path)
    finally:
        if os.path.lexists(hidden):
            hidden.unlink()


@contextmanager
def folder_beside(path: Path, *, keep: bool = True) -> Iterator[Path]:
    """As `beside`, for a whole folder; `path` must not exist yet."""
    hidden = hidden_part(path)
    try:
        with telling(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep_once(path.parent)
            hidden.mkdir()
        yield hidden
        if keep:
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
        raise _tell(path, error, size=size) from error


def _tell(path: Path, error: OSError, *, size: int = 0) -> UserError:
    what = f"{path} cannot be written."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = f"Free {max(size / 1e6, 1):.0f} MB and try again."
        return UserError(what, "The disk is full.", need)
    if error.errno == errno.EROFS:
        return UserError(what, "The disk is read-only.", "Choose another place.")
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(what, "You do not have the rights to write there.", "Choose another place.")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(what, "A file is in the place of a folder.", "Choose another place.")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(what, "The name is too long.", "Choose a shorter name.")
    return UserError(what, f"{error.strerror or error}.", "Choose another place.")


# --- leftovers -------------------------------------------------------------------------------------------------------
def sweep_leftovers(folder: Path) -> list[Path]:
    """Delete the hidden parts in a folder that processes left which have ended without a chance to; gives their paths.

    The part of a living process stays. Of another machine's (on a shared disk) nothing is known but its age: it is
    deleted a day after it was last written to.
    """
    removed = []
    with suppress(OSError):  # a folder that cannot be listed has nothing that can be deleted
        with os.scandir(folder) as entries:
            parts = [folder / entry.name for entry in entries if _PART.fullmatch(entry.name)]
        for part in parts:
            if _is_abandoned(part):
                with suppress(OSError):  # gone meanwhile, or on a read-only disk
                    shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
                    removed.append(part)
    return removed


def sweep_workspace(workspace: Path) -> list[Path]:
    """Sweep a workspace's folders for files: at the start of the app, and of work on files; gives what was deleted."""
    folders = [workspace, *(workspace / name for name in _FOLDERS)]
    folders += [inner for name in ("exports", "images") for inner in (workspace / name).glob("*") if inner.is_dir()]
    return [part for folder in folders for part in sweep_leftovers(folder)]


def _sweep_once(folder: Path) -> None:
    """Sweep a folder the first time that this process writes there."""
    place = folder.resolve()
    if place not in _swept:
        _swept.add(place)
        sweep_leftovers(place)


def _is_abandoned(part: Path) -> bool:
    import psutil  # type: ignore[import-untyped]  # it ships no types

    found = _PART.fullmatch(part.name)
    assert found is not None
    if found["place"] == _machine():
        return not psutil.pid_exists(int(found["pid"]))
    try:
        newest = max(path.stat().st_mtime for path in [part, *part.rglob("*")])
    except OSError:
        return False
    return time.time() - newest > _DAY


def _machine() -> str:
    """Eight digits for the set of processes whose numbers can be looked up here: this machine, or this container."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


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
