"""Two processes train what one does with the batch of both, bit-equal to each other; whoever is killed, it is told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from run_folders import NOW, new_run, wait_for
from safetensors.torch import load_file
from tiny_pipelines import save_pictures, save_tiny

from reparam_diffusion import events as e
from reparam_diffusion.config import parse_set, settle, to_toml
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Step
from reparam_diffusion.jobs import causes, launchers, locks, queue, runs, worker
from reparam_diffusion.training.loop import train
from reparam_diffusion.training.processes import is_peer_lost
from ui import run_fragments

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import json, os, sys, torch
from pathlib import Path
from reparam_diffusion.config import read_settings, settle
from reparam_diffusion.events import Step
from reparam_diffusion.training.learner import Learner
from reparam_diffusion.training.loop import train
torch.set_num_threads(1)
learners = []
init = Learner.__init__
def remembered(self, *args, **named):
    init(self, *args, **named)
    learners.append(self)
Learner.__init__ = remembered
folder = Path(sys.argv[2])
events = list(train(settle(read_settings(Path(sys.argv[1]))), folder=folder))
torch.save([p.detach() for p in learners[0].parameters], folder / f"rank{os.environ['RANK']}.pt")
print(json.dumps([event.loss for event in events if isinstance(event, Step)]))
"""


def test_two_processes_learn_what_one_learns_with_the_batch_doubled(tmp_path: Path) -> None:
    model, pictures = save_tiny(tmp_path / "model", "sd1"), save_pictures(tmp_path / "pictures", count=4)
    settings = [
        f"model.path='{model}'", "model.precision=fp32", "model.device=cpu", f"data.images='{pictures}'", "data.trigger=sks",
        "adapter.method=adalora", "targets.rules=[{match='*attn1*', adapter={method='lora'}}]", "training.steps=10", "training.accumulation=2", "data.flip=true", "training.ema=0.9",
        "output.file_precision=fp32", "output.sample_every=1000", "output.validate_every=5", "targets.text_encoder=attention",
    ]  # fmt: skip
    settings += ["embedding.vectors=2"]
    one = settle(parse_set([*settings, "training.batch=2"]))
    alone = [event.loss for event in train(one, folder=tmp_path / "one") if isinstance(event, Step)]
    config = tmp_path / "config.toml"
    config.write_text(to_toml(settle(parse_set(settings))), encoding="utf-8")
    (tmp_path / "two").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(config), str(tmp_path / "two")],
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert said[0] == said[1], "both tell the mean loss"
    assert json.loads(said[0]) == pytest.approx(alone, abs=1e-5)
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    whole, together = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    assert whole.keys() == together.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(tensor, together[key], rtol=0, atol=1e-4)


# --- launched, killed, resumed ---------------------------------------------------------------------------------------
@pytest.fixture
def pretended(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two processes whose training is a pretence."""
    monkeypatch.setattr(worker, "MODULE", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    folder = new_run(workspace, steps=2000)
    launchers.change_processes(folder, 2)
    return folder


def test_a_wrong_number_of_processes_leaves_the_run_as_it_was(workspace: Path) -> None:
    folder = new_run(workspace)
    before = (folder / "config.toml").read_text()
    with pytest.raises(UserError, match="at most 64"):
        launchers.change_processes(folder, 65)
    assert (folder / "config.toml").read_text() == before
    with locks.hold_run(folder), pytest.raises(UserError, match="worked on already"):
        launchers.change_processes(folder, 2)


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The processes that an `accelerate launch` has started, the first one first."""
    return sorted(psutil.Process(launcher).children(), key=lambda process: process.environ()["RANK"])


def gone(*processes: psutil.Process) -> bool:
    """Whether none of them is left, not even as a zombie."""
    return not any(process.is_running() for process in processes)


def test_ctrl_c_reaches_all_processes_and_only_the_first_writes(pretended: Path) -> None:
    assert worker.launch(pretended)
    following = launchers.follow(pretended, offset=0)
    started = next(event for event in following if isinstance(event, e.Started))
    assert started.processes == 2 and locks.is_held(locks.device_lock("cpu"))
    assert "2 processes" in run_fragments.progress_of(pretended.name, runs.state_of(pretended), "")
    os.kill(os.getpid(), signal.SIGINT)
    rest = list(following)
    assert isinstance(rest[-1], e.Stopped) and runs.state_of(pretended).state == "stopped"
    steps = [event.step for event in rest if isinstance(event, e.Step)]
    assert steps == list(range(1, len(steps) + 1)), "each step is told once"
    wait_for(lambda: not locks.is_held(locks.device_lock("cpu")))


@pytest.mark.parametrize(("rank", "ends"), [(0, "lost"), (1, "failed")])
def test_a_killed_process_ends_the_run_at_once_and_leaves_nobody(pretended: Path, rank: int, ends: str) -> None:
    launcher = psutil.Process(worker.launch(pretended))
    follower = runs.Follower(pretended)
    wait_for(lambda: follower.look().step >= 6)
    processes = ranks_of(launcher.pid)
    processes[rank].kill()
    wait_for(lambda: follower.look().state == ends, seconds=5)
    assert "last checkpoint" in follower.look().message
    wait_for(lambda: gone(launcher, *processes), seconds=30)
    assert not locks.is_held(locks.device_lock("cpu"))


def test_a_run_killed_in_two_processes_goes_on_in_one(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pictures = save_tiny(workspace / "model", "sd1"), save_pictures(workspace / "pictures", count=4)
    settings = [
        f"model.path='{model}'", "model.precision=fp32", "model.device=cpu", f"data.images='{pictures}'", "data.trigger=sks",
        "training.steps=400", "output.checkpoint_every=2", "output.sample_every=1000", "output.validate_every=1000", "launch.processes=2",
    ]  # fmt: skip
    folder = runs.create_run(settle(parse_set(settings)), workspace, now=NOW)
    launcher = psutil.Process(worker.launch(folder))
    follower = runs.Follower(folder)
    wait_for(lambda: (follower.look().checkpoint or 0) >= 2, seconds=90)
    ranks_of(launcher.pid)[1].kill()
    wait_for(lambda: follower.look().state == "failed", seconds=10)
    reached = follower.look().checkpoint
    assert reached is not None
    launchers.change_processes(folder, 1)
    seen = []
    for event in worker.work(folder, resume=True):
        seen.append(event)
        if isinstance(event, e.Step):
            runs.ask(folder, "pause")
    assert [event.step for event in seen if isinstance(event, e.Step)] == [reached + 1]
    assert any(isinstance(event, e.Warned) and "2 processes, now in one" in event.message for event in seen)
    assert follower.look().state == "paused"


def test_accelerate_launch_makes_one_run_and_tells_a_mistake_once(workspace: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--main_process_port", "0", *launchers.ONE_MACHINE, "-m", "reparam_diffusion", "train", "--workspace", str(workspace),
        "--set", "model.device=cpu", "--images",
    ]  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    small = tmp_path / "small"
    small.mkdir()
    Image.new("RGB", (8, 8)).save(small / "small.png")  # it can be opened, but not trained on
    images = save_pictures(tmp_path / "pictures")
    cases = [(empty, empty, "Error: The folder"), (images, empty, f"Error: {empty} is"), (small, "starter", "Failed: ")]
    for folder, model, words in cases:
        done = subprocess.run(
            [*command, str(folder), "--model", str(model)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert (done.stdout + done.stderr).count(words) == 1, done.stdout + done.stderr
    assert len(runs.list_runs(workspace)) == 1


# --- what is started, and on what ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ({}, ["-m", "work", "run"]),
        ({"processes": 3}, ["--multi_gpu", "--num_processes", "3", "--main_process_port", "0"]),
        ({"launcher": "accelerate"}, ["-m", "accelerate.commands.launch", "-m", "work", "run"]),
        (
            {"launcher": "accelerate", "processes": 4},
            ["accelerate.commands.launch", "--num_processes", "4", "-m", "work"],
        ),
    ],
)
def test_each_launcher_starts_the_worker_by_its_own_command(launch: dict[str, object], words: list[str]) -> None:
    command = launchers.command_of(settle({"launch": launch}).launch, "work", ["run"])
    assert command[0] == sys.executable and command[-3:] == ["-m", "work", "run"]
    assert " ".join(words) in " ".join(command)


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, of which none is touched."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_run_locks_a_card_for_each_of_its_processes(two_cards: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(**launch: object) -> list[str]:
        return locks.devices_of(settle({"launch": launch}))

    assert devices() == ["cuda:0"]
    assert devices(processes=2) == devices(launcher="accelerate") == ["cuda:0", "cuda:1"]
    assert devices(launcher="ray", processes=2) == []
    assert locks.devices_of(settle({"launch": {"processes": 2}, "model": {"device": "cpu"}})) == ["cpu"]
    with pytest.raises(UserError, match="torch sees 2"):
        devices(processes=3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5ee")
    assert devices(processes=2) == ["cuda:3", "cuda:GPU-5ee"], "a card has one name, whoever sees it under which number"


def test_a_run_on_two_cards_waits_until_both_are_free(
    two_cards: None, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(worker, "launch", lambda folder, resume: started.append(folder.name))
    monkeypatch.setattr(queue, "ensure_served", lambda workspace: None)

    def run(**launch: object) -> Path:
        return runs.create_run(settle({"data": {"images": "pictures"}, "launch": launch}), workspace, now=NOW)

    both, second = run(processes=2), run()
    with locks.try_hold(locks.device_lock("cuda:1")) as held:
        assert held
        assert not queue.submit(both)
        assert not queue.submit(second), "it asks for a card that the one before it waits for"
    with locks.try_hold_all([locks.device_lock("cuda:0"), locks.device_lock("cuda:1")]) as all_free:
        assert all_free, "who waits holds nothing"
    monkeypatch.setattr(queue, "LOOK_AGAIN", 0.01)
    queue.serve(workspace)
    assert started == [both.name, second.name]


# --- the true cause --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "is_lost"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711", True),
        ("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_only_a_lost_connection_is_told_as_the_end_of_another_process(words: str, is_lost: bool) -> None:
    assert is_peer_lost(RuntimeError(words)) is is_lost


def test_the_first_process_reports_why_another_one_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    causes.leave_cause(tmp_path, e.Failed("The disk is full.", "Because.", "Free some."))
    assert causes.find_cause(tmp_path) is None, "only the first one reports"
    monkeypatch.setenv("RANK", "0")
    found = causes.find_cause(tmp_path)
    assert found is not None and "Process 1" in found.what and "disk is full" in found.what and found.do == "Free some."
    monkeypatch.setattr(causes, "PATIENCE", 0.0)
    assert causes.find_cause(tmp_path) is None, "it is told once"
    (tmp_path / ".failed-1.json").write_text(e.Failed("of last week", time=1.0).to_json())
    assert causes.find_cause(tmp_path) is None, "what an earlier session left does not count"


def test_a_run_whose_second_process_fails_says_what_failed_there(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "MODULE", "failing_worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    folder = new_run(workspace, steps=2000)
    launchers.change_processes(folder, 2)
    worker.launch(folder)
    wait_for(lambda: runs.state_of(folder).state == "failed", seconds=60)
    assert "illegal memory access" in runs.state_of(folder).message and "Process 1" in runs.state_of(folder).message
