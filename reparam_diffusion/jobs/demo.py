"""The whole job in one go, without a browser: train the teddy, draw it on backgrounds it was never seen on."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from reparam_diffusion.config import find_preset, settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.grid import make_grid
from reparam_diffusion.jobs.console import show
from reparam_diffusion.jobs.runs import create_run
from reparam_diffusion.jobs.worker import work
from reparam_diffusion.models.load import load_model
from reparam_diffusion.models.parts import ASSETS
from reparam_diffusion.workspace import require_workspace

TEDDY = {"data": {"images": str(ASSETS / "examples" / "teddy"), "trigger": "sks", "class_word": "toy"}}
BACKGROUNDS = ("red", "black", "pink", "brown")
"""None of them is behind the training pictures."""


def run_demo(workspace: Path, *, preset: str = "quick") -> tuple[Path, Path, float]:
    """Train and draw; returns the grid, the adapter and the seconds it took. Raises UserError when training failed."""
    from reparam_diffusion.apply import generate

    begun = time.time()
    require_workspace(workspace)
    require_workspace(workspace, "runs")
    config = settle(find_preset(preset), TEDDY, {"output": {"name": "demo teddy"}})
    folder = create_run(config, workspace, now=datetime.now())
    if show(work(folder), folder):
        raise UserError("The demo's training failed.", f"{folder / 'events.jsonl'} says why.")
    adapter = folder / "adapter.safetensors"
    model = load_model("starter")
    rows = []
    for name, adapters in (("base model", []), ("with the adapter", [adapter])):
        pictures = [
            generate(model, f"a 3d icon of sks toy on a {background} background", adapters=adapters, seed=n)[0]
            for n, background in enumerate(BACKGROUNDS)
        ]
        rows.append((name, pictures))
    grid = workspace / "demo.png"
    make_grid(rows, BACKGROUNDS).save(grid)
    return grid, adapter, time.time() - begun
