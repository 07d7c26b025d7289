"""A run that waits for a device names what it waits for: on the page, on the command line, in its events."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fake_worker import fake_train
from run_folders import new_run

from reparam_diffusion import events as e
from reparam_diffusion.files import cache_file
from reparam_diffusion.jobs import console, locks, queue, runs, worker
from ui.run_fragments import progress_of


def held(workspace: str, task: str = "run 20260101-a"):
    return locks.try_hold(locks.device_lock("cpu"), holder=locks.Holder(task, workspace))


def test_the_lock_of_a_device_lies_in_the_cache_folder_of_the_user(workspace: Path) -> None:
    assert locks.device_lock("cpu").parent == cache_file("locks")


def test_without_a_cache_folder_the_lock_lies_in_the_temporary_one(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with locks.try_hold(locks.device_lock("cpu")) as is_ours:
        assert is_ours
    assert locks.device_lock("cpu").parent == tmp_path / "temporary"


def test_the_holder_is_named_while_it_holds_and_not_afterwards(workspace: Path) -> None:
    lock = locks.device_lock("cpu")
    with held("/elsewhere/ws"):
        words = locks.describe_holder(lock, workspace)
        assert "20260101-a" in words and "/elsewhere/ws" in words and str(os.getpid()) in words
        assert "/elsewhere" not in locks.describe_holder(lock, Path("/elsewhere/ws"))
    assert locks.describe_holder(lock, workspace) == "" and locks.read_holder(lock) is None


@pytest.mark.parametrize(
    "note",
    [
        "",
        "[]",
        '{"task": "x"}',
        json.dumps({"task": "dead", "workspace": "/w", "pid": 2**22 - 3, "since": 0.0}),
        json.dumps({"task": "later process of this number", "workspace": "/w", "pid": "own", "since": 1.0}),
    ],
)
def test_a_stale_or_damaged_note_names_nobody(workspace: Path, note: str) -> None:
    lock = locks.device_lock("cpu")
    with locks.try_hold(lock):
        lock.with_suffix(".json").write_text(note.replace('"own"', str(os.getpid())))
        assert locks.describe_holder(lock, workspace) == locks.UNKNOWN_HOLDER


def test_a_waiting_run_says_whom_it_waits_for_everywhere(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = new_run(workspace)
    with held("/elsewhere/ws"):
        events = worker.work(folder, train=fake_train)
        first = next(events)
        assert isinstance(first, e.Prepared) and "20260101-a" in first.waiting_for
        state = runs.state_of(folder)
        assert state.state == "queued" and "/elsewhere/ws" in (state.waiting_for or "")
        assert "20260101-a" in progress_of(folder.name, state, "")
        console.show([first], folder)
        assert "20260101-a" in capsys.readouterr().out.replace("\n", ""), "also where there is no terminal"
        runs.ask(folder, "stop")
        assert [type(event) for event in events] == [e.Stopped]
    assert runs.state_of(folder).waiting_for is None


def test_a_run_in_the_queue_names_the_holder(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "ensure_served", lambda workspace: None)
    folder = new_run(workspace)
    with held("/elsewhere/ws", "image generation"):
        assert not queue.submit(folder)
        state = runs.state_of(folder)
        assert state.place == 1 and "image generation" in (state.waiting_for or "")
        assert "image generation" in progress_of(folder.name, state, "")


def test_the_wait_follows_a_change_of_the_holder(workspace: Path) -> None:
    folder = new_run(workspace)
    with held(str(workspace), "run first"):
        events = worker.work(folder, train=fake_train)
        assert "run first" in next(events).waiting_for  # type: ignore[union-attr]
    second = held(str(workspace), "run second")
    with second:
        assert "run second" in next(events).waiting_for  # type: ignore[union-attr]
        runs.ask(folder, "stop")
        list(events)
