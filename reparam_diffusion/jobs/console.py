"""A run's events on a terminal: one progress bar, one line for everything worth keeping."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reparam_diffusion import events as e
from reparam_diffusion.printable import printable


def show(events: Iterable[e.Event], folder: Path) -> int:
    """Print events until they end; 1 when the run failed, else 0."""
    console = Console(stderr=False, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    failed, steps, said = False, 0, ""
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Loading", total=None, note="")
        for event in events:
            match event:
                case e.Prepared():
                    progress.update(
                        task, description=printable(event.phase.capitalize()), completed=event.done, total=event.total
                    )
                case e.Started():
                    several = f" in {event.processes} processes" if event.processes > 1 else ""
                    summary = (
                        f"{event.method}: {event.sites} layers, {event.parameters:,} parameters, "
                        f"{event.pictures} pictures, {event.precision} on {event.device}{several}."
                    )
                    console.print(printable(summary), markup=False)
                    steps = event.steps
                    progress.update(task, description="Training", completed=event.first_step - 1, total=steps)
                case e.Step():
                    note = f"loss {event.loss:.4f}"
                    progress.update(task, description="Training", completed=event.step, total=steps, note=note)
            failed = isinstance(event, e.Failed)
            for line in _lines(event, folder):
                if line != said:  # whoever starts a run and the run itself both say that it begins
                    console.print(printable(line), markup=False)
                said = line
    return int(failed)


def _lines(event: e.Event, folder: Path) -> list[str]:
    """What stays on the screen after the bar has moved on."""
    match event:
        case e.Launched():
            return [f"Run {folder.name}", *([f"Ray job {event.job}"] if event.job else [])]
        case e.Prepared() if event.waiting_for:
            return [f"Waiting for the device, which is in use by {event.waiting_for}."]
        case e.Started():
            return event.sets
        case e.Warned():
            return [f"Note: {event.message}"]
        case e.Validated():
            kind = "held-out loss" if event.held_out else "fixed-noise loss"
            return [f"Step {event.step}: {kind} {event.loss:.4f}{' (best so far)' if event.best else ''}"]
        case e.Saved() if event.kind != "checkpoint":
            return [f"Adapter: {(folder / event.path).resolve()}"]
        case e.Paused():
            return [f"Paused at step {event.step}. Go on with: python -m reparam_diffusion resume {folder}"]
        case e.Stopped():
            return [f"Stopped at step {event.step}. Go on with: python -m reparam_diffusion resume {folder}"]
        case e.Failed():
            return [f"Failed: {' '.join(part for part in (event.what, event.why, event.do) if part)}"]
        case e.Finished():
            return [f"Finished in {event.seconds:.0f} seconds."]
    return []
