"""Runs on a real Ray cluster of this machine: two at once, one that waits, stops, ends without a word; and mistakes."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from run_folders import NOW, ROOT, wait_for

from reparam_diffusion import __main__ as cli
from reparam_diffusion import events as e
from reparam_diffusion.config import settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import datasets, locks, queue, ray_jobs, runs, worker
from reparam_diffusion.jobs.ray_note import RayNote, read_note, remove_note, write_note
from ui import starting

has_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
Start = Callable[..., Path]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A Ray head with three cores and no GPU; the address of its dashboard. One at a time on a machine: Ray wants it so.

    Its folder has a short name, since Ray's sockets lie deep in it and a socket's path has at most 107 letters.
    """
    lock = FileLock(Path(tempfile.gettempdir()) / "reparam-diffusion-test-ray.lock", timeout=300)
    with lock, tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as place:
        yield from served_head(Path(place))


def served_head(place: Path) -> Iterator[str]:
    port, dashboard = free_port(), free_port()
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "3", "--num-gpus", "0",
        "--port", str(port), "--dashboard-port", str(dashboard), "--dashboard-host", "127.0.0.1", "--disable-usage-stats",
        "--temp-dir", str(place), "--object-store-memory", "80000000", "--min-worker-port", "0", "--max-worker-port", "0",
    ]  # fmt: skip
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    with (place / "said.txt").open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(lambda: answers(f"{address}/api/version"), seconds=90)
        yield address
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=30)
        for left in psutil.wait_procs(started, timeout=10)[1]:
            left.kill()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture
def start(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Hands runs to Ray whose training is a pretence; their tender is a thread."""
    monkeypatch.setattr(worker, "MODULE", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setattr(ray_jobs, "LOOK_AGAIN", 0.2)
    monkeypatch.setattr(ray_jobs, "ensure_tended", lambda workspace: None)

    def start(address: str, *, steps: int = 8, **launch: object) -> Path:
        layers: dict[str, object] = {
            "data": {"trigger": "sks", "class_word": "toy", "images": "pictures"},
            "training": {"steps": steps},
            "model": {"device": launch.pop("device", "cpu")},
            "launch": {"launcher": "ray", "address": address, **launch},
        }
        folder = runs.create_run(settle(layers), workspace, now=NOW)
        assert not queue.submit(folder)
        return folder

    return start


@pytest.fixture
def tended(workspace: Path) -> Callable[[], threading.Thread]:
    def tend() -> threading.Thread:
        thread = threading.Thread(target=ray_jobs.serve, args=[workspace], daemon=True)
        thread.start()
        return thread

    return tend


def state(folder: Path) -> str:
    return runs.state_of(folder).state


@has_ray
def test_two_runs_at_once_a_third_waits_for_ray_and_each_can_be_stopped(
    head: str, start: Start, tended: Callable[[], threading.Thread], workspace: Path
) -> None:
    first, second = start(head, steps=100_000), start(head, steps=100_000)
    third, fourth = start(head, steps=20, cores=3), start(head, device="cuda")
    assert [state(run) for run in (first, second, third, fourth)] == ["queued"] * 4
    tender = tended()
    wait_for(lambda: state(first) == state(second) == "running" and runs.state_of(second).step > 5, seconds=60)
    assert state(third) == state(fourth) == "queued"
    assert (
        "for a machine with 1 cores and 1 GPUs; the cluster's have 3 cores and 0 GPUs"
        in runs.state_of(fourth).warnings[0]
    )
    note = read_note(first)
    assert note is not None and runs.state_of(first).where == f"Ray job {note.job}"
    assert not locks.is_held(locks.device_lock("cpu")), "Ray gives the devices out"
    with pytest.raises(UserError, match="already"):
        queue.submit(first)
    queue.stop(fourth)  # it waits: Ray is told, and it never begins
    wait_for(lambda: state(fourth) == "stopped")
    queue.stop(first, "pause")
    wait_for(lambda: state(first) == "paused")
    queue.stop(second)
    wait_for(lambda: state(second) == "stopped")
    assert (second / runs.state_of(second).gallery).read_bytes() == b"half"
    wait_for(lambda: state(third) == "finished", seconds=60)  # it asked for all three cores, which are free now
    tender.join(timeout=20)
    assert not tender.is_alive() and "Ray's log of" in runs.log_file(first).read_text()
    assert list(workspace.glob("runs/*/ray.json")) == [], "the events of each tell all that its note knew"


@has_ray
def test_a_deaf_run_is_ended_by_ray_and_a_killed_one_is_lost_and_resumes(
    head: str, start: Start, tended: Callable[[], threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "GRACE", 1.0)
    deaf, killed = start(head, steps=100_000), start(head, steps=100_000)
    tended()
    wait_for(lambda: min(runs.state_of(deaf).step, runs.state_of(killed).step) > 10, seconds=60)
    os.kill(runs.state_of(deaf).pid, signal.SIGSTOP)
    queue.stop(deaf)
    os.kill(runs.state_of(killed).pid, signal.SIGKILL)
    wait_for(lambda: state(killed) == "lost")
    assert "Ray ended the job: Job entrypoint command failed with exit code" in runs.state_of(killed).message
    wait_for(lambda: state(deaf) == "lost", seconds=40)
    assert runs.state_of(deaf).message.startswith("Ray stopped the job. Its last checkpoint is at step ")
    before = runs.state_of(killed).checkpoint
    assert before is not None
    monkeypatch.setattr(ray_jobs, "GRACE", 60.0)
    queue.submit(killed, resume=True)
    tended()

    def starts() -> list[int]:
        return [event.first_step for event in runs.read_events(killed)[0] if isinstance(event, e.Started)]

    wait_for(lambda: len(starts()) == 2, seconds=40)
    assert starts()[1] == before + 1
    queue.stop(killed)
    wait_for(lambda: state(killed) == "stopped")


@has_ray
def test_a_run_begun_in_the_terminal_trains_on_ray_and_is_followed(head: str, workspace: Path) -> None:
    """The real tender and the real worker, which fails for want of a model; no thread, no pretence."""
    folder = runs.create_run(
        settle({"model": {"path": "/nowhere", "device": "cpu"}, "launch": {"launcher": "ray", "address": head}}),
        workspace,
        now=NOW,
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "reparam_diffusion", "resume", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Ray job " in done.stdout and "Failed: " in done.stdout
    assert state(folder) == "failed"
    wait_for(lambda: not locks.is_held(workspace / ".ray.lock"))


@has_ray
def test_a_cluster_that_does_not_answer_is_told_in_a_sentence(
    start: Start, tended: Callable[[], threading.Thread]
) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    folder = start(address)
    tended().join(timeout=30)
    assert state(folder) == "failed"
    assert runs.state_of(folder).message.startswith(f"Ray at {address} does not answer. Start the cluster")


def test_what_ray_cannot_be_asked_is_told_at_the_setting(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    with pytest.raises(UserError, match="requirements-extras") as missing:
        start("http://127.0.0.1:8265")
    assert missing.value.place == "launch.launcher"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="no address") as address:
        start("head:8265")
    assert address.value.place == "launch.address"
    with pytest.raises(UserError, match="Ray gives out the GPUs") as device:
        start("http://head:8265", device="cuda:1")
    assert device.value.place == "model.device"


def test_a_run_that_ray_cannot_have_is_not_made(workspace: Path) -> None:
    launch = {"launch": {"launcher": "ray", "address": "head"}}
    for make in (
        lambda: starting.start_config(
            workspace, datasets.example_sets()[0], settle({"data": {"trigger": "sks", "class_word": "toy"}}, launch)
        ),
        lambda: cli.train(
            images=str(ROOT / "assets/examples/teddy"),
            settings=["launch.launcher=ray", "launch.address=head"],
            workspace=workspace,
        ),
    ):
        with pytest.raises(UserError, match=r"no address|not installed"):
            make()
    assert runs.list_runs(workspace) == []


def test_a_job_whose_place_another_took_does_nothing(
    workspace: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    folder = start("http://127.0.0.1:8265")
    write_note(folder, RayNote("another", "http://head:8265", "PENDING"))
    assert worker.main([str(folder), "--job", "mine"]) == 0
    remove_note(folder)  # it was stopped while it waited
    assert worker.main([str(folder), "--job", "mine"]) == 0
    assert runs.read_events(folder)[0] == []
