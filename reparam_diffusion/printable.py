"""Text of users and files made safe for a terminal: control characters never reach it."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 and C1 controls but for tab and newline, marks that reverse the reading direction, and lone surrogates."""


def printable(text: str) -> str:
    r"""The text with control characters written out, such as \x1b for the escape character."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape", "backslashreplace").decode("ascii"), text)


def has_control(text: str) -> bool:
    """Whether a text has control characters, which no word or name has."""
    return _CONTROL.search(text) is not None


def remove_control(text: str) -> str:
    """The text without control characters; line breaks of other systems become \\n."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
