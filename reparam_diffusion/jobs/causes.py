"""Why a run of several processes ended: the process that fails leaves its reason where the first one finds it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it ships no types

from reparam_diffusion import events as e
from reparam_diffusion.files import beside
from reparam_diffusion.training.processes import is_first, rank_of

PATIENCE = 1.5
"""Seconds that the first process waits for the reason of another one, which may still be writing it."""
_TOGETHER = 60.0
"""Seconds within which the processes of a run start: what is older was left by an earlier session."""


def leave_cause(folder: Path, failed: e.Failed) -> e.Failed:
    """Keep why this process failed, for the first process to report; returns it."""
    if not is_first():
        with suppress(OSError), beside(folder / f".failed-{rank_of()}.json") as hidden:  # a full disk has its own words
            hidden.write_text(failed.to_json(), encoding="utf-8")
    return failed


def find_cause(folder: Path) -> e.Failed | None:
    """Why another process of this run failed, with its number; None where it left no reason, as when it was killed."""
    if not is_first():
        return None
    begun = float(psutil.Process(os.getpid()).create_time()) - _TOGETHER
    end = time.monotonic() + PATIENCE
    while True:
        for file in sorted(folder.glob(".failed-*.json")):
            with suppress(OSError, ValueError):
                failed = e.from_json(file.read_text(encoding="utf-8"))
                if isinstance(failed, e.Failed) and failed.time >= begun:
                    file.unlink()
                    number = file.stem.rpartition("-")[2]
                    return e.Failed(f"Process {number} of this run failed: {failed.what}", failed.why, failed.do)
        if time.monotonic() > end:
            return None
        time.sleep(0.05)
