"""A Ray head that is silent is still known: its runs stay as they were, it is asked again, and nobody waits for it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fake_head import fake_head, silent_head
from run_folders import new_run, wait_for

from reparam_diffusion import events as e
from reparam_diffusion.jobs import launchers, locks, overview, queue, ray_heads, ray_jobs, runs
from reparam_diffusion.jobs.ray_note import RayNote, read_note, write_note

has_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits and pauses of tenths of a second, and no tender but the test's own."""
    monkeypatch.setattr(ray_jobs, "LOOK_AGAIN", 0.05)
    monkeypatch.setattr(ray_heads, "ANSWER", 0.3)
    monkeypatch.setattr(ray_heads, "AGAIN", 0.1)
    monkeypatch.setattr(ray_heads, "RARELY", 0.4)
    monkeypatch.setattr(ray_jobs, "ensure_tended", lambda workspace: None)


@pytest.fixture
def tend(workspace: Path) -> Iterator[Callable[[], None]]:
    """Starts a tender as a thread, which ends with the test."""
    threads = []

    def tend() -> None:
        threads.append(threading.Thread(target=ray_jobs.serve, args=[workspace], daemon=True))
        threads[-1].start()

    def has_ended() -> bool:
        for file in workspace.glob("runs/*/ray.json"):  # a look that is under way may write one more
            file.unlink()
        return not any(thread.is_alive() for thread in threads)

    yield tend
    wait_for(has_ended)


def run_on(address: str, workspace: Path, *events: e.Event, status: str = "RUNNING") -> Path:
    """A run that Ray had at its last word."""
    folder = new_run(workspace)
    with runs.EventLog(folder) as log:
        for event in (e.Launched(0, str(folder), folder.name), *events):
            log.append(event)
    write_note(folder, RayNote(folder.name, address, status))
    return folder


def ask_long_ago(folder: Path, request: runs.Request) -> None:
    """A request that has been there for longer than a run may stay deaf to it."""
    queue.stop(folder, request)
    for file in (folder / "ask" / request, folder / "events.jsonl"):
        os.utime(file, (0, 0))


def test_a_silent_head_is_asked_more_and_more_rarely_and_as_often_as_ever_once_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_heads, "AGAIN", 1.0)
    monkeypatch.setattr(ray_heads, "RARELY", 60.0)
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    head, asked = ray_heads.Head("http://head:8265"), []
    for second in range(600):
        clock = itertools.count(second)
        if head.is_due:
            clock = itertools.count(second)
            head.was_silent()
            asked.append(second)
    pauses = [after - before for before, after in itertools.pairwise(asked)]
    assert asked[:2] == [0, 1] and pauses == sorted(pauses) and pauses[-3:] == [60, 60, 60]
    assert len(asked) < 20
    head.has_answered()
    assert head.is_due


@has_ray
def test_runs_of_a_silent_head_stay_as_they_were_and_are_watched_again_when_it_answers(
    workspace: Path, tend: Callable[[], None]
) -> None:
    steps = e.Started("lora", 8, 1, 3, 100, 200, "cpu", "fp32", 2), e.Step(1, 0.5, {"unet": 1e-4}, 0.01, 1.0)
    jobs: dict[str, dict[str, object]] = {}
    with silent_head() as address, fake_head(jobs) as other_address:
        training, waiting = run_on(address, workspace, *steps), run_on(address, workspace, status="PENDING")
        beside = run_on(other_address, workspace, status="PENDING")
        jobs[beside.name] = {"status": "RUNNING"}
        tend()
        wait_for(lambda: all((read_note(run) or RayNote("", "")).silent for run in (training, waiting)))
        asked_at = time.monotonic()
        wait_for(lambda: (read_note(beside) or RayNote("", "")).status == "RUNNING", seconds=5)
        time.sleep(max(0.0, asked_at + 1.0 - time.monotonic()))  # several questions in vain
        states = [runs.state_of(run) for run in (training, waiting)]
        assert [state.state for state in states] == ["running", "queued"] and states[0].step == 1
        for state in states:
            assert state.warnings[0].startswith(
                f"Ray at {address} does not answer, so this is how the run was last seen"
            )
        assert runs.state_of(beside).warnings == []
        jobs[beside.name] = {"status": "STOPPED"}
        wait_for(lambda: runs.state_of(beside).state == "lost", seconds=5)
    jobs |= {training.name: {"status": "RUNNING"}, waiting.name: {"status": "RUNNING"}}
    with fake_head(jobs, port=urlsplit(address).port or 0):
        wait_for(lambda: not any(runs.state_of(run).warnings for run in (training, waiting)), seconds=10)
        assert [runs.state_of(run).state for run in (training, waiting)] == ["running", "running"]
        jobs[training.name] = {"status": "FAILED", "message": "The machine went away."}
        wait_for(lambda: runs.state_of(training).state == "lost", seconds=5)
        assert runs.state_of(training).message.startswith(
            "Ray ended the job: The machine went away. It had no checkpoint"
        )
        assert "said by Ray" in runs.log_file(training).read_text()


@has_ray
def test_trouble_about_one_job_holds_up_no_other_of_the_same_head(workspace: Path, tend: Callable[[], None]) -> None:
    jobs: dict[str, dict[str, object]] = {}
    with fake_head(jobs) as address:
        troubled, fine = run_on(address, workspace), run_on(address, workspace, status="PENDING")
        assert troubled < fine, "it is asked about first"
        jobs |= {troubled.name: {"message": "no status"}, fine.name: {"status": "RUNNING"}}
        tend()
        wait_for(lambda: (read_note(fine) or RayNote("", "")).status == "RUNNING", seconds=10)
        assert runs.state_of(troubled).state == "running" and "does not answer" in runs.state_of(troubled).warnings[0]


@has_ray
def test_a_new_run_for_a_silent_head_fails_in_a_sentence_and_leaves_no_note(
    workspace: Path, tend: Callable[[], None]
) -> None:
    with silent_head() as address:
        folder = new_run(workspace)
        write_note(folder, RayNote("job", address))
        tend()
        wait_for(lambda: runs.state_of(folder).state == "failed", seconds=10)
        assert runs.state_of(folder).message.startswith(f"Ray at {address} does not answer. Start the cluster")
        wait_for(lambda: not (folder / "ray.json").exists())


@has_ray
def test_a_job_that_ray_took_without_an_answer_is_neither_lost_nor_asked_for_twice(
    workspace: Path, tend: Callable[[], None]
) -> None:
    jobs: dict[str, dict[str, object]] = {}
    with fake_head(jobs) as address:
        folder = new_run(workspace)
        write_note(folder, RayNote("job", address))
        tend()
        wait_for(lambda: read_note(folder) == RayNote("job", address, "PENDING"), seconds=10)
    assert list(jobs) == ["job"]
    assert [type(event) for event in runs.read_events(folder)[0]] == [e.Launched]


@has_ray
@pytest.mark.parametrize(("request_", "ends"), [(None, "queued"), ("stop", "stopped")])
def test_a_run_that_waited_in_vain_is_asked_for_again_unless_it_was_stopped(
    request_: runs.Request | None, ends: str, workspace: Path, tend: Callable[[], None]
) -> None:
    jobs: dict[str, dict[str, object]] = {}
    with fake_head(jobs) as address:
        folder = run_on(address, workspace, status="PENDING")
        if request_:
            queue.stop(folder, request_)
        jobs[folder.name] = {"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"}
        tend()
        wait_for(lambda: len(jobs) == 2 or not (folder / "ray.json").exists(), seconds=10)
        assert runs.state_of(folder).state == ends and len(jobs) == (1 if request_ else 2)


def test_a_run_that_waited_in_vain_survives_a_head_that_falls_silent_then(
    workspace: Path, tend: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_heads, "connect", silent_connection)
    folder = run_on("http://head:8265", workspace, status="PENDING")
    ray_jobs._ask_again(folder, RayNote(folder.name, "http://head:8265", "PENDING"))
    tend()
    wait_for(lambda: (read_note(folder) or RayNote("", "")).silent, seconds=10)
    assert runs.state_of(folder).state == "queued"


def silent_connection(address: str) -> ray_heads.Client:
    raise TimeoutError


@pytest.mark.parametrize(
    ("last", "ends"),
    [(e.Finished(8, "adapter.safetensors", 1.0), "finished"), (e.Paused(3), "paused"), (e.Failed("No."), "failed")],
)
def test_a_run_that_told_its_own_end_is_not_asked_about_for_ever(
    last: e.Event, ends: str, workspace: Path, tend: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_heads, "connect", silent_connection)
    folder = run_on("http://head:8265", workspace, last)
    before = (folder / "events.jsonl").read_bytes()
    with locks.hold_run(folder):  # its process may say more
        tend()
        time.sleep(0.5)
        assert read_note(folder) is not None
    wait_for(lambda: not (folder / "ray.json").exists(), seconds=10)
    assert runs.state_of(folder).state == ends and not runs.has_worker(folder)
    assert (folder / "events.jsonl").read_bytes() == before


def test_a_run_that_nobody_can_tell_of_is_let_go_when_it_was_asked_to_stop_in_vain(
    workspace: Path, tend: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_heads, "connect", silent_connection)
    asked, at_work, left = (run_on("http://head:8265", workspace) for _ in range(3))
    for folder in (asked, at_work):
        ask_long_ago(folder, "stop")
    with locks.hold_run(at_work):
        tend()
        wait_for(lambda: runs.state_of(asked).state == "lost", seconds=10)
        wait_for(lambda: (read_note(left) or RayNote("", "")).silent)
        assert runs.state_of(at_work).state == runs.state_of(left).state == "running"
    said = "Ray at http://head:8265 does not answer, and the run showed no life after it was asked to stop. It had no"
    assert runs.state_of(asked).message.startswith(said)
    assert runs.state_of(asked).can_resume and not runs.has_worker(asked)


def test_looking_and_asking_never_talk_to_a_head(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page does is done at once, since only the tender has a connection."""

    def refuse(*words: object, **more: object) -> None:
        raise AssertionError("the page asked Ray")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(ray_heads, "connect", refuse)
    folder = run_on("http://head:8265", workspace)
    write_note(folder, RayNote("job", "http://head:8265", "RUNNING", silent=True))
    view = overview.Overview(workspace)
    assert [state.state for _, state in view.look()] == ["running"]
    queue.stop(folder)
    queue.ensure_served(workspace)
    assert runs.asked(folder) == "stop" and "does not answer" in view.state_of(folder).warnings[0]


def test_whoever_follows_a_run_is_told_once_that_ray_is_silent(workspace: Path) -> None:
    folder = run_on("http://head:8265", workspace)
    followed = launchers.follow(folder, offset=0)
    assert isinstance(next(followed), e.Launched)
    write_note(folder, RayNote("job", "http://head:8265", "RUNNING", silent=True))
    warned = next(followed)
    assert isinstance(warned, e.Warned) and "does not answer" in warned.message
    threading.Timer(0.6, lambda: write_note(folder, RayNote("job", "http://head:8265", "GONE"))).start()
    assert [type(event) for event in followed] == [e.Failed], "it was told nothing more until the run was lost"


def test_a_run_that_began_while_ray_was_silent_is_not_shown_as_waiting(workspace: Path) -> None:
    folder = run_on("http://head:8265", workspace, e.Prepared("latents", 1, 2), status="PENDING")
    assert runs.state_of(folder).state == "running"
    write_note(folder, RayNote("job", "http://head:8265"))
    assert runs.state_of(folder).state == "queued", "it was handed over anew"


def test_notes_of_an_older_version_are_read(workspace: Path) -> None:
    folder = new_run(workspace)
    row = {"job": "job", "address": "http://head:8265", "status": "RUNNING", "message": "", "resume": True}
    (folder / "ray.json").write_text(json.dumps(row))
    assert read_note(folder) == RayNote("job", "http://head:8265", "RUNNING", resume=True)
    (folder / "ray.json").write_text(json.dumps({**row, "status": "SILENT"}))
    assert read_note(folder) is None and not runs.has_worker(folder)
