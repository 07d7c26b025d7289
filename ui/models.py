"""The base models that a page offers, looked up anew whenever somebody opens the list: files come while it is open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.models.known import known_models
from ui.door import QUIET, guarded

Choices = list[tuple[str, str]]


def draw_models(workspace: Path, choices: Callable[[Path], Choices], value: str, **looks: Any) -> gr.Dropdown:
    """A list of base models; a path or a hub id may be written too. Any: gradio's own arguments."""
    control = gr.Dropdown(choices(workspace), value=value, label="Base model", allow_custom_value=True, **looks)
    control.focus(guarded(lambda: gr.update(choices=choices(workspace)), workspace), None, control, **QUIET)
    return control


def by_path(workspace: Path) -> Choices:
    """As training takes them: each by where it lies."""
    return [(one.title, one.path) for one in known_models(workspace)]


def by_name(workspace: Path) -> Choices:
    """By the names that the studio and pictures know them by."""
    return [(one.title, one.path if one.path == "starter" else one.title) for one in known_models(workspace)]
