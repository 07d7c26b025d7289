"""The studio draws what folders ask for: in turn, warm, cancellable, and nothing leaks from picture to picture."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from PIL import Image
from studio_tiny import FAST, asked, finish, lora_file, pixels, recipe, tiny_workspace
from tiny_pipelines import save_tiny

from reparam_diffusion import apply, inject
from reparam_diffusion.adapters import METHODS
from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.apply import Easel, generate
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Launched
from reparam_diffusion.gallery import images
from reparam_diffusion.gallery.recipe import Use
from reparam_diffusion.jobs import locks, runs, studio, studio_worker
from reparam_diffusion.models import load, sample
from reparam_diffusion.models.load import Model, load_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "sd1")


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return load_model(tiny, device="cpu")


@pytest.fixture
def workspace(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny_workspace(tmp_path, tiny, monkeypatch)


# --- the easel -------------------------------------------------------------------------------------------------------
def weights_of(model: Model) -> dict[str, torch.Tensor]:
    return {f"{part}.{k}": v.clone() for part, module in model.parts.items() for k, v in module.state_dict().items()}


def test_the_easel_draws_what_generate_draws_and_a_change_touches_only_its_own_sites(
    model: Model, workspace: Path
) -> None:
    before = weights_of(model)
    teddy, style = (workspace / "adapters" / f"{name}.safetensors" for name in ("teddy", "style"))
    easel = Easel(model)
    steps = [[(teddy, 1.0)], [(teddy, 0.5), (style, -1.0, 2.0)], [(style, 1.0)], [], [(teddy, 0.5, 0.0)]]
    for choices in steps:
        easel.put(choices)
        ours = sample.draw(model, "a toy", seeds=[1], **FAST)[0]
        easel.clear()
        assert ours.tobytes() == generate(model, "a toy", adapters=choices, seed=1, **FAST)[0].tobytes()
        easel.put(choices)
    easel.clear()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def test_only_what_differs_is_merged_again(model: Model, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[str] = []
    plain = inject._merge_site

    def counted(here: inject._Merged, changes: list[tuple[Adapter, float]]) -> None:
        merged.append(changes[0][0].name)
        plain(here, changes)

    monkeypatch.setattr(inject, "_merge_site", counted)
    teddy = workspace / "adapters" / "teddy.safetensors"
    easel = Easel(model)
    for choices, count in (
        ([(teddy, 1.0)], 2),
        ([(teddy, 1.0)], 0),
        ([(teddy, 1.0, 0.5)], 1),
        ([(teddy, 0.5, 0.5)], 1),
        ([(teddy, 0.0, 0.5)], 0),
    ):
        merged.clear()
        easel.put(choices)
        assert len(merged) == count, choices
    easel.clear()


def test_a_merge_that_breaks_off_leaves_the_model_as_it_was(
    model: Model, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights_of(model)
    easel = Easel(model)
    easel.put([workspace / "adapters" / "teddy.safetensors"])

    def broken(here: inject._Merged, changes: list[tuple[Adapter, float]]) -> None:
        here.host.weight.data.fill_(7.0)
        raise ZeroDivisionError

    monkeypatch.setattr(inject, "_merge_site", broken)
    with pytest.raises(ZeroDivisionError):
        easel.put([workspace / "adapters" / "style.safetensors"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def test_a_file_is_read_once_until_it_changes(model: Model, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    plain = apply.bind
    monkeypatch.setattr(apply, "bind", lambda model, file: (reads.append(file), plain(model, file))[1])
    file = lora_file(workspace / "own.safetensors", seed=5)
    easel = Easel(model)
    for strength in (1.0, 0.5):
        easel.put([(file, strength)])
    assert len(reads) == 1
    before = model.unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q").weight.clone()
    lora_file(file, seed=6)
    os.utime(file, ns=(1, 1))
    easel.put([(file, 0.5)])
    after = model.unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q").weight
    assert len(reads) == 2 and not torch.equal(before, after)
    easel.clear()


@pytest.mark.parametrize("method", METHODS)
def test_merging_anew_is_merging_from_the_untouched_weights(method: str) -> None:
    """Bit for bit: no strength leaves a trace in the next one, in any number format."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(12, 20).to(dtype)
        known = METHODS[method]
        plan = known.plan(known.spec(), tuple(layer.weight.shape), 1)
        adapter = known.build(plan, layer.weight.float(), 1, torch.Generator().manual_seed(1))
        for parameter in adapter.parameters():
            parameter.data.normal_(std=0.3)
        merge = inject.Merge({"m": torch.nn.Sequential(layer)})
        merge.settle([({"m.0": adapter}, lambda site: 1.5)])
        merge.settle([({"m.0": adapter}, lambda site: -0.3)])
        again = layer.weight.clone()
        merge.restore()
        with inject.merged({"m": torch.nn.Sequential(layer)}, [({"m.0": adapter}, lambda site: -0.3)]):
            assert torch.equal(again, layer.weight)


# --- requests --------------------------------------------------------------------------------------------------------
def test_a_request_becomes_pictures_that_say_what_they_are(workspace: Path) -> None:
    use = Use(name="teddy", strength=0.8, te_strength=0.5)
    folder = asked(workspace, recipe(adapters=(use,)), recipe(seed=9))
    assert studio.state_of(folder).state == "lost"  # nobody is there yet: the process is not started in these tests
    finish(workspace)
    state = studio.state_of(folder)
    assert (state.state, state.done, list(state.pictures)) == ("finished", state.total, [0, 1])
    first = images.settings_of(state.pictures[0])
    assert (first.adapters, first.seed, first.scheduler, first.model) == ((use,), 1, "DDIM", "tiny")
    assert images.history(workspace, most=9) == [state.pictures[1], state.pictures[0]]
    assert studio.todo(workspace) == []


def test_a_restored_recipe_draws_the_same_picture(workspace: Path) -> None:
    folder = asked(workspace, recipe(adapters=(Use(name="teddy", strength=0.8),), scheduler="Euler a"))
    finish(workspace)
    file = studio.state_of(folder).pictures[0]
    again = asked(workspace, images.settings_of(file))
    finish(workspace)
    assert pixels(studio.state_of(again).pictures[0]) == pixels(file)


def test_no_adapter_leaks_after_a_cancel_or_an_error(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "at_once", lambda device, width, height: 1)
    plain = asked(workspace, recipe())
    finish(workspace)
    expected = pixels(studio.state_of(plain).pictures[0])
    kept = studio_worker.Studio(workspace)
    strong = recipe(adapters=(Use(name="teddy", strength=2.0),))
    with_it, broken, after = (
        asked(workspace, strong, strong),
        asked(workspace, recipe(width=33)),
        asked(workspace, recipe()),
    )
    job = studio_worker.draw_request(with_it, kept)
    assert next(job)
    studio.cancel(with_it)
    assert list(job) == []
    assert studio.state_of(with_it).state == "cancelled" and len(studio.state_of(with_it).pictures) == 1
    list(studio_worker.draw_request(broken, kept))
    failed = studio.state_of(broken)
    assert failed.state == "failed" and "does not fit this model" in failed.message
    list(studio_worker.draw_request(after, kept))
    assert pixels(studio.state_of(after).pictures[0]) == expected
    assert pixels(studio.state_of(with_it).pictures[0]) != expected


def test_a_cancel_in_the_middle_of_a_picture_ends_it_there(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = asked(workspace, recipe(steps=500))
    plain = runs.EventLog.append

    def cancelling(log: runs.EventLog, event: object) -> None:
        plain(log, event)  # type: ignore[arg-type]
        if getattr(event, "phase", "") == "drawing":
            studio.cancel(folder)

    monkeypatch.setattr(runs.EventLog, "append", cancelling)
    finish(workspace)
    state = studio.state_of(folder)
    assert state.state == "cancelled" and not state.pictures and state.done < state.total / 10


def test_requests_take_turns_a_picture_each(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "at_once", lambda device, width, height: 1)
    long = asked(workspace, *(recipe(seed=n) for n in range(3)))
    short = asked(workspace, recipe(seed=50))
    finish(workspace)
    order = [images.settings_of(file).seed for file in images.history(workspace, most=9)[::-1]]
    assert order == [0, 50, 1, 2]
    assert studio.state_of(long).state == studio.state_of(short).state == "finished"


def test_requests_for_another_base_model_wait_for_its_turn(
    workspace: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many ask at once, the model is not changed for every picture."""
    monkeypatch.setattr(sample, "at_once", lambda model, width, height: 1)
    (workspace / "models" / "other").symlink_to(tiny)
    loads: list[str] = []
    plain = load.load_model
    monkeypatch.setattr(
        load, "load_model", lambda path, **more: (loads.append(Path(path).name), plain(path, **more))[1]
    )
    for n, name in enumerate(("tiny", "other", "tiny", "other")):
        asked(workspace, recipe(seed=10 * n, model=name), recipe(seed=10 * n + 1, model=name))
    finish(workspace)
    assert loads == ["tiny", "other"]
    order = [images.settings_of(file).seed for file in images.history(workspace, most=9)[::-1]]
    assert order == [0, 20, 1, 21, 10, 30, 11, 31]


def test_memory_that_runs_out_is_told_once_and_the_next_request_is_drawn(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sample.draw

    def hungry(model: Model, prompt: str, **options: object) -> list[Image.Image]:
        if prompt == "too much":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if prompt == "a bug":
            raise RuntimeError("shapes differ")
        return plain(model, prompt, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sample, "draw", hungry)
    much, bug, fine = (asked(workspace, recipe(prompt=words)) for words in ("too much", "a bug", "a toy"))
    finish(workspace)
    assert "The memory is not enough for this picture." in studio.state_of(much).message
    assert "a mistake of ours" in studio.state_of(bug).message and "shapes differ" in studio.state_of(bug).message
    assert studio.state_of(fine).state == "finished"


def test_an_adapter_that_is_not_there_is_told_before_anything_is_asked(workspace: Path) -> None:
    for name, words in (
        ("tedy", 'Did you mean "teddy"'),
        ("../adapters/teddy", "no adapter of this gallery"),
        ("/etc/passwd", "no adapter of this gallery"),
        ("runs/../adapters/teddy.safetensors", "is not there"),
    ):
        with pytest.raises(UserError, match=words):
            asked(workspace, recipe(adapters=(Use(name=name),)))
    assert studio.list_requests(workspace) == []


def test_what_a_killed_studio_had_begun_is_not_begun_again(workspace: Path) -> None:
    begun, waiting = asked(workspace, recipe()), asked(workspace, recipe(seed=2))
    job = studio_worker.draw_request(begun, studio_worker.Studio(workspace))
    (begun / "events.jsonl").write_text(
        json.dumps({"event": "Prepared", "phase": "drawing", "done": 1, "total": 9, "time": 0}) + "\n"
    )
    finish(workspace)
    assert studio.state_of(begun).state == "failed" and "without a word" in studio.state_of(begun).message
    assert studio.state_of(waiting).state == "finished"
    job.close()


def test_a_studio_of_another_machine_is_known_by_its_lock_not_by_its_number(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "PATIENCE", 0.0)
    request = asked(workspace, recipe())
    with runs.EventLog(request) as log:
        log.append(Launched(os.getpid(), str(request), host="elsewhere"))
    assert studio.state_of(request).state == "lost"
    with locks.try_hold(studio.studio_lock(workspace)):
        assert studio.state_of(request).state == "queued"


def test_old_requests_are_forgotten_and_their_pictures_stay(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studio, "KEPT", 2)
    folders = [asked(workspace, recipe(seed=n)) for n in range(4)]
    finish(workspace)
    assert studio.list_requests(workspace) == folders[:1:-1]
    assert len(images.history(workspace, most=9)) == 4


# --- the device ------------------------------------------------------------------------------------------------------
def test_while_a_run_holds_the_device_a_request_waits_or_goes_ahead_when_told(workspace: Path) -> None:
    waits, goes = asked(workspace, recipe()), asked(workspace, recipe(seed=2))
    studio.ask(goes, "ahead")
    kept = studio_worker.Studio(workspace)
    with FileLock(studio.studio_lock(workspace)), FileLock(locks.device_lock("cpu")):
        job = studio_worker.draw_request(waits, kept)
        assert next(job) is False
        assert next(job) is False
        assert studio.state_of(waits).state == "waiting"
        list(studio_worker.draw_request(goes, kept))
        assert studio.state_of(goes).state == "finished"
    list(job)
    assert studio.state_of(waits).state == "finished"


def test_the_device_is_free_between_two_pictures(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "at_once", lambda device, width, height: 1)
    folder = asked(workspace, recipe(), recipe(seed=2))
    job = studio_worker.draw_request(folder, studio_worker.Studio(workspace))
    for _ in range(2):
        assert next(job)
        assert not locks.is_held(locks.device_lock("cpu"))


# --- the real process ------------------------------------------------------------------------------------------------
@pytest.fixture
def own_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder, and so a device lock, of this test's own, also for the processes it starts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def until(is_so: Callable[[], bool], *, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def started() -> Iterator[list[int]]:
    """Processes to be ended after the test."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_submit_starts_one_process_that_outlives_a_kill_as_lost(
    tmp_path: Path, tiny: Path, own_device: None, started: list[int]
) -> None:
    slow = recipe(model=str(tiny), steps=1000, width=64, height=64)
    first = asked(tmp_path, slow)
    until(lambda: studio.state_of(first).state == "drawing")
    second = asked(tmp_path, slow)
    pid = next(event.pid for event in runs.read_events(first)[0] if type(event).__name__ == "Launched")
    started.append(pid)
    assert not any(type(event).__name__ == "Launched" for event in runs.read_events(second)[0])  # it was there
    os.kill(pid, signal.SIGKILL)
    until(lambda: studio.state_of(first).state == "lost")
    third = asked(tmp_path, recipe(model=str(tiny)))
    started += [event.pid for event in runs.read_events(third)[0] if type(event).__name__ == "Launched"]
    until(lambda: studio.state_of(third).state == "finished")
    assert studio.state_of(first).state == "failed"
    os.kill(started[-1], signal.SIGTERM)  # a stop: it ends by itself, in the middle of what it draws
    until(lambda: not locks.is_held(studio.studio_lock(tmp_path)))
    assert not studio.state_of(second).is_live
