"""Checks on the folder where everything is kept, before any work is done."""

from __future__ import annotations

from pathlib import Path

from reparam_diffusion.errors import UserError
from reparam_diffusion.files import require_writable


def require_workspace(workspace: Path, folder: str = "") -> None:
    """Check that a workspace, or a folder in it, can be written. Raises UserError."""
    try:
        require_writable(workspace / folder / "new")
    except UserError as error:
        what = f"The workspace {workspace} cannot be written."
        raise UserError(what, error.why, "Choose another folder with --workspace.", place="workspace") from error


def require_readable(workspace: Path) -> None:
    """Check that a workspace is a folder, or not there yet. Raises UserError."""
    if workspace.exists() and not workspace.is_dir():
        raise UserError(
            f"{workspace} is not a workspace.", "It is a file, not a folder.", "Check --workspace.", place="workspace"
        )
