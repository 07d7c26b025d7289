"""What runs will cost: asked for by the page, told from what is known, found out in a process of its own.

`cost` reads; `find_out` leaves the settings in a folder and starts a detached process of low priority that counts the
memory of each and times its work, unless a run holds the device; `remember` keeps what a real run has shown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it ships no types
import torch

from reparam_diffusion import events as e
from reparam_diffusion.config import TrainConfig, read_settings, settle, to_toml
from reparam_diffusion.data.buckets import Size
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import cache_file, write_whole
from reparam_diffusion.jobs import locks, runs
from reparam_diffusion.jobs.locks import device_of
from reparam_diffusion.jobs.worker import start_detached, threads
from reparam_diffusion.models.folder import import_pipelines
from reparam_diffusion.models.outline import outline, shape_of
from reparam_diffusion.models.precision import pick_device
from reparam_diffusion.models.room import memory_of
from reparam_diffusion.training.cards import advise, room_on
from reparam_diffusion.training.estimate import Cost, cost_of, memory_piece
from reparam_diffusion.training.estimate_memory import count_memory
from reparam_diffusion.training.estimate_pace import Book, Piece, Unit, machine_name, pieces_of, seconds_of
from reparam_diffusion.training.estimate_probe import Interrupted, probe
from reparam_diffusion.training.measure import MOST_LOOKED_AT
from reparam_diffusion.training.ready import outline_for

MODULE = "reparam_diffusion.jobs.estimates"
LEFT_FREE = 0.8
"""A probe may take this share of a computer's memory that is free."""


def cost(config: TrainConfig, *, pictures: int, workspace: Path, sides: Sequence[Size] | None = None) -> Cost:
    """What a launched run with so many pictures will cost, as far as it is known: milliseconds, once warm.

    The first call for a model imports diffusers and reads its configuration (seconds). Raises UserError for a model or
    settings that cannot be.
    """
    return cost_of(config, pictures=pictures, workspace=workspace, threads=threads(), sides=sides)


def cost_here(config: TrainConfig, *, pictures: int, workspace: Path, sides: Sequence[Size] | None = None) -> Cost:
    """The same for a run in this process, its memory counted now (seconds); a hub id's configuration is fetched."""
    outline(config.model.path, fetch=True)
    if _memory_of(config) not in Book().read():
        Book().write({_memory_of(config): _count(config)})
    while (less := _helping(config)) is not None:
        Book().write({_memory_of(less): _count(less)})
    return cost_of(config, pictures=pictures, workspace=workspace, threads=torch.get_num_threads(), sides=sides)


def remember(folder: Path) -> None:
    """Keep the pace that a run's last session has shown. For the worker, when it ends; short sessions show nothing."""
    config = runs.read_config(folder)
    events, _ = runs.read_events(folder)
    started = next((event for event in reversed(events) if isinstance(event, e.Started)), None)
    if started is None:
        return
    pieces = _pieces(config, torch.get_num_threads())
    seconds = seconds_of(events, looked_at=_looked_at(folder, started.pictures))
    Book().write({pieces[unit]: value for unit, value in seconds.items()})


def _looked_at(folder: Path, trained: int) -> int:
    """How many pictures gave a run's fixed-noise loss: those held out, else those trained."""
    every = len(json.loads((folder / "pictures.json").read_text(encoding="utf-8")))
    return min(every - trained or trained, MOST_LOOKED_AT)


def _pieces(config: TrainConfig, threads: int) -> dict[Unit, Piece]:
    path = config.model.path
    machine = machine_name(pick_device(config.model.device), threads)
    return pieces_of(outline(path), shape_of(path), config, machine)


# --- finding out -----------------------------------------------------------------------------------------------------
def find_out(configs: Sequence[TrainConfig]) -> bool:
    """Have what is not known of these runs' costs found out, the first one first; whether there is anything to do.

    Call it as often as you like: one process serves all that ask, and what failed is not tried again.
    """
    asked = [config for config in configs if _gaps(config)]
    for config in reversed(asked):  # the newest file is served first
        settings = to_toml(config)
        write_whole(_asked() / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.toml", settings)
    if asked and not _is_served():
        with cache_file("estimates.log").open("wb") as log:
            process = start_detached([sys.executable, "-m", MODULE], log)
        write_whole(cache_file("estimates.pid"), str(process.pid))
    return bool(asked)


def _is_served() -> bool:
    """Whether a process takes what is asked, or has just been started to."""
    file = cache_file("estimates.pid")
    try:
        process = psutil.Process(int(file.read_text(encoding="utf-8")))
        is_the_one = process.create_time() <= file.stat().st_mtime + 1
        return is_the_one and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, psutil.Error):
        return False


def _asked() -> Path:
    return cache_file("asked")


def _lock() -> Path:
    return cache_file("estimates.lock")


def _gaps(config: TrainConfig) -> dict[str, Piece]:
    """What can be found out now: "memory", that of settings that may "help" where it is not enough, and "pace" unless
    the device is taken. What failed before is no gap.
    """
    known = Book().read()
    wanted = {"memory": _memory_of(config)}
    less = _helping(config)
    if less is not None:
        wanted["help"] = _memory_of(less)
    if not locks.is_held(locks.device_lock(device_of(config))):
        wanted["pace"] = _pieces(config, threads())["step"]
    return {gap: piece for gap, piece in wanted.items() if piece not in known and _failed(piece) not in known}


def _memory_of(config: TrainConfig) -> Piece:
    return memory_piece(shape_of(config.model.path), config, pick_device(config.model.device))


def _helping(config: TrainConfig) -> TrainConfig | None:
    """The same run with less, where only its memory is wanting to say what helps."""
    device, known = pick_device(config.model.device), Book().read()
    peak = known.get(_memory_of(config))
    if peak is None:
        return None

    def peak_of(one: TrainConfig) -> int | None:
        found = known.get(_memory_of(one))
        return None if found is None else int(found)

    return advise(config, int(peak), room=room_on(device), memory=memory_of(device), peak_of=peak_of).unknown


def _failed(piece: Piece) -> Piece:
    """The note that finding this out has failed."""
    return replace(piece, unit=f"{piece.unit}, failed")


def serve() -> None:
    """Take what was asked, the newest first, until nothing is left."""
    psutil.Process().nice(19 if sys.platform != "win32" else psutil.IDLE_PRIORITY_CLASS)
    import_pipelines()
    starting = time.process_time()  # what a run's process does, too, before it comes to its model
    with locks.try_hold(_lock()) as held:
        while held and (waiting := sorted(_asked().glob("*.toml"), key=lambda file: file.stat().st_mtime_ns)):
            file = waiting[-1]
            try:
                _answer(settle(read_settings(file)), starting)
            finally:
                file.unlink(missing_ok=True)


def _answer(config: TrainConfig, starting: float) -> None:
    """Count the memory and time the work, where that is not known; a run that wants the device goes first."""
    while gaps := _gaps(config):
        gap, piece = next(iter(gaps.items()))
        less = _helping(config) if gap == "help" else None
        try:
            Book().write(_time(config, starting) if gap == "pace" else {piece: _count(less or config)})
        except Interrupted:
            return
        except (
            Exception
        ):  # This process's door: out of memory, or our mistake. Pages ask every few seconds, so it is noted.
            traceback.print_exc()
            Book().write({_failed(piece): 1.0})


def _time(config: TrainConfig, starting: float) -> dict[Piece, float]:
    """Seconds of the run's pieces of work. Raises UserError where the memory is not enough to try."""
    peak, device = Book().read().get(_memory_of(config), 0.0), pick_device(config.model.device)
    if peak > room_on(device) * (1.0 if device.type == "cuda" else LEFT_FREE):
        raise UserError("There is not enough memory to time this run.", f"It needs {peak / 1e9:.1f} GB.")
    lock = locks.device_lock(device_of(config))
    with tempfile.TemporaryDirectory() as folder:
        seconds = probe(config, Path(folder), may_go_on=lambda: not locks.is_held(lock))
    pieces = _pieces(config, torch.get_num_threads())
    return {pieces[unit]: value + (starting if unit == "loading" else 0.0) for unit, value in seconds.items()}


def _count(config: TrainConfig) -> int:
    device = pick_device(config.model.device)
    memory = memory_of(device) if device.type != "cpu" else None
    return count_memory(outline_for(config, device), config, device.type, memory=memory).peak


if __name__ == "__main__":
    argparse.ArgumentParser(prog=MODULE, description="Find out what runs will cost.").parse_args()
    serve()
