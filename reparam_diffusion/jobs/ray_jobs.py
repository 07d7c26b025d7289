"""Runs on a Ray cluster: handed over through its job API, watched there, stopped there. Ray's resources are the queue.

The workspace lies on a folder that all machines share. Only the tender (`python -m reparam_diffusion.jobs.ray_jobs
WORKSPACE`, a small process of its own) talks to Ray; what it hears goes into the run's folder, where looking is free.
A run stays Ray's until Ray or the run itself tells that it has ended, however long the head is silent.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from reparam_diffusion import events as e
from reparam_diffusion.config import LaunchSettings, TrainConfig
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import launchers, locks, runs, worker
from reparam_diffusion.jobs.ray_heads import Client, Head
from reparam_diffusion.jobs.ray_note import RayNote, read_note, remove_note, write_note

MODULE = "reparam_diffusion.jobs.ray_jobs"
HERE = "http://127.0.0.1:8265"
LOOK_AGAIN = 1.0  # seconds between two questions to Ray
SIZES = 10  # seconds to wait for what machines a cluster has
GRACE = 300.0  # seconds in which a run that was asked to stop must show life


def hand_over(folder: Path, *, resume: bool) -> None:
    """Have a run done by Ray. Raises UserError for what Ray cannot be asked; what Ray answers is told by the run."""
    config = runs.read_config(folder)
    check(config)
    runs.clear_requests(folder)
    write_note(folder, RayNote(_new_name(folder), config.launch.address or HERE, resume=resume))
    ensure_tended(runs.workspace_of(folder))


def check(config: TrainConfig) -> None:
    """Raises UserError for what Ray cannot be asked; a run that is not for Ray is none of its business."""
    if config.launch.launcher != "ray":
        return
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "Ray is not installed.",
            "Runs on a cluster need it.",
            "Run: pip install -r requirements-extras.txt",
            place="launch.launcher",
        )
    address = urlsplit(config.launch.address or HERE)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(
            f'"{config.launch.address}" is no address of a Ray dashboard.',
            do="Write it as http://machine:8265.",
            place="launch.address",
        )
    if ":" in config.model.device:
        raise UserError(
            f"Ray gives out the GPUs, so {config.model.device} cannot be chosen.",
            do="Use auto, cuda or cpu.",
            place="model.device",
        )


def _new_name(folder: Path) -> str:
    return f"{folder.name}-{uuid.uuid4().hex[:6]}"


# --- the tender ------------------------------------------------------------------------------------------------------
def _lock(workspace: Path) -> Path:
    return workspace / ".ray.lock"


def _live(workspace: Path) -> list[tuple[Path, RayNote]]:
    """The runs that Ray has, or is to have, in the order of their names."""
    found = ((file.parent, read_note(file.parent)) for file in sorted((workspace / "runs").glob("*/ray.json")))
    return [(folder, note) for folder, note in found if note is not None]


def ensure_tended(workspace: Path) -> None:
    """Start the tender when there is something to tend and none is there."""
    workspace = workspace.resolve()
    if locks.is_held(_lock(workspace)) or not _live(workspace):
        return
    with (workspace / "ray.log").open("ab") as log:
        worker.start_detached([sys.executable, "-m", MODULE, str(workspace)], log)


def serve(workspace: Path) -> None:
    """Hand over, watch and stop until Ray has no run of this workspace any more. A second tender ends at once."""
    workspace = workspace.resolve()
    while _live(workspace):  # asked again without the lock: somebody may have come while it was let go
        with locks.try_hold(_lock(workspace), patience=1.0) as held:
            if not held:
                return
            tender = Tender()
            while live := _live(workspace):
                for folder, note in live:
                    tender.tend(folder, note)
                time.sleep(LOOK_AGAIN)


class Tender:
    """Talks to Ray for the runs of a workspace. A silent head takes little of its time, so the others' runs go on."""

    def __init__(self) -> None:
        self._heads: dict[str, Head] = {}

    def tend(self, folder: Path, note: RayNote) -> None:
        """One look at one run: hand it over, or hear how it stands, or have it stopped."""
        head = self._heads.setdefault(note.address, Head(note.address))
        if note.status != "NEW" and not head.is_due:
            _bear_silence(folder)
            return
        try:
            _look(folder, note, head.client())
            head.has_answered()
        except RuntimeError:  # an answer, but of a cluster in trouble: it costs no time, so Ray is asked again soon
            head.has_answered()
            _bear_silence(folder)
        except OSError:  # no connection, or no answer, as requests tells it
            head.was_silent()
            _bear_silence(folder)
        except UserError as error:
            head.was_silent()
            _bear_silence(folder, error)


def _look(folder: Path, note: RayNote, client: Client) -> None:
    if note.status == "NEW":
        _begin(folder, note, client)
    elif note.status == "ASKED":
        _submit(folder, note, client)
    else:
        _hear(folder, note, client)


def _bear_silence(folder: Path, error: UserError | None = None) -> None:
    """A run that Ray was not asked for yet fails; one that it may have stays as it was, unless it tells its own end."""
    note = read_note(folder)
    if note is None:
        return  # somebody has taken the folder away
    address = f"Ray at {note.address} does not answer"
    if note.status == "NEW":
        _fail(
            folder, error or UserError(f"{address}.", "", "Start the cluster, or correct launch.address, then resume.")
        )
    elif runs.has_ended(folder):
        _fold_in(folder)
    elif (request := runs.asked(folder)) and _is_deaf(folder, request):
        _fold_in(folder, f"{address}, and the run showed no life after it was asked to {request}.")
    else:
        _keep(folder, note, replace(note, silent=True))


def _begin(folder: Path, note: RayNote, client: Client) -> None:
    """Ask for the job. All that is told is told before, so that nobody writes while the job does."""
    if request := runs.asked(folder):
        _end(folder, request)
        return
    cores, cards = _wanted(runs.read_config(folder))
    _tell(folder, e.Launched(0, str(folder), note.job), *_fits(note.address, cores, cards))
    asked = replace(note, status="ASKED")
    write_note(folder, asked)
    _submit(folder, asked, client)


def _submit(folder: Path, note: RayNote, client: Client) -> None:
    """Submit the job, unless an earlier try was heard whose answer was not."""
    config = runs.read_config(folder)
    cores, cards = _wanted(config)
    words = [*worker.arguments_of(folder, resume=note.resume), "--job", note.job]
    command = launchers.command_of(config.launch, worker.MODULE, words)
    try:
        client.submit_job(
            entrypoint=f"{shlex.join(command)} >> {shlex.quote(str(runs.log_file(folder)))} 2>&1",
            submission_id=note.job,
            entrypoint_num_cpus=cores,
            entrypoint_num_gpus=cards,
            runtime_env={"env_vars": _environment(config.launch)},
        )
    except RuntimeError as error:
        if note.job not in {job.submission_id for job in client.list_jobs()}:
            _fail(folder, UserError("Ray refused the job.", str(error).splitlines()[0][:200]))
            return
    write_note(folder, replace(note, status="PENDING", silent=False))


def _ask_again(folder: Path, note: RayNote) -> None:
    """Ask anew for a run that waited in vain. It is no NEW one: should Ray be silent now, it is waited for."""
    again = RayNote(_new_name(folder), note.address, "ASKED", resume=note.resume)
    _tell(folder, e.Launched(0, str(folder), again.job))
    write_note(folder, again)


def _hear(folder: Path, note: RayNote, client: Client) -> None:
    """Take down how the job stands, and have it stopped where that was asked for in vain."""
    try:
        info = client.get_job_info(note.job)
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        _fold_in(folder, "Ray does not know the job any more.")
        return
    status, request = str(info.status.value), runs.asked(folder)
    if info.status.is_terminal():
        if info.error_type == "JOB_SUPERVISOR_ACTOR_START_TIMEOUT":  # Ray lets nobody wait for long
            _end(folder, request) if request else _ask_again(folder, note)
        elif not locks.is_held(locks.run_lock(folder)):
            _keep_log(folder, client, note.job)
            _fold_in(folder, _told(info))
        return
    if status == "PENDING" and request:
        client.stop_job(note.job)
        _end(folder, request)
        return
    if request and _is_deaf(folder, request):
        client.stop_job(note.job)
    _keep(folder, note, replace(note, status=status, silent=False))


def _told(info: Any) -> str:  # Any: ray's JobDetails
    """How Ray says that a job has ended."""
    match str(info.status.value):
        case "STOPPED":
            return "Ray stopped the job."
        case "SUCCEEDED":
            return "The Ray job ended without a word."
    words = (info.message or "").partition(", last available logs")[0].strip().splitlines()
    return f"Ray ended the job: {words[0].rstrip('.')}." if words else "Ray ended the job."


def _keep(folder: Path, before: RayNote, now: RayNote) -> None:
    if now != before:
        write_note(folder, now)


def _fold_in(folder: Path, why: str = "") -> None:
    """End a run's time with Ray: what it did not say itself is told, and then its events say all that the note knew.

    Not yet where a process still holds the run: it may have the last word.
    """
    if locks.is_held(locks.run_lock(folder)):
        return
    if not runs.has_ended(folder):
        _tell(folder, e.Lost(why))
    remove_note(folder)


def _fail(folder: Path, error: UserError) -> None:
    _tell(folder, e.Failed(error.what, error.why, error.do))
    remove_note(folder)


def _wanted(config: TrainConfig) -> tuple[int, int]:
    """Processor cores and GPUs that a run's job asks for."""
    count = config.launch.processes
    return config.launch.cores * count, 0 if config.model.device == "cpu" else count


def _environment(launch: LaunchSettings) -> dict[str, str]:
    own = worker.environment_of(1)
    return {"PYTHONPATH": own["PYTHONPATH"], "OMP_NUM_THREADS": str(launch.cores)}


def _fits(address: str, cores: int, cards: int) -> Iterator[e.Event]:
    """A note where no machine of the cluster, as it is now, is large enough."""
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        nodes = list_nodes(address=address, filters=[("state", "=", "ALIVE")], timeout=SIZES)
    except RayStateApiException:
        return  # a cluster that does not tell its sizes still takes jobs
    sizes = [(int(node.resources_total.get("CPU", 0)), int(node.resources_total.get("GPU", 0))) for node in nodes]
    if not any(has >= cores and shows >= cards for has, shows in sizes):
        told = " or ".join(f"{has} cores and {shows} GPUs" for has, shows in sorted(set(sizes))[-3:]) or "nothing"
        yield e.Warned(
            f"The run asks Ray for a machine with {cores} cores and {cards} GPUs; the cluster's have {told} now. "
            "It waits until a larger one joins; where none will, set model.device = cpu, or fewer launch.cores."
        )


def _end(folder: Path, request: str) -> None:
    """A run that never began ends as asked."""
    step = runs.state_of(folder).step
    _tell(folder, e.Paused(step) if request == "pause" else e.Stopped(step, ""))
    remove_note(folder)


def _is_deaf(folder: Path, request: str) -> bool:
    """Whether a run was asked long ago and has told nothing since for as long."""
    try:
        last = max((folder / "ask" / request).stat().st_mtime, (folder / "events.jsonl").stat().st_mtime)
    except FileNotFoundError:
        return False  # it has taken the request
    return time.time() - last > GRACE


def _keep_log(folder: Path, client: Client, job: str) -> None:
    """Put what Ray itself has to say behind the run's own log; a machine that is gone says nothing."""
    try:
        said = str(client.get_job_logs(job)).splitlines()
    except (OSError, RuntimeError):
        said = ["It cannot be had."]
    lines = [line for line in said if "Running entrypoint" not in line]
    with runs.log_file(folder).open("a", encoding="utf-8") as log:
        log.write("\n".join([f"--- Ray's log of {job}", *lines, ""]))


def _tell(folder: Path, *events: e.Event) -> None:
    with runs.EventLog(folder) as log:
        for event in events:
            log.append(event)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m reparam_diffusion.jobs.ray_jobs WORKSPACE`."""
    (workspace,) = sys.argv[1:] if arguments is None else arguments
    serve(Path(workspace))
    return 0


if __name__ == "__main__":
    sys.exit(main())
