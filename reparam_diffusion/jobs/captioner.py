"""Describes a draft's pictures that have no caption, in a process of its own; what it says is read from the draft.

`python -m reparam_diffusion.jobs.captioner WORKSPACE DRAFT MODEL`
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reparam_diffusion.data.images import open_again
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import write_whole
from reparam_diffusion.jobs import drafts, locks, worker

if TYPE_CHECKING:
    from PIL.Image import Image

MODULE = "reparam_diffusion.jobs.captioner"
PATIENCE = 30.0  # seconds for a process to start


@dataclass(frozen=True)
class Progress:
    """How far it is. `trouble` is a sentence where it ended early."""

    done: int = 0
    total: int = 0
    trouble: str = ""


def start(workspace: Path, draft: str, model: str) -> None:
    """Begin to describe; one describer a draft. Raises UserError when there is nothing to do."""
    chosen = drafts.known(draft, workspace)
    if all(picture.caption is not None for picture in chosen.pictures):
        raise UserError("Every picture has a caption already.", do="Clear those that you want to have described.")
    if not model.strip():
        raise UserError(
            "No model that describes pictures was given.",
            "Captions are made by a BLIP or Florence-2 model on this machine.",
            "Write the path of its folder.",
        )
    folder = drafts.folder_of(draft, workspace)
    if is_at_work(workspace, draft):
        raise UserError("The pictures are being described already.", do="Wait for it.")
    (folder / "describing.lock").unlink(missing_ok=True)  # nobody holds it
    write_whole(folder / "describing.json", json.dumps(asdict(Progress())))
    with (folder / "describing.log").open("ab") as log:
        worker.start_detached([sys.executable, "-m", MODULE, str(workspace), draft, model.strip()], log)


def is_at_work(workspace: Path, draft: str) -> bool:
    """Whether a describer lives for this draft."""
    return locks.is_held(drafts.folder_of(draft, workspace) / "describing.lock")


def is_starting(workspace: Path, draft: str) -> bool:
    """Whether one was started moments ago and has not got as far as its lock."""
    folder = drafts.folder_of(draft, workspace)
    started = (folder / "describing.json").stat().st_mtime
    return not (folder / "describing.lock").exists() and time.time() - started < PATIENCE


def progress_of(workspace: Path, draft: str) -> Progress | None:
    """How far a draft's describer is; None when there never was one."""
    try:
        kept = json.loads((drafts.folder_of(draft, workspace) / "describing.json").read_text(encoding="utf-8"))
        return Progress(**kept)
    except (OSError, ValueError, TypeError, UserError):
        return None


def describe_draft(workspace: Path, draft: str, describe: Callable[[Image], str]) -> None:
    """Give every picture without a caption one, with the trigger and class word before what is seen."""
    folder = drafts.folder_of(draft, workspace)
    chosen = drafts.known(draft, workspace)
    empty = [picture for picture in chosen.pictures if picture.caption is None]
    for done, picture in enumerate(empty, 1):
        seen = describe(open_again(picture))
        drafts.set_caption(draft, workspace, picture.path.name, f"{{trigger}} {{class}}, {seen}", only_empty=True)
        write_whole(folder / "describing.json", json.dumps(asdict(Progress(done, len(empty)))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Describe, or leave a sentence that says why not."""
    workspace, draft, model = sys.argv[1:] if arguments is None else arguments
    folder = drafts.folder_of(draft, Path(workspace))
    with locks.try_hold(folder / "describing.lock", patience=1.0) as held:
        if not held:
            return 0
        try:
            from reparam_diffusion.models.describe import load_describer

            describe_draft(Path(workspace), draft, load_describer(Path(model).expanduser()))
        except UserError as error:
            before = progress_of(Path(workspace), draft) or Progress()
            write_whole(folder / "describing.json", json.dumps(asdict(Progress(before.done, before.total, str(error)))))
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
