"""What tests of runs share: a new run in a workspace, and waiting for what must come."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path

from reparam_diffusion.config import settle
from reparam_diffusion.jobs import runs

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)
ROOT = Path(__file__).resolve().parents[1]


def new_run(workspace: Path, *, steps: int = 8, seed: int = 0) -> Path:
    """A run's folder with settings and nothing else."""
    config = settle(
        {
            "data": {"trigger": "sks", "class_word": "toy", "images": "pictures"},
            "training": {"steps": steps, "seed": seed},
            "model": {"device": "cpu"},
        }
    )
    return runs.create_run(config, workspace, now=NOW)


def wait_for(what: Callable[[], bool], *, seconds: float = 30) -> None:
    """Until it is so; fails when it is not in time."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
