"""The worker: trains one run, writes what happens to events.jsonl, heeds requests, and shelves the adapter.

`work` runs in this process and yields the events; `launch` starts it as a process of its own that outlives its parent.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

import psutil  # type: ignore[import-untyped]  # it ships no types

from reparam_diffusion import events as e
from reparam_diffusion.config import TrainConfig, adapter_name
from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import of_run
from reparam_diffusion.jobs import locks, runs
from reparam_diffusion.jobs.fold import WAITING

MODULE = "reparam_diffusion.jobs.worker"
LOOK_AGAIN = 0.5  # seconds between two tries for the device


class Train(Protocol):
    """What trains: the loop's own signature."""

    def __call__(
        self, config: TrainConfig, *, stop: Callable[[], str | bool], folder: Path, resume: bool = False
    ) -> Iterator[e.Event]: ...


def work(
    folder: Path, *, resume: bool = False, keep_requests: bool = False, train: Train | None = None
) -> Iterator[e.Event]:
    """Train the run in `folder` and yield its events, each written to events.jsonl first. Errors come as Failed.

    Raises UserError before the first event when another process works on the run. Requests left from before are
    forgotten unless `keep_requests`. `train` stands in for the loop in tests.
    """
    folder = folder.resolve()
    config = runs.read_config(folder)
    with locks.hold_run(folder), heeded_signals() as signalled, runs.EventLog(folder) as log:
        if not keep_requests:
            runs.clear_requests(folder)

        def stop() -> str:
            return signalled() or runs.asked(folder) or runs.take_sample(folder)

        for event in _told(config, folder, stop, resume=resume, train=train):
            log.append(event)
            yield event
        runs.clear_requests(folder)
    if train is None:
        _remember_pace(folder)


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
    except UserError as error:
        yield e.Failed(error.what, error.why, error.do)
    except Exception as error:  # The worker's door: nobody else is left to tell, and the run must not end in silence.
        with runs.log_file(folder).open("a", encoding="utf-8") as log:
            traceback.print_exception(error, file=log)
        yield _explained(error, folder)


def _on_device(
    config: TrainConfig, folder: Path, stop: Callable[[], str], *, resume: bool, train: Train | None
) -> Iterator[e.Event]:
    """Wait for the device, train on it, and put the adapter on the shelf."""
    lock = locks.device_lock(device_of(config))
    last = runs.state_of(folder).step
    with ExitStack() as held:
        has_said = False
        while not held.enter_context(locks.try_hold(lock)):
            if not has_said:
                yield e.Prepared(WAITING, 0, 1)
                has_said = True
            request = stop()
            if request in ("stop", "pause"):
                yield e.Paused(last) if request == "pause" else e.Stopped(last, "")
                return
            time.sleep(LOOK_AGAIN)
        if train is None:
            from reparam_diffusion.training.loop import train as loop

            train = loop
        preview: Path | None = None
        for event in train(config, stop=stop, folder=folder, resume=resume):
            if isinstance(event, e.Sampled):
                preview = folder / event.path
            if isinstance(event, e.Finished | e.Stopped) and event.path:
                yield _shelved(config, folder, folder / event.path, preview, step=event.step)
            yield event


def device_of(config: TrainConfig) -> str:
    """The name under which the run's device is locked."""
    return locks.device_name(config.model.device)


def _shelved(config: TrainConfig, folder: Path, file: Path, preview: Path | None, *, step: int) -> e.Event:
    """Put the finished adapter into the gallery; a full disk there must not spoil the run."""
    is_style = config.data.kind == "style"
    words = [config.data.trigger] if is_style else [config.data.trigger, config.data.class_word]
    facts: dict[str, object] = {"activation text": " ".join(word for word in words if word)}
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
            "Choose the settings for your graphics card, batch 1, or a smaller resolution or rank.",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return e.Failed("The disk is full.", f"There is no room left for {folder}.", "Make room, then resume the run.")
    return e.Failed(
        "The training broke off through a mistake of ours.",
        re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}".splitlines()[0])[:300],
        f"The full report is at the end of {runs.log_file(folder)}; please send it to us.",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on whatever device."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("out of memory", "can't allocate memory", "not enough memory")
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
    runs.read_config(folder)
    if runs.has_worker(folder):
        raise UserError(f"The run {folder.name} is being worked on already.", do="Wait for it, or stop it first.")
    runs.clear_requests(folder)
    command = [sys.executable, "-m", MODULE, str(folder)] + (["--resume"] if resume else [])
    with runs.log_file(folder).open("ab") as log, runs.EventLog(folder) as events:
        process = start_detached(command, log)
        events.append(e.Launched(process.pid, str(folder)))
    return process.pid


def start_detached(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a process that outlives this one, with its words in `log`."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=_environment(),
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


def _environment() -> dict[str, str]:
    """The parent's environment, with the library found wherever the parent found it and one thread a physical core."""
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (root, environment.get("PYTHONPATH", "")) if path)
    environment["OMP_NUM_THREADS"] = str(threads())
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
    options = parser.parse_args(arguments)
    try:
        failed = False
        for event in work(options.folder, resume=options.resume, keep_requests=True, train=train):
            failed = isinstance(event, e.Failed)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
