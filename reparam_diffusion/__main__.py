"""The command line: train, resume, stop, generate, inspect, methods. Errors are told in a sentence; exit code 2."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from reparam_diffusion.errors import NothingToDo, UserError, explain_os_error, unknown_name
from reparam_diffusion.jobs import (
    cache_commands,
    check_commands,
    draw_command,
    file_commands,
    gallery_commands,
    model_commands,
)
from reparam_diffusion.printable import hush_libraries, say

if TYPE_CHECKING:
    from reparam_diffusion.data.images import Picture
    from reparam_diffusion.events import Event

app = typer.Typer(
    name="reparam_diffusion",
    help="Train, try and export adapters (LoRA, LoHa, LoKr, OFT, AdaLoRA) for Stable Diffusion models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Workspace = Annotated[Path, typer.Option(help="Folder for runs, adapters and pictures.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON line an event instead of a progress bar.")]


@app.command()
def train(
    images: Annotated[str, typer.Option(help="Folder of pictures (captions in .txt files beside them are used).")] = "",
    trigger: Annotated[str, typer.Option(help='The made-up word that calls it, such as "sks".')] = "",
    class_word: Annotated[str, typer.Option(help='What it is, such as "toy".')] = "",
    preset: Annotated[str, typer.Option(help="A preset's name or a .toml file.")] = "",
    card: Annotated[str, typer.Option(help="Your graphics card's memory in GB, for settings that fit.")] = "",
    model: Annotated[str, typer.Option(help='Base model: "starter", a folder, a .safetensors file or a hub id.')] = "",
    name: Annotated[str, typer.Option(help="The adapter's name.")] = "",
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: key=value, repeatable.")] = None,
    processes: Annotated[int, typer.Option(min=0, max=64, help="Processes that train it, one a GPU; 0: as set.")] = 0,
    workspace: Workspace = Path("workspace"),
    dry_run: Annotated[bool, typer.Option(help="Only say what it would cost: file, time, memory.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter on a folder of pictures. Ctrl-C stops and keeps what was learned."""
    from datetime import datetime

    from reparam_diffusion import config as c
    from reparam_diffusion.data.folder_layout import expand_folders
    from reparam_diffusion.data.sets import find_all
    from reparam_diffusion.jobs import presets
    from reparam_diffusion.jobs.launchers import new_run
    from reparam_diffusion.jobs.ray_jobs import check
    from reparam_diffusion.training.cards import card_layer
    from reparam_diffusion.training.processes import are_many, is_first
    from reparam_diffusion.workspace import require_workspace

    given: dict[str, str | int] = {
        "data.images": images,
        "data.trigger": trigger,
        "data.class_word": class_word,
        "model.path": model,
        "output.name": name,
        "launch.processes": processes,
    }
    flags: dict[str, Any] = {}
    for key, value in given.items():
        if value:
            group, _, field = key.partition(".")
            flags.setdefault(group, {})[field] = value
    config = c.settle(c.find_preset(preset) if preset else {}, card_layer(card), flags, c.parse_set(settings or []))
    if not config.data.images:
        raise UserError("No pictures were given.", do="Name a folder with --images.", place="data.images")
    data, layout = expand_folders(config.data)
    config = config.model_copy(update={"data": data})
    main, *_ = find_all(config.data, least_side=1)  # a wrong path is told before anything is made
    for note in [*layout, *presets.notes_on(preset, config, card=card)] if is_first() else ():
        say(f"Note: {note}", err=True)
    if dry_run:
        _say_plan(config, workspace, pictures=main.pictures)
        return
    check(config)
    require_workspace(workspace, "runs")
    if -1 in (config.training.seed, config.output.sample_seed) and not are_many():
        config = c.choose_seeds(config)
        say(f"Seeds: training {config.training.seed}, samples {config.output.sample_seed}.", err=True)
    _run(new_run(config, workspace, now=datetime.now()), as_json=as_json)


@app.command()
def resume(
    run: str,
    processes: Annotated[
        int, typer.Option(min=0, max=64, help="Go on in another number of processes; 0: as before.")
    ] = 0,
    workspace: Workspace = Path("workspace"),
    as_json: Json = False,
) -> None:
    """Go on with a run from its last checkpoint. A finished run stays as it is: nothing to do, exit code 0."""
    from reparam_diffusion.files import require_writable
    from reparam_diffusion.jobs.launchers import change_processes
    from reparam_diffusion.jobs.runs import check_not_queued, check_unfinished, has_worker
    from reparam_diffusion.training.processes import is_first

    folder = _run_folder(run, workspace)
    if is_first():
        check_not_queued(folder)
        if not has_worker(folder):
            check_unfinished(folder)
    require_writable(folder / "events.jsonl")
    if processes:
        change_processes(folder, processes)
    _run(folder, resume=True, as_json=as_json)


@app.command()
def stop(
    run: str,
    workspace: Workspace = Path("workspace"),
    pause: Annotated[bool, typer.Option(help="Only save its place; no adapter is made.")] = False,
) -> None:
    """Ask a run to stop: it saves its adapter and ends; it can be resumed."""
    from reparam_diffusion.files import require_writable
    from reparam_diffusion.jobs import queue

    folder = _run_folder(run, workspace)
    require_writable(folder / "ask" / "stop")
    if queue.stop(folder, "pause" if pause else "stop"):
        say(f"Asked {folder.name} to {'pause' if pause else 'stop'}.")
    else:
        say(f"Took {folder.name} out of the queue.")


@app.command()
def inspect(
    file: str,
    model: Annotated[str, typer.Option(help="Also try the file on this base model.")] = "",
    workspace: Workspace = Path("workspace"),
    as_json: Json = False,
) -> None:
    """Say what an adapter file holds: method, base, ranks, layers, trigger, and keys that match nothing."""
    from reparam_diffusion.gallery.report import report_lines, report_of
    from reparam_diffusion.gallery.shelf import locate

    path = locate(file, workspace)
    report = report_of(path, model or None)
    say(json.dumps(report, indent=1) if as_json else "\n".join(report_lines(report)))


@app.command()
def methods(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option(help="Print the README's table.")] = False,
) -> None:
    """List the adapter methods and their settings."""
    from reparam_diffusion.adapters import METHODS

    if markdown:
        rows = ["| method | good for | settings (default) |", "|---|---|---|"]
        for method in METHODS.values():
            fields = [(n, f) for n, f in method.spec.model_fields.items() if n != "method"]
            cells = ", ".join(f"`{n}` ({json.dumps(f.default)})" for n, f in fields)
            rows.append(f"| **{method.title}** | {method.summary} | {cells} |")
        say("\n".join(rows))
        return
    if as_json:
        say(json.dumps({name: method.spec.model_json_schema() for name, method in METHODS.items()}, indent=1))
        return
    for name, method in METHODS.items():
        say(f"{name}  ({method.title}) {method.summary}")
        for field, info in method.spec.model_fields.items():
            if field != "method":
                say(f"    adapter.{field} = {info.default}   {info.description}")


@app.command()
def demo(workspace: Workspace = Path("workspace"), preset: str = "quick") -> None:
    """Train the bundled teddy and draw it before and after, in about a minute."""
    from reparam_diffusion.jobs.demo import run_demo

    grid, adapter, seconds = run_demo(workspace, preset=preset)
    say(f"Before and after: {grid.resolve()}\nAdapter: {adapter.resolve()}\nTook {seconds:.0f} seconds.")


for commands in (draw_command, file_commands, gallery_commands, model_commands, check_commands, cache_commands):
    commands.register(app)


def _run_folder(run: str, workspace: Path) -> Path:
    """A run by its folder, its name, or "last"."""
    from reparam_diffusion.jobs.runs import list_runs
    from reparam_diffusion.workspace import require_readable

    require_readable(workspace)
    known = list_runs(workspace)
    for folder in known:
        if run in (folder.name, "last"):
            return folder
    if run.strip() and (Path(run) / "config.toml").is_file():
        return Path(run)
    if not known:
        raise UserError(f'There is no run called "{run}".', f"{workspace} has no runs yet.", "Train one first.")
    raise unknown_name("run", run, [folder.name for folder in known])


def _say_plan(config: Any, workspace: Path, *, pictures: Sequence[Picture]) -> None:
    """What the run would cost. Any: config's module is imported late."""
    from reparam_diffusion.jobs.estimates import cost_here
    from reparam_diffusion.jobs.runs import with_start
    from reparam_diffusion.models.precision import pick_device
    from reparam_diffusion.training.check import check_settings

    check_settings(config)
    sides = [(image.width, image.height) for image in pictures]
    cost = cost_here(with_start(config, workspace), pictures=len(pictures), workspace=workspace, sides=sides)
    say(f"On {config.model.path}, on {pick_device(config.model.device)}.")
    for line in [*cost.sentences(), *(f"  {note}" for note in cost.notes)]:
        say(line)


def _run(folder: Path, *, resume: bool = False, as_json: bool) -> None:
    """Train here, also as one of several that were launched together, or have the run started and follow it."""
    from reparam_diffusion.jobs import launchers, queue, runs, worker
    from reparam_diffusion.training.processes import are_many

    launch = runs.read_config(folder).launch
    if are_many() or launchers.is_alone(launch):
        _follow(worker.work(folder, resume=resume), folder, as_json=as_json)
    told = runs.size_of_events(folder)
    if launch.launcher == "ray":
        queue.submit(folder, resume=resume)
    else:
        worker.launch(folder, resume=resume)
    _follow(launchers.follow(folder, offset=told), folder, as_json=as_json)


def _follow(events: Iterable[Event], folder: Path, *, as_json: bool) -> NoReturn:
    """Show a run's events as they come; exits with 1 when it failed. Of several processes only the first shows them."""
    from reparam_diffusion import events as e
    from reparam_diffusion.training.processes import is_first

    if not is_first():
        raise typer.Exit(int(any(isinstance(event, e.Failed) for event in events)))
    if as_json:
        failed = False
        for event in events:
            say(event.to_json())
            failed = isinstance(event, e.Failed)
        raise typer.Exit(int(failed))
    from reparam_diffusion.jobs.console import show

    raise typer.Exit(show(events, folder))


def main() -> None:
    """The first of the three doors at which a UserError is shown, and a refusal of the system about a file."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what this terminal cannot show must not end the program
            stream.reconfigure(errors="backslashreplace")
    hush_libraries()
    try:
        app()
    except NothingToDo as note:
        say(f"Nothing to do: {note}", err=True)
    except UserError as error:
        _end_with(error)
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        _end_with(explained)


def _end_with(error: UserError) -> NoReturn:
    from reparam_diffusion.training.processes import is_first

    if is_first():  # of several processes, one tells
        say(f"Error: {error}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
