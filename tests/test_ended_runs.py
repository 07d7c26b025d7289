"""Commands that have nothing to do leave the run as it is, and say so: resume, stop, pause and sample, everywhere."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from fake_worker import fake_train
from run_folders import ROOT, new_run, wait_for
from tiny_pipelines import save_pictures, save_tiny

from reparam_diffusion import __main__ as command_line
from reparam_diffusion import events as e
from reparam_diffusion.config import parse_set, settle
from reparam_diffusion.errors import NothingToDo, UserError
from reparam_diffusion.jobs import locks, queue, runs, worker
from reparam_diffusion.training.loop import train
from ui import run_view
from ui.runs_api import ASKS


@pytest.fixture
def finished(workspace: Path) -> Path:
    folder = new_run(workspace)
    list(worker.work(folder, train=fake_train))
    assert runs.state_of(folder).state == "finished"
    return folder


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["reparam_diffusion", *arguments])
    try:
        command_line.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize("more", [[], ["--processes", "2"], ["--json"]])
def test_resume_of_a_finished_run_says_so_and_changes_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    code, said = command(capsys, monkeypatch, "resume", str(finished), *more)
    assert code == 0 and "Nothing to do" in said and "finished" in said
    assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()} == before
    assert runs.state_of(finished).state == "finished" and not runs.state_of(finished).can_resume


@pytest.mark.parametrize(
    "resume",
    [
        lambda folder: queue.submit(folder, resume=True),
        queue.submit,
        lambda folder: worker.launch(folder, resume=True),
        lambda folder: list(worker.work(folder, resume=True, train=fake_train)),
        run_view.resume_run,
        ASKS["resume"],
    ],
)
def test_every_way_to_resume_a_finished_run_is_refused(finished: Path, resume) -> None:
    size = runs.size_of_events(finished)
    with pytest.raises(NothingToDo, match="finished"):
        resume(finished)
    assert runs.size_of_events(finished) == size and runs.state_of(finished).state == "finished"
    assert queue.waiting(runs.workspace_of(finished)) == []


@pytest.mark.parametrize("request_", ["stop", "pause", "sample"])
def test_what_does_not_run_cannot_be_asked(finished: Path, workspace: Path, request_: str) -> None:
    for folder in (finished, new_run(workspace)):
        with pytest.raises(UserError, match="not running"):
            ASKS[request_](folder)
        assert not (folder / "ask" / request_).exists()


def test_a_run_in_the_queue_cannot_be_resumed_again_and_stop_takes_it_out(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "ensure_served", lambda workspace: None)
    folder = new_run(workspace)
    with locks.try_hold(locks.device_lock("cpu")):
        queue.submit(folder)
        code, said = command(capsys, monkeypatch, "resume", str(folder))
        assert code == 2 and "in the queue" in said
        with pytest.raises(UserError, match="in the queue"):
            queue.submit(folder, resume=True)
        with pytest.raises(UserError, match="not running"):
            ASKS["sample"](folder)
        code, said = command(capsys, monkeypatch, "stop", str(folder))
        assert code == 0 and "out of the queue" in said
    assert queue.waiting(workspace) == [] and runs.state_of(folder).state == "created"


def test_a_run_that_was_finished_elsewhere_leaves_the_queue_as_it_is(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "ensure_served", lambda workspace: None)
    folder = new_run(workspace)
    with locks.try_hold(locks.device_lock("cpu")):
        queue.submit(folder)
    list(worker.work(folder, train=fake_train))
    queue.serve(workspace)
    assert queue.waiting(workspace) == [] and runs.state_of(folder).state == "finished"


def test_of_two_resumes_at_once_one_runs(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MODULE", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    folder = new_run(workspace, steps=100)
    refused: list[UserError] = []

    def resume() -> None:
        try:
            worker.launch(folder, resume=True)
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=resume) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3
    wait_for(lambda: runs.state_of(folder).state == "finished")
    launched = [event for event in runs.read_events(folder)[0] if isinstance(event, e.Launched)]
    assert len({event.pid for event in launched}) == 1


def test_a_finished_run_that_version_01_made_failed_is_finished_again(finished: Path) -> None:
    with runs.EventLog(finished) as log:
        log.append(e.Launched(1, str(finished)))
        log.append(e.Failed("This run is finished.", "It has done all 8 steps.", "Start a new one."))
    assert runs.state_of(finished).state == "finished"
    with pytest.raises(NothingToDo):
        queue.submit(finished, resume=True)


# --- the loop itself -------------------------------------------------------------------------------------------------
@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, object]:
    model, pictures = save_tiny(tmp_path / "model", "sd1"), save_pictures(tmp_path / "pictures")
    settings = [
        f"model.path='{model}'", "model.precision=fp32", "model.device=cpu", f"data.images='{pictures}'", "data.trigger=sks",
        "training.steps=4", "output.checkpoint_every=2", "output.sample_every=1000", "output.validate_every=1000",
    ]  # fmt: skip
    config = settle(parse_set(settings))
    list(train(config, folder=tmp_path / "run"))
    return tmp_path / "run", config


def test_resume_in_python_of_a_finished_run_says_so_and_writes_nothing(trained) -> None:
    folder, config = trained
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    events = list(train(config, folder=folder, resume=True))
    assert [type(event) for event in events] == [e.Launched, e.Warned, e.Finished]
    assert "nothing to do" in events[1].message
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before


def test_a_run_cut_between_its_last_checkpoint_and_its_adapter_is_finished_by_resume(trained) -> None:
    folder, config = trained
    whole = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").unlink()
    events = list(train(config, folder=folder, resume=True))
    assert isinstance(events[-1], e.Finished) and not any(isinstance(event, e.Step) for event in events)
    assert len((folder / "adapter.safetensors").read_bytes()) == len(whole)


def test_a_damaged_newest_checkpoint_is_told_before_an_older_one_is_taken(trained) -> None:
    folder, config = trained
    (folder / "adapter.safetensors").unlink()
    newest = folder / "checkpoints" / "000004" / "state.pt"
    for damage in (lambda: newest.write_bytes(newest.read_bytes()[:1000]), newest.unlink):
        damage()
        told = []
        for event in train(config, folder=folder, resume=True):
            told += [event.message] if isinstance(event, e.Warned) else []
            if isinstance(event, e.Step):
                assert event.step == 3
                break
        assert any("step 4" in message and "damaged" in message and "step 2" in message for message in told)
    (folder / "checkpoints" / "000002" / "state.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match="damaged") as error:
        list(train(config, folder=folder, resume=True))
    assert "2, 4" in str(error.value)
