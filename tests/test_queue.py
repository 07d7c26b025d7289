"""Laws of the queue: one run a device, in order, whoever dies; a run that waits can be moved, taken out, resumed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import ROOT, new_run, wait_for

from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Started
from reparam_diffusion.jobs import locks, queue, runs, worker

Serve = Callable[[], threading.Thread]


@pytest.fixture
def served(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Workers whose training is a pretence, and a dispatcher in a thread when it is asked for."""
    monkeypatch.setattr(worker, "MODULE", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setattr(queue, "ensure_served", lambda workspace: None)

    def serve() -> threading.Thread:
        thread = threading.Thread(target=queue.serve, args=[workspace], daemon=True)
        thread.start()
        return thread

    return serve


def states(*folders: Path) -> list[str]:
    return [runs.state_of(folder).state for folder in folders]


def test_a_run_starts_at_once_on_a_free_device_and_the_next_ones_wait_in_order(workspace: Path, served: Serve) -> None:
    first, second, third = (new_run(workspace, steps=60), new_run(workspace, steps=3), new_run(workspace, steps=3))
    assert queue.submit(first)
    assert not queue.submit(second) and not queue.submit(third)
    assert states(first, second, third) == ["running", "queued", "queued"]
    assert [runs.state_of(folder).place for folder in (first, second, third)] == [0, 1, 2]
    dispatcher = served()
    wait_for(lambda: states(first, second, third) == ["finished"] * 3)
    dispatcher.join(timeout=10)
    assert not dispatcher.is_alive() and queue.waiting(workspace) == []
    begun = [min(event.time for event in runs.read_events(folder)[0]) for folder in (first, second, third)]
    ended = [max(event.time for event in runs.read_events(folder)[0]) for folder in (first, second)]
    assert begun[1] >= ended[0] and begun[2] >= ended[1], "no two at once"


def test_the_line_can_be_changed_while_it_waits(workspace: Path, served: Serve) -> None:
    folders = [new_run(workspace) for _ in range(4)]
    with locks.try_hold(locks.device_lock("cpu")) as held:
        assert held
        for folder in folders:
            assert not queue.submit(folder)
        names = [folder.name for folder in folders]
        queue.move(workspace, names[3], -2)
        assert [one.run for one in queue.waiting(workspace)] == [names[0], names[3], names[1], names[2]]
        queue.move(workspace, names[0], 99)
        assert queue.waiting(workspace)[-1].run == names[0]
        queue.stop(folders[3])
        assert states(folders[3]) == ["created"] and not runs.asked(folders[3]), (
            "it never ran, so nothing is to be stopped"
        )
        assert queue.clear(workspace) == 3
        assert states(*folders) == ["created"] * 4


def test_a_paused_run_that_waits_is_queued_and_goes_on_where_it_was(workspace: Path, served: Serve) -> None:
    folder = new_run(workspace, steps=400)
    queue.submit(folder)
    wait_for(lambda: (runs.state_of(folder).checkpoint or 0) >= 5)
    queue.stop(folder, "pause")
    wait_for(lambda: states(folder) == ["paused"])
    before = runs.state_of(folder).checkpoint
    with locks.try_hold(locks.device_lock("cpu"), patience=5) as held:
        assert held
        queue.submit(folder, resume=True)
        assert states(folder) == ["queued"]
    served()

    def starts() -> list[int]:
        return [event.first_step for event in runs.read_events(folder)[0] if isinstance(event, Started)]

    wait_for(lambda: len(starts()) == 2)
    assert starts() == [1, (before or 0) + 1]
    queue.stop(folder)
    wait_for(lambda: states(folder) == ["stopped"])


def test_nobody_waits_twice_and_a_live_run_not_at_all(workspace: Path, served: Serve) -> None:
    folder, other = new_run(workspace, steps=200), new_run(workspace)
    queue.submit(folder)
    queue.submit(other)
    for one in (folder, other):
        with pytest.raises(UserError, match="already"):
            queue.submit(one)
    queue.remove(workspace, other.name)
    queue.stop(folder)
    wait_for(lambda: states(folder) == ["stopped"])


def test_a_run_whose_folder_is_gone_does_not_hold_up_the_others(workspace: Path, served: Serve) -> None:
    gone, folder = new_run(workspace), new_run(workspace, steps=2)
    with locks.try_hold(locks.device_lock("cpu")):
        queue.submit(gone)
        queue.submit(folder)
    (gone / "config.toml").unlink()
    served()
    wait_for(lambda: states(folder) == ["finished"])


def test_many_hands_at_once_lose_nobody(workspace: Path, served: Serve) -> None:
    folders = [new_run(workspace) for _ in range(12)]
    with locks.try_hold(locks.device_lock("cpu")):
        hands = [threading.Thread(target=queue.submit, args=[folder]) for folder in folders]
        for hand in hands:
            hand.start()
        for hand in hands:
            hand.join()
        assert sorted(one.run for one in queue.waiting(workspace)) == sorted(folder.name for folder in folders)
        queue.clear(workspace)


def test_a_damaged_queue_is_put_aside_and_holds_nobody_up(workspace: Path, served: Serve) -> None:
    folder = new_run(workspace, steps=2)
    runs.queue_file(workspace).write_text("{half")
    assert states(folder) == ["created"]
    assert (workspace / "queue.damaged.json").read_text() == "{half"
    queue.submit(folder)
    wait_for(lambda: states(folder) == ["finished"])


def test_two_hands_resume_a_run_once(workspace: Path, served: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_run(workspace, steps=300)
    answers: list[object] = []

    def press() -> None:
        try:
            answers.append(queue.submit(folder))
        except UserError as error:
            answers.append(str(error))

    hands = [threading.Thread(target=press) for _ in range(4)]
    for hand in hands:
        hand.start()
    for hand in hands:
        hand.join()
    assert answers.count(True) == 1 and sum("already" in str(answer) for answer in answers) == 3
    assert queue.waiting(workspace) == []
    queue.stop(folder)
    wait_for(lambda: states(folder) == ["stopped"])


def test_the_dispatcher_is_a_process_that_outlives_who_asked_and_ends_by_itself(
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real one with the real worker, on a run that fails at once for want of pictures."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = new_run(workspace)
    lock = locks.device_lock("cpu")
    with locks.try_hold(lock):
        assert not queue.submit(folder)
        time.sleep(0.2)
        assert states(folder) == ["queued"]
    wait_for(lambda: states(folder) == ["failed"], seconds=120)
    wait_for(lambda: not locks.is_held(workspace / ".dispatcher.lock"))
