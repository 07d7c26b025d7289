"""How a run's processes are started: the command line of one process, or of accelerate's launcher for several.

What accelerate starts is the worker itself, once a process: the first holds the run and writes, the others train along.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from reparam_diffusion import events as e
from reparam_diffusion.config import LaunchSettings, TrainConfig, settle, to_toml
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import write_whole
from reparam_diffusion.jobs import runs
from reparam_diffusion.jobs.ray_note import read_note
from reparam_diffusion.models.precision import pick_device
from reparam_diffusion.training.processes import are_many, join_processes

LOOK_AGAIN = 0.2  # seconds between two looks at a run that is followed
ONE_MACHINE = ("--num_machines", "1", "--machine_rank", "0", "--mixed_precision", "no", "--dynamo_backend", "no")
"""What accelerate would else take from the answers to `accelerate config`, or warn that it was not told."""


def is_alone(launch: LaunchSettings) -> bool:
    """Whether a run is one process on this machine, which may be the caller's own."""
    return launch.launcher == "local" and launch.processes == 1


def command_of(launch: LaunchSettings, module: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs a module's processes: python alone, or through accelerate's launcher."""
    wanted = ["-m", module, *arguments]
    if launch.launcher == "accelerate":
        count = ["--num_processes", str(launch.processes)] if launch.processes > 1 else []
        return [sys.executable, "-m", "accelerate.commands.launch", *count, *wanted]
    if launch.processes == 1:
        return [sys.executable, *wanted]
    # "multi_gpu" is its name for several processes; without a GPU they talk through gloo. Port 0: a free one.
    several = ["--multi_gpu", "--num_processes", str(launch.processes), "--main_process_port", "0", *ONE_MACHINE]
    return [sys.executable, "-m", "accelerate.commands.launch", *several, *wanted]


def new_run(config: TrainConfig, workspace: Path, *, now: datetime.datetime) -> Path:
    """A new run's folder; under `accelerate launch` the first process makes it and tells the others."""
    if not are_many():
        return runs.create_run(config, workspace, now=now)
    processes = join_processes(pick_device(config.model.device))
    folder = str(runs.create_run(config, workspace, now=now)) if processes.is_main else ""
    return Path(processes.agree(folder))


def change_processes(folder: Path, processes: int) -> None:
    """Let a run go on in another number of processes. Raises UserError for a wrong number, or a run that is at work."""
    if runs.has_worker(folder):
        raise UserError(f"The run {folder.name} is being worked on already.", do="Wait for it, or stop it first.")
    config = runs.read_config(folder)
    changed = settle(config.model_dump(mode="json"), {"launch": {"processes": processes}})
    write_whole(folder / "config.toml", to_toml(changed))


def follow(folder: Path, *, offset: int) -> Iterator[e.Event]:
    """The events of a run that others work on, from a byte of events.jsonl on, until nobody does.

    The first Ctrl-C asks the run to stop, the second leaves it to itself. A run without a last word ends in Failed;
    that Ray does not answer is told whenever it begins.
    """
    from reparam_diffusion.jobs.worker import heeded_signals

    has_asked, trouble = False, ""
    with heeded_signals() as signalled:
        while True:
            is_over = runs.size_of_events(folder) <= offset and not runs.state_of(folder).is_live
            new, offset = runs.read_events(folder, offset)
            yield from new
            note, told = read_note(folder), trouble
            trouble = note.trouble if note else ""
            if trouble and not told:
                yield e.Warned(trouble)
            if is_over and not new:
                break
            if signalled() and not has_asked:
                runs.ask(folder, "stop")
                has_asked = True
            time.sleep(LOOK_AGAIN)
    state = runs.state_of(folder)
    if state.state == "lost":
        yield e.Failed(state.message)
