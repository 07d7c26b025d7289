"""The shelf as a list to look through: what each adapter is; searching, filtering and sorting as plain functions."""

from __future__ import annotations

import datetime
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from reparam_diffusion.adapters.base import METHODS
from reparam_diffusion.errors import unknown_name
from reparam_diffusion.gallery import notes, shelf
from reparam_diffusion.gallery.index import Header, Key, header_of, headers_of
from reparam_diffusion.gallery.report import BASES, bytes_of

Order = Literal["newest", "oldest", "name", "largest"]
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True)
class Entry:
    """One adapter in the list. `header` is None while nobody has had the time to read it; `time` is Unix seconds."""

    shelved: shelf.Shelved
    header: Header | None
    bytes: int
    time: float

    @property
    def stem(self) -> str:
        """What prompts call it."""
        return self.shelved.stem

    @property
    def name(self) -> str:
        """The name a person gave it."""
        return self.shelved.name

    @property
    def base(self) -> str:
        """What it was made for: "starter", "sd1", "sd2", "sdxl" or "unknown"."""
        return self.header.base if self.header else "unknown"

    @property
    def method(self) -> str:
        """How it was made; empty where that cannot be told."""
        return self.header.method if self.header else ""

    @property
    def trigger(self) -> str:
        """The words that call it: a person's, else the file's own."""
        facts = self.shelved.facts
        if "activation text" in facts:
            return notes.as_text(facts["activation text"])
        return self.header.trigger if self.header else ""

    @property
    def strength(self) -> float:
        """The strength it is best used at."""
        return notes.strength_of(self.shelved.facts)

    @property
    def tags(self) -> list[str]:
        """A person's tags."""
        return notes.split_tags(self.shelved.facts.get("tags"))

    @property
    def date(self) -> str:
        """The day its file was made, as "2026-11-24"."""
        return f"{datetime.datetime.fromtimestamp(self.time):%Y-%m-%d}"


def list_entries(workspace: Path, *, seconds: float | None = None) -> list[Entry]:
    """Everything on the shelf, the newest first. After `seconds`, headers not read yet are left for later."""
    folder = shelf.shelf_of(workspace)
    names = shelf.names_in(folder)
    keys = {}
    for file in shelf.adapters_in(folder):
        with suppress(FileNotFoundError):  # deleted at this very moment
            keys[file] = key_of(file)
    headers = headers_of(keys.values(), folder, workspace, seconds=seconds)
    entries = [_entry(shelf.shelved_at(file, names), key, headers.get(file.name)) for file, key in keys.items()]
    return sort(entries, "newest")


def entry_at(file: Path, workspace: Path) -> Entry:
    """One adapter on the shelf. Raises UserError when it is gone."""
    try:
        key = key_of(file)
    except FileNotFoundError:
        raise shelf.gone(shelf.stem_of(file)) from None
    return _entry(shelf.shelved_at(file), key, header_of(key, file.parent, workspace))


def key_of(file: Path) -> Key:
    """What an adapter is known by in the index."""
    state = file.stat()
    return file.name, bytes_of(file) if file.is_dir() else state.st_size, state.st_mtime_ns


def _entry(shelved: shelf.Shelved, key: Key, header: Header | None) -> Entry:
    return Entry(shelved, header, key[1], key[2] / 1e9)


def sort(entries: Iterable[Entry], by: str) -> list[Entry]:
    """The entries in another order. Raises UserError for an order that there is not."""
    match by:
        case "newest":
            return sorted(entries, key=lambda entry: (-entry.time, entry.stem))
        case "oldest":
            return sorted(entries, key=lambda entry: (entry.time, entry.stem))
        case "name":
            return sorted(entries, key=lambda entry: (_folded(entry.name), entry.stem))
        case "largest":
            return sorted(entries, key=lambda entry: (-entry.bytes, entry.stem))
    raise unknown_name("order", by, ORDERS)


def search(entries: Iterable[Entry], query: str) -> list[Entry]:
    """The entries that have every word of the query in their name, trigger, tags, notes, method or base model."""
    words = _folded(query).split()
    return [entry for entry in entries if all(word in _searched(entry) for word in words)]


def _searched(entry: Entry) -> str:
    facts, header = entry.shelved.facts, entry.header or Header()
    texts = (notes.as_text(facts.get(key)) for key in ("notes", "description"))
    parts = (entry.name, entry.stem, entry.trigger, *entry.tags, entry.method, entry.base, header.base_model, *texts)
    return _folded("\n".join(parts))


def _folded(text: str) -> str:
    """Text for comparing: without case, and in one spelling of each letter."""
    return unicodedata.normalize("NFKC", text).casefold()


def keep(entries: Iterable[Entry], *, base: str = "", method: str = "") -> list[Entry]:
    """The entries for one base model and of one method; "" is any."""
    return [entry for entry in entries if base in ("", entry.base) and method in ("", entry.method)]


def require_filters(entries: Iterable[Entry], *, base: str, method: str) -> None:
    """Raise UserError for a base model or a method that nothing can be of."""
    if base not in ("", *BASES):
        raise unknown_name("base model", base, BASES, place="base")
    known = {*METHODS, *found_methods(entries)}
    if method and method not in known:
        raise unknown_name("method", method, known, place="method")


def found_bases(entries: Iterable[Entry]) -> list[str]:
    """The base models that occur, for a choice."""
    return sorted({entry.base for entry in entries})


def found_methods(entries: Iterable[Entry]) -> list[str]:
    """The methods that occur, for a choice."""
    return sorted({entry.method for entry in entries} - {""})


def row_of(entry: Entry) -> dict[str, object]:
    """An entry as plain values, for other programs."""
    header = asdict(entry.header) if entry.header else {}
    own: dict[str, object] = {
        "stem": entry.stem,
        "name": entry.name,
        "file": entry.shelved.file.name,
        "bytes": entry.bytes,
        "date": entry.date,
        "trigger": entry.trigger,
        "strength": entry.strength,
        "tags": entry.tags,
        "base": entry.base,
    }
    return header | own
