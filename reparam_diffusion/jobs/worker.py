"""The worker: trains one run, writes what happens to events.jsonl, heeds requests, and shelves the adapter.

`work` runs in this process and yields the events; `launch` starts it as a process of its own that outlives its parent,
or as several that train together: then the first is the worker, and the others take its steps with it in silence.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

import psutil  # type: ignore[import-untyped]  # it ships no types
from filelock import FileLock

from reparam_diffusion import events as e
from reparam_diffusion.config import TrainConfig, adapter_name
from reparam_diffusion.data.sets import sources_of
from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import of_run
from reparam_diffusion.jobs import launchers, locks, runs
from reparam_diffusion.jobs.causes import find_cause, leave_cause
from reparam_diffusion.jobs.fold import WAITING
from reparam_diffusion.jobs.ray_note import read_note
from reparam_diffusion.models.precision import pick_device
from reparam_diffusion.models.room import is_out_of_memory
from reparam_diffusion.training.processes import (
    PeerLost,
    Processes,
    are_many,
    is_first,
    join_processes,
    leave_processes,
    rank_of,
)

MODULE = "reparam_diffusion.jobs.worker"
LOOK_AGAIN = 0.5  # seconds between two tries for the device
INSTANT = 0.2  # seconds for which a process that only looks may hold a lock


class Train(Protocol):
    """What trains: the loop's own signature."""

    def __call__(
        self, config: TrainConfig, *, stop: Callable[[], str | bool], folder: Path, resume: bool = False
    ) -> Iterator[e.Event]: ...


def work(
    folder: Path, *, resume: bool = False, keep_requests: bool = False, train: Train | None = None
) -> Iterator[e.Event]:
    """Train the run in `folder` and yield its events, each written to events.jsonl first. Errors come as Failed.

    Raises UserError before the first event when another process works on the run, and NothingToDo when the run is
    finished. Requests left from before are
    forgotten unless `keep_requests`. `train` stands in for the loop in tests. A process beside the first yields nothing
    but its failure.
    """
    folder = folder.resolve()
    config = runs.read_config(folder)
    if not is_first():
        yield from _work_along(config, folder, resume=resume, train=train)
        return
    with locks.hold_run(folder), heeded_signals() as signalled, runs.EventLog(folder) as log:
        runs.check_unfinished(folder)
        if not keep_requests:
            runs.clear_requests(folder)

        def stop() -> str:
            return signalled() or runs.asked(folder) or runs.take_sample(folder)

        log.reserve()
        for event in _told(config, folder, stop, resume=resume, train=train):
            try:
                log.append(event)
            except OSError as error:  # the disk is full: the last checkpoint is whole
                failed = _explained(error, folder)
                log.append_last(failed)
                yield failed
                break
            yield event
        runs.clear_requests(folder)
    leave_processes()
    if train is None and not are_many():
        _remember_pace(folder)


def _work_along(config: TrainConfig, folder: Path, *, resume: bool, train: Train | None) -> Iterator[e.Event]:
    """What a process beside the first does: the same steps, and words only for its own failure."""
    for event in _told(config, folder, lambda: "", resume=resume, train=train):
        if isinstance(event, e.Failed):
            sys.stderr.write(f"Process {rank_of()}: {event.what} {event.why}\n")
            yield event
            return
    leave_processes()


def _remember_pace(folder: Path) -> None:
    """Keep how long things took, for the estimates before the next Start."""
    from reparam_diffusion.jobs import estimates

    with suppress(OSError, UserError):  # the run is done; what was not measured is measured another time
        estimates.remember(folder)


def _told(
    config: TrainConfig, folder: Path, stop: Callable[[], str], *, resume: bool, train: Train | None
) -> Iterator[e.Event]:
    """The run's events; whatever goes wrong is the last of them."""
    try:
        yield from _on_device(config, folder, stop, resume=resume, train=train)
    except PeerLost as error:
        yield find_cause(folder) or e.Failed(error.what, error.why, error.do)
    except UserError as error:
        yield leave_cause(folder, e.Failed(error.what, error.why, error.do))
    except Exception as error:  # The worker's door: nobody else is left to tell, and the run must not end in silence.
        if is_first():
            with runs.log_file(folder).open("a", encoding="utf-8") as log:
                traceback.print_exception(error, file=log)
        else:
            traceback.print_exception(error)
        yield leave_cause(folder, _explained(error, folder))


def _on_device(
    config: TrainConfig, folder: Path, stop: Callable[[], str], *, resume: bool, train: Train | None
) -> Iterator[e.Event]:
    """Wait for the devices, train on them, and put the adapter on the shelf."""
    processes = join_processes(pick_device(config.model.device))
    wanted = [locks.device_lock(device) for device in _own_devices(config, processes)]
    last = runs.state_of(folder).step
    with ExitStack() as held:
        if not processes.is_main:
            held.enter_context(heeded_signals())  # a signal to all is the first one's to heed
        waiting = _hold_devices(wanted, folder, processes)
        while True:
            try:
                said = next(waiting)
            except StopIteration as end:
                held.push(end.value)
                break
            if said:
                yield e.Prepared(WAITING, 0, 1, said)
            request = processes.agree(stop())
            if request in ("stop", "pause"):
                yield e.Paused(last) if request == "pause" else e.Stopped(last, "")
                return
        if train is None:
            from reparam_diffusion.training.loop import train as loop

            train = loop
        preview: Path | None = None
        for event in train(config, stop=stop, folder=folder, resume=resume):
            if isinstance(event, e.Sampled):
                preview = folder / event.path
            if processes.is_main and isinstance(event, e.Finished | e.Stopped) and event.path:
                yield _shelved(config, folder, folder / event.path, preview, step=event.step)
            yield event


def _hold_devices(wanted: list[Path], folder: Path, processes: Processes) -> Generator[str, None, ExitStack]:
    """Wait until all processes hold their devices. Yields between two tries, with words whenever the reason changes.

    Returns what lets go of the devices.
    """
    workspace = runs.workspace_of(folder)
    said, patience = "", INSTANT
    while True:
        with ExitStack() as tried:
            holder = locks.Holder(f"run {folder.name}", str(workspace))
            got = tried.enter_context(locks.try_hold_all(wanted, patience=patience, holder=holder))
            if processes.have_all(got):
                return tried.pop_all()
        holders = [] if got else [locks.describe_holder(lock, workspace) for lock in wanted]
        reason = ", ".join(dict.fromkeys(filter(None, holders))) or ("other processes of this run" if got else said)
        yield "" if reason == said else reason
        said, patience = reason, 0.0
        time.sleep(LOOK_AGAIN)


def _own_devices(config: TrainConfig, processes: Processes) -> list[str]:
    """Which devices this process locks: the first of a machine those of all its processes, the others none."""
    if config.launch.launcher == "ray" or processes.local_rank:
        return []
    return locks.several_devices(locks.device_of(config), processes.local_ranks)


def _shelved(config: TrainConfig, folder: Path, file: Path, preview: Path | None, *, step: int) -> e.Event:
    """Put the finished adapter into the gallery; a full disk there must not spoil the run."""
    called = []
    for one in sources_of(config.data):
        words = [one.trigger] if one.kind == "style" else [one.trigger, one.class_word]
        called += [" ".join(word for word in words if word)] if one.trigger or one.place == "data" else []
    facts: dict[str, object] = {"activation text": ", ".join(dict.fromkeys(called))}
    workspace = runs.workspace_of(folder)
    try:
        added = of_run.shelve(
            file, workspace, run=folder.name, name=adapter_name(config), thumbnail=preview, facts=facts
        )
    except (OSError, UserError) as error:
        why = error.why if isinstance(error, UserError) else f"{error.strerror}."
        return e.Warned(f"The adapter could not be put into the gallery: {why} It lies in the run's folder.")
    return e.Saved(step, os.path.relpath(added, folder), "gallery")


# --- errors in a person's words --------------------------------------------------------------------------------------
def _explained(error: Exception, folder: Path) -> e.Failed:
    """What happened, for a person: memory, disk, or our own mistake."""
    if is_out_of_memory(error):
        return e.Failed(
            "The memory is not enough for these settings.",
            "Training needs more than this device has free.",
            "Choose your graphics card's settings, gradient checkpointing, batch 1, or a smaller resolution or rank.",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return e.Failed(
            "The disk is full.",
            f"Nothing more fits into {folder}.",
            "Free some space and resume; the last checkpoint is whole.",
        )
    return e.Failed(
        "The training broke off through a mistake of ours.",
        re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}".splitlines()[0])[:300],
        f"The full report is at the end of {runs.log_file(folder)}; please send it to us.",
    )


# --- processes -------------------------------------------------------------------------------------------------------
@contextmanager
def heeded_signals() -> Iterator[Callable[[], str]]:
    """While the body runs, SIGTERM and the first Ctrl-C mean "stop"; gives what asks for it. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""
        return
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt  # a person who asks twice means now
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: "stop" if received else ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch(folder: Path, *, resume: bool = False) -> int:
    """Start the run's worker as a process of its own, in its own session, and return its number.

    Raises UserError when the run is being worked on already.
    """
    folder = folder.resolve()
    config = runs.read_config(folder)
    with FileLock(folder / ".launch.lock", thread_local=False):  # of two that launch it at once, one does
        if runs.has_worker(folder):
            raise UserError(f"The run {folder.name} is being worked on already.", do="Wait for it, or stop it first.")
        runs.check_unfinished(folder)
        runs.clear_requests(folder)
        command = launchers.command_of(config.launch, MODULE, arguments_of(folder, resume=resume))
        with runs.log_file(folder).open("ab") as log, runs.EventLog(folder) as events:
            process = start_detached(command, log, share=config.launch.processes)
            events.append(e.Launched(process.pid, str(folder)))
        return process.pid


def arguments_of(folder: Path, *, resume: bool) -> list[str]:
    """The worker's own command line."""
    return [str(folder), *(["--resume"] if resume else [])]


def start_detached(command: list[str], log: IO[bytes], *, share: int = 1) -> subprocess.Popen[bytes]:
    """Start a process that outlives this one, with its words in `log`. `share`: how many share the processor."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment_of(share),
        start_new_session=True,
        creationflags=_creation_flags(),
    )
    # Somebody must wait for the child, or it stays a zombie for as long as a web server lives.
    threading.Thread(target=process.wait, name=f"reap {process.pid}", daemon=True).start()
    return process


def _creation_flags() -> int:
    """Windows' way to start a process that gets none of its parent's signals."""
    if sys.platform == "win32":
        return subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS
    return 0


def environment_of(share: int) -> dict[str, str]:
    """The parent's environment, with the library found wherever the parent found it and one thread a physical core."""
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (root, environment.get("PYTHONPATH", "")) if path)
    environment["OMP_NUM_THREADS"] = str(max(1, threads() // share))
    return environment


def threads() -> int:
    """Processor threads of a process that is started here: OMP_NUM_THREADS where it is set, else the physical cores."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdigit():
        return max(1, int(chosen))
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else cores
    return max(1, min(cores, allowed))


def main(arguments: list[str] | None = None, *, train: Train | None = None) -> int:
    """`python -m reparam_diffusion.jobs.worker FOLDER [--resume]`: 0 when the run ended well, 1 failed, 2 refused."""
    parser = argparse.ArgumentParser(prog=MODULE, description="Train one run.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--job", default="", help="the Ray job that this is; another one may have taken its place")
    options = parser.parse_args(arguments)
    note = read_note(options.folder)
    if options.job and (note is None or note.job != options.job):
        return 0  # it was stopped while it waited, or another job does the run now
    try:
        failed = False
        for event in work(options.folder, resume=options.resume, keep_requests=True, train=train):
            failed = isinstance(event, e.Failed)
    except UserError as error:
        if is_first():
            sys.stderr.write(f"{error}\n")
        return 2
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
