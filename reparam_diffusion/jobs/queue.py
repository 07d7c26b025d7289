"""The queue of a workspace: queue.json, runs in the order in which they start, served by whoever finds a device free.

`submit` starts a run at once where its device is free; else it lines up, and the dispatcher (`python -m
reparam_diffusion.jobs.queue WORKSPACE`, a small process of its own) starts it when its turn comes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from reparam_diffusion import events as e
from reparam_diffusion.errors import NothingToDo, UserError
from reparam_diffusion.files import write_whole
from reparam_diffusion.jobs import locks, ray_jobs, runs, worker

MODULE = "reparam_diffusion.jobs.queue"
LOOK_AGAIN = 0.5  # seconds between two looks at the devices


@dataclass(frozen=True)
class Waiting:
    """One place in the queue: a run's name, and whether it goes on from a checkpoint."""

    run: str
    resume: bool = False


def waiting(workspace: Path) -> list[Waiting]:
    """Who waits, the next one first."""
    return [Waiting(name, resume) for name, resume in runs.read_queue(workspace).items()]


def submit(folder: Path, *, resume: bool = False) -> bool:
    """Start a run now, or line it up; says whether it started at once. Raises UserError when it is live or waits.

    One for a Ray cluster goes there at once: Ray's resources are its queue.
    """
    folder = folder.resolve()
    config = runs.read_config(folder)
    workspace = runs.workspace_of(folder)
    with _changing(workspace) as line:
        if runs.has_worker(folder):
            raise UserError(f"The run {folder.name} is being worked on already.", do="Wait for it, or stop it first.")
        runs.check_not_queued(folder)
        runs.check_unfinished(folder)
        if config.launch.launcher == "ray":
            ray_jobs.hand_over(folder, resume=resume)
            return False
        line.append(Waiting(folder.name, resume))
        started = _start_what_can(workspace, line)
    if folder.name not in started:
        ensure_served(workspace)
    return folder.name in started


def remove(workspace: Path, run: str) -> bool:
    """Take a run out of the queue; says whether it was there. Its folder stays."""
    with _changing(workspace) as line:
        before = len(line)
        line[:] = [one for one in line if one.run != run]
        return len(line) < before


def move(workspace: Path, run: str, by: int) -> None:
    """Let a run wait `by` places later (earlier where negative); the ends of the queue stop it."""
    with _changing(workspace) as line:
        at = next((n for n, one in enumerate(line) if one.run == run), None)
        if at is not None:
            one = line.pop(at)
            line.insert(max(0, at + by), one)


def clear(workspace: Path) -> int:
    """Send everyone home; says how many waited. Their folders stay, and each can be started again."""
    with _changing(workspace) as line:
        count = len(line)
        line.clear()
        return count


def stop(folder: Path, request: runs.Request = "stop") -> bool:
    """Ask a run to stop or pause; one in the queue leaves it instead. Says whether a process was asked.

    Raises UserError for a run that neither runs nor waits.
    """
    if remove(runs.workspace_of(folder), folder.name):
        return False
    runs.check_running(folder, or_queued=True)
    runs.ask(folder, request)
    return True


def ask_sample(folder: Path) -> None:
    """Ask a run for sample images now. Raises UserError for a run that is not running."""
    runs.check_running(folder)
    runs.ask(folder, "sample")


@contextmanager
def _changing(workspace: Path) -> Iterator[list[Waiting]]:
    """The queue for one change at a time, written back when it differs."""
    workspace.mkdir(parents=True, exist_ok=True)
    with FileLock(workspace / ".queue.lock", thread_local=False):
        line = waiting(workspace)
        before = list(line)
        yield line
        if line != before:
            write_whole(runs.queue_file(workspace), json.dumps([asdict(one) for one in line], indent=1))


# --- starting --------------------------------------------------------------------------------------------------------
def _start_what_can(workspace: Path, line: list[Waiting]) -> list[str]:
    """Launch each run whose devices are free and wanted by nobody before it; gives their names, out of the line now."""
    wanted = {}
    for one in list(line):
        try:
            wanted[one] = runs.devices_of(workspace / "runs" / one.run)
        except UserError as error:  # its folder is gone or broken, or its device: it cannot hold up the others
            line.remove(one)
            _tell(workspace / "runs" / one.run, error)
    taken = {device for device in set().union(*wanted.values()) if locks.is_held(locks.device_lock(device))}
    if all(devices & taken for devices in wanted.values()):
        return []  # the usual case: nothing else is worth a look
    taken |= _busy_devices(workspace)
    started = []
    for one, devices in wanted.items():
        is_free = not devices & taken
        taken |= devices
        if not is_free:
            continue
        line.remove(one)
        folder = workspace / "runs" / one.run
        with suppress(NothingToDo):  # it was finished elsewhere while it waited
            if not runs.has_worker(folder):
                worker.launch(folder, resume=one.resume)
                started.append(one.run)
    return started


def _tell(folder: Path, error: UserError) -> None:
    if folder.is_dir():
        with runs.EventLog(folder) as log:
            log.append(e.Failed(error.what, error.why, error.do))


def _busy_devices(workspace: Path) -> set[str]:
    """Devices of this workspace's live runs: a worker that was just launched does not hold its lock yet."""
    return {
        device for folder in runs.list_runs(workspace) if runs.has_worker(folder) for device in runs.devices_of(folder)
    }


# --- the dispatcher --------------------------------------------------------------------------------------------------
def _dispatcher_lock(workspace: Path) -> Path:
    return workspace / ".dispatcher.lock"


def ensure_served(workspace: Path) -> None:
    """Start the dispatcher when somebody waits and none is there, such as after a restart of the machine.

    The same for whoever tends the runs that Ray has.
    """
    workspace = workspace.resolve()
    ray_jobs.ensure_tended(workspace)
    if not waiting(workspace) or locks.is_held(_dispatcher_lock(workspace)):
        return
    with (workspace / "queue.log").open("ab") as log:
        worker.start_detached([sys.executable, "-m", MODULE, str(workspace)], log)


def serve(workspace: Path) -> None:
    """Start runs as devices come free, until nobody waits. A second dispatcher ends at once."""
    workspace = workspace.resolve()
    while waiting(workspace):  # asked again without the lock: somebody may have come while it was let go
        with locks.try_hold(_dispatcher_lock(workspace), patience=1.0) as held:
            if not held:
                return
            while True:
                with _changing(workspace) as line:
                    _start_what_can(workspace, line)
                    if not line:
                        break
                time.sleep(LOOK_AGAIN)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m reparam_diffusion.jobs.queue WORKSPACE`."""
    (workspace,) = sys.argv[1:] if arguments is None else arguments
    serve(Path(workspace))
    return 0


if __name__ == "__main__":
    sys.exit(main())
