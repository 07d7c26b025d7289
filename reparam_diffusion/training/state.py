"""What a resume needs, in one file a checkpoint: written beside and moved into place, read without pickle's code."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reparam_diffusion.errors import UserError

STATE = "state.pt"
_NEEDED = {"step", "precision", "threads", "torch", "adapters", "optimizer", "schedule", "average", "scaler", "best"}
State = dict[str, Any]
"""Step, adapters' states by site, optimizer, schedule, ema, best loss, and what exactness depends on."""


def save_checkpoint(folder: Path, step: int, state: State, *, keep: int, also: Callable[[Path], None]) -> Path:
    """Write checkpoints/<step>/ whole or not at all, then drop all but the last `keep`.

    `also` writes further files into the folder. Raises UserError when the disk is full; older checkpoints stay.
    """
    place = folder / "checkpoints" / f"{step:06d}"
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    for torn in place.parent.glob(".[0-9]*"):  # of a process that was killed while it saved
        shutil.rmtree(torn, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        torch.save(state, beside / STATE)
        also(beside)
        if place.exists():
            shutil.rmtree(place)
        beside.replace(place)
    except OSError as error:
        raise disk_error(error, folder) from error
    except RuntimeError as error:  # torch's file writer reports a full disk this way
        if "write" not in str(error) and "No space" not in str(error):
            raise
        raise disk_error(OSError(errno.ENOSPC, "No space left on device"), folder) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for old in steps_saved(folder)[:-keep]:
        shutil.rmtree(folder / "checkpoints" / f"{old:06d}", ignore_errors=True)
    return place


def disk_error(error: OSError, folder: Path) -> UserError:
    """A failed write in a person's words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            "The disk is full.",
            f"Nothing more fits into {folder}.",
            "Free some space and resume; the last checkpoint is whole.",
        )
    return UserError(f"{folder} cannot be written.", str(error), "Check the folder's permissions.")


def steps_saved(folder: Path) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    return sorted(int(path.parent.name) for path in (folder / "checkpoints").glob(f"[0-9]*/{STATE}"))


def load_checkpoint(folder: Path) -> tuple[State, list[int]]:
    """The last checkpoint that reads whole, and the steps of newer ones that do not. Raises UserError for none."""
    damaged: list[int] = []
    for step in sorted((int(place.name) for place in (folder / "checkpoints").glob("[0-9]*")), reverse=True):
        file = folder / "checkpoints" / f"{step:06d}" / STATE
        try:
            state: State = torch.load(file, map_location="cpu", weights_only=True)
            if not state.keys() >= _NEEDED:
                raise ValueError("it lacks what a resume needs")
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, AttributeError):
            damaged.append(step)  # torn or gone: the one before it may be whole
            continue
        return state, damaged
    if damaged:
        raise UserError(
            "This run cannot be resumed.",
            f"All of its checkpoints are damaged: steps {', '.join(map(str, reversed(damaged)))}.",
            "Start it again from the beginning, as a new run.",
        )
    raise UserError(
        "This run has no checkpoint to resume from.",
        f"{folder / 'checkpoints'} holds none.",
        "Start it again from the beginning.",
    )
