"""Laws of run folders and workers: what a person sees is what happened, however it ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from fake_worker import fake_train
from run_folders import ROOT, new_run, wait_for

from reparam_diffusion import events as e
from reparam_diffusion.config import TrainConfig, settle, to_toml
from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import shelf
from reparam_diffusion.jobs import fold, locks, runs, worker

Start = Callable[[Path], "subprocess.Popen[bytes]"]


@pytest.fixture
def start_fake() -> Iterator[Start]:
    """Starts workers with a pretended training; none outlives the test."""
    processes = []

    def start(folder: Path) -> subprocess.Popen[bytes]:
        environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        command = [sys.executable, str(ROOT / "tests" / "fake_worker.py"), str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def close(process: subprocess.Popen[bytes]) -> bytes:
    return process.communicate(timeout=30)[1]


# --- folders ---------------------------------------------------------------------------------------------------------
def test_two_runs_of_the_same_second_have_two_folders(workspace: Path) -> None:
    first, second = new_run(workspace), new_run(workspace)
    assert first != second
    assert first.name == "20260102-030405-sks-toy-lora"
    assert runs.list_runs(workspace) == [second, first]


def test_a_runs_config_reads_back_whole_with_absolute_pictures(workspace: Path) -> None:
    config = runs.read_config(new_run(workspace))
    assert config.data.images == str(Path("pictures").resolve())
    assert config.training.steps == 8


def test_a_folder_without_settings_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        runs.read_config(tmp_path)


# --- events ----------------------------------------------------------------------------------------------------------
def test_reading_from_an_offset_gives_each_event_once(workspace: Path) -> None:
    folder = new_run(workspace)
    with runs.EventLog(folder) as log:
        log.append(e.Warned("one"))
        first, offset = runs.read_events(folder)
        log.append(e.Warned("zwei ä"))
        second, end = runs.read_events(folder, offset)
    assert [event.message for event in (*first, *second)] == ["one", "zwei ä"]  # type: ignore[attr-defined]
    assert runs.read_events(folder, end) == ([], end)


def test_a_torn_last_line_is_left_until_it_is_whole(workspace: Path) -> None:
    folder = new_run(workspace)
    line = e.Warned("whole").to_json().encode() + b"\n"
    file = folder / "events.jsonl"
    file.write_bytes(line + line[:10])
    events, offset = runs.read_events(folder)
    assert (len(events), offset) == (1, len(line))
    file.write_bytes(line + line)
    assert len(runs.read_events(folder, offset)[0]) == 1


def test_a_killed_writers_half_line_does_not_swallow_the_next_event(workspace: Path) -> None:
    folder = new_run(workspace)
    (folder / "events.jsonl").write_bytes(b'{"event": "Step", "st')
    with runs.EventLog(folder) as log:
        log.append(e.Warned("heard"))
    assert [type(event) for event in runs.read_events(folder)[0]] == [e.Warned]


def test_foreign_lines_are_skipped(workspace: Path) -> None:
    folder = new_run(workspace)
    good = e.Warned("good").to_json().encode()
    (folder / "events.jsonl").write_bytes(b'{"event": "FromTheFuture"}\nnot json\n\xff\xfe\n[1]\n' + good + b"\n")
    assert len(runs.read_events(folder)[0]) == 1


# --- the fold --------------------------------------------------------------------------------------------------------
def step(number: int, loss: float) -> e.Step:
    return e.Step(number, loss, {"unet": 1e-4}, 0.5, 1.0)


def test_a_resumed_steps_later_line_wins() -> None:
    state = fold.Fold()
    for event in (step(1, 0.1), step(2, 0.2), step(3, 0.3), e.Sampled(3, "a", 0, "old.png"), step(2, 2.0)):
        state.feed(event)
    told = state.state(is_held=True)
    assert told.losses == [(1, 0.1), (2, 2.0)]
    assert (told.step, told.samples) == (2, [])


def test_a_run_stopped_before_it_reached_its_old_place_stands_where_it_stopped() -> None:
    state = fold.Fold()
    started = e.Started("lora", 10, 3, 3, 100, 200, "cpu", "fp32", 2)
    for event in (step(1, 1.0), step(2, 1.0), step(3, 1.0), step(4, 1.0), started):
        state.feed(event)
    assert state.state(is_held=True).step == 2
    for event in (step(3, 1.0), e.Stopped(2, "adapter.safetensors")):
        state.feed(event)
    assert state.state(is_held=False).step == 2


def test_the_loss_is_thinned_to_means_that_keep_the_last_step() -> None:
    state = fold.Fold()
    for number in range(1, 1002):
        state.feed(step(number, float(number)))
    told = state.state(is_held=True)
    assert len(told.losses) <= fold.POINTS
    assert told.losses[0] == (4, 2.5)
    assert told.losses[-1][0] == told.step == 1001


def test_time_left_comes_from_the_pace_of_the_last_steps() -> None:
    state = fold.Fold()
    state.feed(e.Started("lora", 10, 1, 3, 100, 200, "cpu", "fp32", 2))
    for number in (1, 2, 3, 4):
        state.feed(step(number, 1.0))
    told = state.state(is_held=True)
    assert (told.seconds_per_step, told.seconds_left) == (0.5, 3.0)


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (e.Finished(9, "a", 1.0), "finished"),
        (e.Stopped(3, "a"), "stopped"),
        (e.Paused(3), "paused"),
        (e.Failed("It broke."), "failed"),
        (e.Prepared("latents", 1, 2), "lost"),
    ],
)
def test_how_a_run_ended_is_its_last_event(last: e.Event, expected: str) -> None:
    state = fold.Fold()
    for event in (step(1, 1.0), last, e.Warned("late")):
        state.feed(event)
    assert state.state(is_held=False).state == expected


# --- workers ---------------------------------------------------------------------------------------------------------
def test_a_run_goes_from_created_to_finished_and_onto_the_shelf(workspace: Path) -> None:
    folder = new_run(workspace)
    assert runs.state_of(folder).state == "created"
    events = list(worker.work(folder, train=fake_train))
    assert isinstance(events[-1], e.Finished)
    assert runs.read_events(folder)[0] == events
    state = runs.state_of(folder)
    assert (state.state, state.step, state.checkpoint) == ("finished", 8, 5)
    assert shelf.find("sks toy lora", workspace) == (folder / state.gallery).resolve()
    assert shelf.list_adapters(workspace)[0].facts["activation text"] == "sks toy"


def test_the_gallery_knows_the_words_of_every_set(workspace: Path) -> None:
    folder = new_run(workspace)
    config = runs.read_config(folder)
    sets = [{"images": "more", "trigger": "zwx", "class_word": "dog"}, {"images": "plain", "trigger": ""}]
    layers = [config.model_dump(mode="json"), {"data": {"sets": sets}}]
    (folder / "config.toml").write_text(to_toml(settle(*layers)), encoding="utf-8")
    list(worker.work(folder, train=fake_train))
    assert shelf.list_adapters(workspace)[0].facts["activation text"] == "sks toy, zwx dog"


def test_a_killed_worker_is_lost_not_running_and_can_be_resumed(workspace: Path, start_fake: Start) -> None:
    folder = new_run(workspace, steps=2000)
    process = start_fake(folder)
    follower = runs.Follower(folder)
    wait_for(lambda: follower.look().step >= 7)
    assert follower.look().state == "running"
    process.send_signal(signal.SIGKILL)
    wait_for(lambda: follower.look().state == "lost")  # also while it is a zombie: nobody has waited for it yet
    close(process)
    reached = follower.look().step
    runs.ask(folder, "stop")  # comes too late, and must not end the resumed run
    again = worker.work(folder, resume=True, train=fake_train)
    steps = [event.step for event in islice((x for x in again if isinstance(x, e.Step)), 12)]
    again.close()  # type: ignore[attr-defined]  # it is a generator
    assert steps[0] == reached // 5 * 5 + 1
    assert follower.look().step == steps[-1]


def test_a_second_worker_on_the_same_run_is_refused_and_leaves_no_trace(workspace: Path, start_fake: Start) -> None:
    folder = new_run(workspace, steps=2000)
    process = start_fake(folder)
    wait_for(lambda: runs.state_of(folder).step >= 1)
    with pytest.raises(UserError, match="being worked on already"):
        next(worker.work(folder, train=fake_train))
    with pytest.raises(UserError, match="being worked on already"):
        worker.launch(folder)
    second = start_fake(folder)
    assert b"being worked on already" in close(second)
    assert second.returncode == 2
    runs.ask(folder, "stop")
    close(process)
    assert process.returncode == 0
    assert runs.state_of(folder).state == "stopped"


def test_sigterm_is_a_stop_that_saves_and_shelves(workspace: Path, start_fake: Start) -> None:
    folder = new_run(workspace, steps=2000)
    process = start_fake(folder)
    wait_for(lambda: runs.state_of(folder).step >= 3)
    process.terminate()
    close(process)
    assert process.returncode == 0
    state = runs.state_of(folder)
    assert state.state == "stopped"
    assert (folder / state.gallery).read_bytes() == b"half"


def test_pause_ends_without_an_adapter_and_the_request_is_gone(workspace: Path) -> None:
    folder = new_run(workspace, steps=2000)
    seen = []
    for event in worker.work(folder, train=fake_train):
        seen.append(event)
        if isinstance(event, e.Step) and event.step == 2:
            runs.ask(folder, "pause")
    assert seen[-1] == e.Paused(2, time=seen[-1].time)
    assert runs.asked(folder) == ""
    assert runs.state_of(folder).state == "paused"
    assert shelf.list_adapters(workspace) == []


def test_a_run_waits_for_the_device_says_so_and_can_be_stopped_there(workspace: Path) -> None:
    folder = new_run(workspace)
    with locks.try_hold(locks.device_lock("cpu")) as is_ours:
        assert is_ours
        events = worker.work(folder, train=fake_train)
        assert isinstance(next(events), e.Prepared)
        assert runs.state_of(folder).state == "queued"
        runs.ask(folder, "stop")
        assert [type(event) for event in events] == [e.Stopped]
    assert runs.state_of(folder).state == "stopped"


def test_one_device_lock_for_each_device_and_user() -> None:
    assert locks.device_lock("cuda:0") != locks.device_lock("cuda:1")
    assert locks.device_lock("cuda:0") == locks.device_lock("cuda:0")


def failing(error: Exception) -> worker.Train:
    def train(config: TrainConfig, *, stop: object, folder: Path, resume: bool = False) -> Iterator[e.Event]:
        yield e.Launched(os.getpid(), str(folder))
        raise error

    return train


def test_a_persons_mistake_is_told_as_it_was_raised(workspace: Path) -> None:
    folder = new_run(workspace)
    error = UserError("No pictures.", "The folder is empty.", "Add some.")
    last = list(worker.work(folder, train=failing(error)))[-1]
    assert isinstance(last, e.Failed)
    assert (last.what, last.why, last.do) == ("No pictures.", "The folder is empty.", "Add some.")
    assert runs.state_of(folder).message == "No pictures. The folder is empty. Add some."


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")],
)
def test_out_of_memory_names_the_settings_that_help(workspace: Path, error: Exception) -> None:
    last = list(worker.work(new_run(workspace), train=failing(error)))[-1]
    assert isinstance(last, e.Failed)
    assert "gradient checkpointing" in last.do


def test_our_own_mistake_says_so_and_leaves_the_report(workspace: Path) -> None:
    folder = new_run(workspace)
    last = list(worker.work(folder, train=failing(KeyError("colour"))))[-1]
    assert isinstance(last, e.Failed)
    assert "mistake of ours" in last.what
    assert str(runs.log_file(folder)) in last.do
    assert "KeyError: 'colour'" in runs.log_file(folder).read_text()


def test_a_launched_worker_outlives_its_handler_and_leaves_no_zombie(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "MODULE", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    folder = new_run(workspace, steps=5)
    pid = worker.launch(folder)
    assert runs.state_of(folder).state == "running"  # from the first moment, before it holds any lock
    assert os.getsid(pid) == pid
    wait_for(lambda: runs.state_of(folder).state == "finished")
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_a_launched_worker_goes_on_when_its_parent_is_killed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
    folder = new_run(workspace, steps=100)
    script = (
        "import os, signal; from pathlib import Path; from reparam_diffusion.jobs import worker\n"
        f"worker.MODULE = 'fake_worker'; worker.launch(Path({str(folder)!r})); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    wait_for(lambda: runs.state_of(folder).state == "finished")


def test_a_worker_that_dies_before_its_first_word_is_lost(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MODULE", "no_such_module")
    folder = new_run(workspace)
    worker.launch(folder)
    wait_for(lambda: runs.state_of(folder).state == "lost")
    assert "no_such_module" in runs.log_file(folder).read_text()


def test_a_process_number_is_looked_up_on_its_own_machine_only(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This test's own process stands for the one that has the same number here."""
    here, elsewhere = new_run(workspace), new_run(workspace)
    for folder, host in ((here, socket.gethostname()), (elsewhere, "elsewhere")):
        with runs.EventLog(folder) as log:
            log.append(e.Launched(os.getpid(), str(folder), host=host))
        assert runs.has_worker(folder), "it may not have got as far as its lock"
    monkeypatch.setattr(runs, "PATIENCE", 0.0)
    assert runs.has_worker(here) and runs.state_of(here).state == "running"
    assert not runs.has_worker(elsewhere) and runs.state_of(elsewhere).state == "lost"
    with locks.hold_run(elsewhere):
        assert runs.has_worker(elsewhere) and runs.state_of(elsewhere).state == "running"


def test_what_says_that_a_run_began_names_the_machine(workspace: Path) -> None:
    folder = new_run(workspace, steps=1)
    list(worker.work(folder, train=fake_train))
    assert f'"host": "{socket.gethostname()}"' in (folder / "events.jsonl").read_text().splitlines()[0]


def test_a_line_without_a_machine_is_this_machines(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PATIENCE", 0.0)
    folder = new_run(workspace)
    line = {"event": "Launched", "time": time.time(), "pid": os.getpid(), "folder": str(folder), "job": ""}
    (folder / "events.jsonl").write_text(json.dumps(line) + "\n")
    assert runs.has_worker(folder) and runs.state_of(folder).state == "running"


def test_nobody_can_ask_for_what_a_run_does_not_know(workspace: Path) -> None:
    with pytest.raises(UserError, match="cannot be asked"):
        runs.ask(new_run(workspace), "explode")  # type: ignore[arg-type]
