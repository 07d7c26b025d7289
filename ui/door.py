"""The page's door for errors: a person's mistakes are told as they are, ours with the place of the report."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable
from functools import wraps
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from reparam_diffusion.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
LOG = logging.getLogger("reparam_diffusion.page")
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""How most handlers are connected. Any: gradio's own arguments."""


def page_log(workspace: Path) -> Path:
    """Where the page's own errors are written."""
    return workspace / "page.log"


def open_log(workspace: Path) -> None:
    """Send the page's errors to the workspace's page.log."""
    workspace.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(page_log(workspace), encoding="utf-8", delay=True, maxBytes=10**6, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(handler)


def guarded(handler: Callable[P, R], workspace: Path, *, plain: bool = False) -> Callable[P, R]:
    """The handler with its errors turned into what the page shows, or into `plain` text for other programs."""
    tell = _plain if plain else _toast

    @wraps(handler)
    def told(*args: P.args, **named: P.kwargs) -> R:
        try:
            return handler(*args, **named)
        except gr.Error:
            raise
        except UserError as error:
            raise tell(error.what, " ".join(part for part in (error.why, error.do) if part)) from None
        except Exception as error:  # The page's door: a traceback says nothing to a person, so it goes to the log.
            LOG.exception("%s failed", getattr(handler, "__name__", "a handler"))
            place = f"The report is at the end of {page_log(workspace)}; please send it to us."
            raise tell("This is our mistake.", place, seconds=None) from error

    return told


def warn(message: str) -> None:
    """Show a warning with its text as it is: toasts are HTML."""
    gr.Warning(html.escape(message))


def inform(message: str) -> None:
    """Show a message with its text as it is: toasts are HTML."""
    gr.Info(html.escape(message))


def _plain(what: str, rest: str, *, seconds: float | None = 12) -> gr.Error:
    """The same without markup: a program prints it as it is."""
    return gr.Error(f"{what} {rest}".strip(), duration=seconds, title="Please note", print_exception=False)


def _toast(what: str, rest: str, *, seconds: float | None = 12) -> gr.Error:
    """A sentence and what belongs to it, escaped. (Gradio's own title does not reach the browser from the queue.)"""
    message = f"<strong>{html.escape(what)}</strong> {html.escape(rest)}"
    return gr.Error(message, duration=seconds, title="Please note", print_exception=False)
