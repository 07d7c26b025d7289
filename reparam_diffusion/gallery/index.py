"""What adapters' headers say, kept in workspace/index.sqlite by file name, size and time. The file can be deleted."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.report import report_of

VERSION = 3
"""Counts up with every change of what is kept: an older index is made anew."""
AT_ONCE = 50  # files read between two writes

Key = tuple[str, int, int]
"""An adapter's file name, its size in bytes and its time in nanoseconds."""


@dataclass(frozen=True)
class Header:
    """What a list shows of an adapter without opening it. `problem` says why it cannot be read."""

    method: str = ""
    base: str = "unknown"
    base_model: str = ""
    trigger: str = ""
    layers: int = 0
    least_rank: int = 0
    largest_rank: int = 0
    steps: str = ""
    pictures: int = 0
    problem: str = ""


def index_of(workspace: Path) -> Path:
    """The cache's file."""
    return workspace / "index.sqlite"


def headers_of(
    keys: Iterable[Key], folder: Path, workspace: Path, *, seconds: float | None = None
) -> dict[str, Header]:
    """The headers of a folder's files by name. Unknown ones are read and kept, for `seconds` at most if that is given;
    those that it was not enough for are missing from the answer.
    """
    wanted = list(keys)
    end = None if seconds is None else time.monotonic() + seconds
    with _opened(index_of(workspace)) as (cache, known):
        found = {key[0]: known[key] for key in wanted if key in known}
        missing = [key for key in wanted if key[0] not in found]
        for first in range(0, len(missing), AT_ONCE):
            fresh: dict[Key, Header] = {}
            for key in missing[first : first + AT_ONCE]:
                if end is not None and time.monotonic() > end:
                    break
                fresh[key] = read_header(folder / key[0])
            _keep(cache, fresh)
            found |= {key[0]: header for key, header in fresh.items()}
        gone = known.keys() - set(wanted)
        if gone:
            _forget(cache, gone)
    return found


def header_of(key: Key, folder: Path, workspace: Path) -> Header:
    """One file's header."""
    with _opened(index_of(workspace)) as (cache, known):
        if key not in known:
            known[key] = read_header(folder / key[0])
            _keep(cache, {key: known[key]})
        return known[key]


def read_header(file: Path) -> Header:
    """A file's header, read from the file."""
    try:
        report = report_of(file)
    except UserError as error:
        return Header(problem=str(error))
    ranks = report["ranks"].values()
    return Header(
        method=report["trained_as"] or report["method"],
        base=report["base"],
        base_model=report["base_model"],
        trigger=report["trigger"],
        layers=report["layers"],
        least_rank=min(ranks, default=0),
        largest_rank=max(ranks, default=0),
        steps=report["steps"],
        pictures=report["pictures"],
    )


# --- the cache: where it cannot be used, everything works without it --------------------------------------------------
@contextmanager
def _opened(file: Path) -> Iterator[tuple[sqlite3.Connection, dict[Key, Header]]]:
    """The cache and what it knows; made anew where it is damaged, in memory where the workspace cannot be written."""
    with suppress(OSError):  # read-only
        file.parent.mkdir(parents=True, exist_ok=True)
    for place in (file, file, ":memory:"):
        with ExitStack() as kept:
            try:
                cache = kept.enter_context(closing(sqlite3.connect(place, timeout=5, isolation_level=None)))
                _set_up(cache)
                known = _rows(cache)
            except sqlite3.OperationalError:
                continue  # read-only, or busy for long: in the end without it
            except (sqlite3.DatabaseError, ValueError, TypeError):
                with suppress(OSError):  # read-only
                    file.unlink(missing_ok=True)
                continue
            yield cache, known
            return


def _set_up(cache: sqlite3.Connection) -> None:
    if cache.execute("PRAGMA user_version").fetchone()[0] != VERSION:
        cache.execute("BEGIN IMMEDIATE")
        cache.execute("DROP TABLE IF EXISTS headers")
        cache.execute("CREATE TABLE headers (name TEXT PRIMARY KEY, size INTEGER, time INTEGER, header TEXT)")
        cache.execute(f"PRAGMA user_version = {VERSION}")
        cache.execute("COMMIT")


def _rows(cache: sqlite3.Connection) -> dict[Key, Header]:
    rows = cache.execute("SELECT name, size, time, header FROM headers")
    return {(name, size, age): Header(**json.loads(header)) for name, size, age, header in rows}


def _keep(cache: sqlite3.Connection, fresh: dict[Key, Header]) -> None:
    rows = [(*key, json.dumps(asdict(header))) for key, header in fresh.items()]
    _write(cache, "INSERT OR REPLACE INTO headers VALUES (?, ?, ?, ?)", rows)


def _forget(cache: sqlite3.Connection, gone: Iterable[Key]) -> None:
    _write(cache, "DELETE FROM headers WHERE name = ? AND size = ? AND time = ?", list(gone))


def _write(cache: sqlite3.Connection, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
    with suppress(sqlite3.OperationalError):  # a full or busy disk: the next look reads those files again
        cache.execute("BEGIN IMMEDIATE")
        cache.executemany(statement, rows)
        cache.execute("COMMIT")
