"""What a person is told when something cannot be done: what, why, and what to do about it."""

from __future__ import annotations

import difflib
import errno
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


class Note(UserWarning):
    """A warning for users; all others come from libraries and are for developers."""


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


_NOT_WRITABLE = {
    errno.ENOSPC: ("The disk is full.", "Free some space and try again."),
    errno.EDQUOT: ("The disk quota is used up.", "Free some space and try again."),
    errno.EROFS: ("The disk is read-only.", "Choose another place."),
    errno.EACCES: ("You do not have the rights for it.", "Choose another place, or change its permissions."),
    errno.EPERM: ("You do not have the rights for it.", "Choose another place, or change its permissions."),
    errno.ENOTDIR: ("A file is in the place of a folder.", "Choose another place."),
    errno.EEXIST: ("A file is in the place of a folder.", "Choose another place."),
    errno.EISDIR: ("It is a folder, not a file.", "Choose a file."),
    errno.ENAMETOOLONG: ("The name is too long.", "Choose a shorter one."),
    errno.ENOENT: ("It does not exist.", "Check the path."),
    errno.ELOOP: ("It is a link that leads to itself.", "Check the path."),
    errno.EIO: ("The disk reports an error.", "Check the disk."),
    errno.EMFILE: ("Too many files are open.", "Close other programs, or raise the limit (ulimit -n)."),
}


def explain_os_error(error: OSError) -> UserError | None:
    """What to say about a file or a folder that the system refuses; None where the error is not about one."""
    known = _NOT_WRITABLE.get(error.errno or 0)
    if known is None or (error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT)):
        return None
    what = "A file could not be written." if error.filename is None else f"{error.filename} cannot be used."
    return UserError(what, *known)
