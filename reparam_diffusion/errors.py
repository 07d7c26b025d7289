"""What a person is told when something cannot be done: what, why, and what to do about it."""

from __future__ import annotations


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
