"""What a person is told when something cannot be done: what, why, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_LISTED, _FEW = 12, 7


class UserError(Exception):
    """An error a person can cause and mend, in up to three short sentences.

    `place` names the setting it belongs to ("adapter.rank"), so that a form can show it at the field.
    """

    def __init__(self, what: str, why: str = "", do: str = "", *, place: str = "") -> None:
        super().__init__(what, why, do)
        self.what = what
        self.why = why
        self.do = do
        self.place = place

    def __str__(self) -> str:
        return " ".join(part for part in (self.what, self.why, self.do) if part)


class NothingToDo(UserError):
    """A command that has nothing to do: the sentence is shown, nothing is changed, and it is no failure."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, do: str = "", place: str = "") -> UserError:
    """What to say about a name that there is none of: the nearest known one, else the known ones, else `do`.

    `kind` is a noun, such as "preset".
    """
    names = list(dict.fromkeys(known))
    lower = {one.lower(): one for one in names}
    close = difflib.get_close_matches(name.lower(), list(lower), 1, 0.5)
    listed = ", ".join(names[:_MOST_LISTED]) + (", …" if len(names) > _MOST_LISTED else "")
    if close:
        do = f'Did you mean "{lower[close[0]]}"?' + (f" There are {listed}." if 1 < len(names) < _FEW else "")
    elif names:
        do = f"Choose one of {listed}."
    shown = name if len(name) <= 100 else f"{name[:100]}…"
    return UserError(f'There is no {kind} called "{shown}".', do=do, place=place)
