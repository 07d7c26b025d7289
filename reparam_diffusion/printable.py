"""Text of users and files made safe for a terminal: control characters never reach it."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings

from reparam_diffusion.errors import Note

_LIBRARIES = ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 and C1 controls but for tab and newline, marks that reverse the reading direction, and lone surrogates."""


def printable(text: str) -> str:
    r"""The text with control characters written out, such as \u001b for the escape character; JSON stays the same."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def has_control(text: str) -> bool:
    """Whether a text has control characters, which no word or name has."""
    return _CONTROL.search(text) is not None


def remove_control(text: str) -> str:
    """The text without control characters; line breaks of other systems become \\n."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def say(text: str, *, err: bool = False) -> None:
    """Print a line as it is, control characters written out; on standard error with `err`."""
    import typer

    typer.echo(printable(text), err=err)


def hush_libraries() -> None:
    """From now on only our own warnings are printed; libraries' go to the log "py.warnings", for developers.

    Nothing changes where `python -W`, PYTHONWARNINGS or a library's own variable asks for more.
    """
    for name in _LIBRARIES:  # they read it when they are first loaded
        os.environ.setdefault(name, "error")
    if not sys.warnoptions:
        warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *place: object, **_: object) -> None:
    if issubclass(category, Note):
        say(f"Note: {message}", err=True)
    else:
        logging.getLogger("py.warnings").debug("%s: %s (%s)", category.__name__, message, place)
