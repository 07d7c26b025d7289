"""The shelf keeps every adapter, under a name that a person finds again; nothing on it is ever lost or rewritten."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from fake_worker import fake_train
from PIL import Image

from reparam_diffusion import events as e
from reparam_diffusion.config import settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import of_run, shelf, waste
from reparam_diffusion.gallery.thumbs import thumb_of
from reparam_diffusion.jobs import runs, worker

NOW = datetime(2026, 1, 2, 3, 4, 5)


def adapter(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "adapter.safetensors"
    file.write_bytes(content)
    return file


def shelved(workspace: Path, content: bytes = b"one", name: str = "teddy") -> Path:
    return shelf.add(adapter(workspace, content), workspace, name=name)


def notes_of(file: Path) -> dict[str, object]:
    return json.loads(shelf.companion(file, ".json").read_text(encoding="utf-8"))


def test_another_adapter_of_the_same_name_gets_a_number_and_overwrites_nothing(tmp_path: Path) -> None:
    files = [shelved(tmp_path, content, name) for content, name in ((b"one", "My Teddy!"), (b"two", "my teddy"))]
    files.append(shelved(tmp_path, b"three", "my-teddy"))
    assert [file.name for file in files] == [
        "my-teddy.safetensors",
        "my-teddy-2.safetensors",
        "my-teddy-3.safetensors",
    ]
    assert [file.read_bytes() for file in files] == [b"one", b"two", b"three"]


def test_the_same_bytes_stand_on_the_shelf_once_and_keep_their_notes(tmp_path: Path) -> None:
    first = shelved(tmp_path)
    first.with_suffix(".json").write_text('{"notes": "mine"}')
    assert shelved(tmp_path) == first
    assert notes_of(first) == {"notes": "mine"}
    seen = sorted(file.name for file in (tmp_path / "adapters").iterdir() if not file.name.startswith("."))
    assert seen == ["teddy.json", "teddy.safetensors"]


def test_notes_carry_the_sidecar_keys_of_a1111(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(b"png")
    added = shelf.add(
        adapter(tmp_path, b"x"), tmp_path, name="t", thumbnail=picture, facts={"activation text": "sks toy"}
    )
    notes = notes_of(added)
    assert notes["activation text"] == "sks toy"
    assert {"preferred weight", "negative text", "notes", "description", "sd version"} <= notes.keys()
    assert added.with_suffix(".png").read_bytes() == b"png"


def test_an_adapter_is_found_by_every_name_it_has(tmp_path: Path) -> None:
    added = shelved(tmp_path, name="Mein Bär")
    for name in ("Mein Bär", "mein bär", "mein-bär", "mein-bär.safetensors"):
        assert shelf.find(name, tmp_path) == shelf.locate(name, tmp_path) == added
    assert shelf.locate(str(added), tmp_path) == added
    with pytest.raises(UserError):  # a path is no name: pages and other programs use `find`
        shelf.find(str(added), tmp_path)


def test_a_wrong_name_is_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gallery is empty"):
        shelf.find("teddi", tmp_path)
    shelved(tmp_path)
    with pytest.raises(UserError, match='Did you mean "teddy"'):
        shelf.find("teddi", tmp_path)


def test_broken_notes_hide_no_adapter_and_are_not_overwritten(tmp_path: Path) -> None:
    added = shelved(tmp_path)
    added.with_suffix(".json").write_text("{")
    assert [(one.file, one.name) for one in shelf.list_adapters(tmp_path)] == [(added, "teddy")]
    with pytest.raises(UserError, match="cannot be read"):
        shelf.edit("teddy", tmp_path, {"notes": "new"})
    assert added.with_suffix(".json").read_text() == "{"


@pytest.mark.parametrize(
    ("name", "slug"),
    [("../../etc/passwd", "etc-passwd"), ("", "adapter"), ("!!!", "adapter"), ("熊", "熊"), ("A" * 99, "a" * 48)],
)
def test_a_slug_is_a_safe_file_name(name: str, slug: str) -> None:
    assert shelf.make_slug(name) == slug


@pytest.mark.parametrize("stem", ["../secret", "/etc/passwd", "", ".", ".lock", "no such"])
def test_nothing_outside_the_shelf_has_a_stem(tmp_path: Path, stem: str) -> None:
    adapter(tmp_path, b"x").rename(tmp_path / "secret.safetensors")
    shelved(tmp_path)
    with pytest.raises(UserError, match="no adapter"):
        shelf.at(stem, tmp_path)


# --- what a person edits ---------------------------------------------------------------------------------------------
def test_a_new_name_is_shown_while_file_and_prompts_keep_the_old_one(tmp_path: Path) -> None:
    added = shelved(tmp_path)
    assert shelf.edit("teddy", tmp_path, {"name": " Brown <b>bear</b> "}).name == "Brown <b>bear</b>"
    assert (added.read_bytes(), shelf.find("teddy", tmp_path)) == (b"one", added)
    assert shelf.find("brown b bear b", tmp_path) == added


def test_an_edit_keeps_what_it_does_not_change_and_what_it_does_not_know(tmp_path: Path) -> None:
    added = shelved(tmp_path)
    added.with_suffix(".json").write_text('{"notes": "old", "extension": {"of": ["another", "program"]}}')
    shelf.edit("teddy", tmp_path, {"tags": "toy, brown, toy,", "preferred weight": "0.8"})
    assert notes_of(added) == {
        "notes": "old",
        "extension": {"of": ["another", "program"]},
        "tags": ["toy", "brown"],
        "preferred weight": 0.8,
    }


def test_many_editors_at_once_lose_no_edit(tmp_path: Path) -> None:
    added = shelved(tmp_path)
    keys = ["name", "activation text", "negative text", "description", "notes"]
    with ThreadPoolExecutor(len(keys)) as people:
        list(people.map(lambda key: [shelf.edit("teddy", tmp_path, {key: f"{key} {n}"}) for n in range(8)], keys))
    assert {key: notes_of(added)[key] for key in keys} == {key: f"{key} 7" for key in keys}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("preferred weight", "much"),
        ("preferred weight", float("nan")),
        ("preferred weight", 1e9),
        ("run", "x"),
        ("name", "x" * 121),
        ("tags", ",".join(map(str, range(51)))),
    ],
)
def test_what_cannot_be_noted_is_refused_and_changes_nothing(tmp_path: Path, key: str, value: object) -> None:
    before = notes_of(shelved(tmp_path))
    with pytest.raises(UserError):
        shelf.edit("teddy", tmp_path, {"notes": "good", key: value})
    assert notes_of(shelf.at("teddy", tmp_path)) == before


# --- the bin ---------------------------------------------------------------------------------------------------------
def test_what_comes_back_from_the_bin_is_what_went_in(tmp_path: Path) -> None:
    added = shelved(tmp_path)
    shelf.edit("teddy", tmp_path, {"name": "Bear", "notes": "mine"})
    added.with_suffix(".png").write_bytes(b"png")
    before = {file.name: file.read_bytes() for file in added.parent.iterdir()}
    key = waste.put("teddy", tmp_path, now=NOW)
    assert shelf.list_adapters(tmp_path) == []
    assert [(one.key, one.shelved.name, one.when) for one in waste.list_bin(tmp_path)] == [
        (key, "Bear", "2026-01-02 03:04")
    ]
    assert waste.restore(key, tmp_path) == added
    assert {file.name: file.read_bytes() for file in added.parent.iterdir()} == before
    assert waste.list_bin(tmp_path) == []


def test_a_name_that_was_taken_meanwhile_is_kept_by_its_new_owner(tmp_path: Path) -> None:
    shelved(tmp_path, b"old")
    key = waste.put("teddy", tmp_path, now=NOW)
    new = shelved(tmp_path, b"new")
    back = waste.restore(key, tmp_path)
    assert (back.name, back.read_bytes()) == ("teddy-2.safetensors", b"old")
    assert (new.name, new.read_bytes()) == ("teddy.safetensors", b"new")
    assert notes_of(back)["name"] == notes_of(new)["name"] == "teddy"


def test_two_of_one_name_deleted_in_one_second_are_both_kept(tmp_path: Path) -> None:
    keys = []
    for content in (b"one", b"two"):
        shelved(tmp_path, content)
        keys.append(waste.put("teddy", tmp_path, now=NOW))
    assert sorted(waste.restore(key, tmp_path).read_bytes() for key in keys) == [b"one", b"two"]


def test_what_is_gone_already_is_told_not_crashed_over(tmp_path: Path) -> None:
    shelved(tmp_path)
    key = waste.put("teddy", tmp_path, now=NOW)
    with pytest.raises(UserError, match="moved to the bin meanwhile"):
        waste.put("teddy", tmp_path, now=NOW)
    with pytest.raises(UserError, match="moved to the bin meanwhile"):
        shelf.edit("teddy", tmp_path, {"notes": "late"})
    waste.restore(key, tmp_path)
    with pytest.raises(UserError, match="not in the bin any more"):
        waste.restore(key, tmp_path)
    with pytest.raises(UserError, match="not in the bin any more"):
        waste.restore("../adapters", tmp_path)


def test_emptying_deletes_what_was_named_and_only_in_the_bin(tmp_path: Path) -> None:
    keys = []
    for name in ("a", "b", "c"):
        shelved(tmp_path, name.encode(), name)
        keys.append(waste.put(name, tmp_path, now=NOW))
    kept = shelved(tmp_path, b"d", "d")
    assert waste.empty(tmp_path, [keys[0], "../../adapters", "nothing"]) == 1
    assert {one.key for one in waste.list_bin(tmp_path)} == set(keys[1:])
    assert waste.empty(tmp_path) == 2
    assert (waste.list_bin(tmp_path), kept.is_file()) == ([], True)


# --- one run, one entry ----------------------------------------------------------------------------------------------
@pytest.fixture
def stopped_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped at its third step, with its first adapter on the shelf."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # the device lock must not wait for other tests
    config = settle(
        {"data": {"images": "pictures", "trigger": "sks"}, "training": {"steps": 8}, "model": {"device": "cpu"}}
    )
    folder = runs.create_run(config, tmp_path / "workspace", now=NOW)
    for event in worker.work(folder, train=fake_train):
        if isinstance(event, e.Step) and event.step == 3:
            runs.ask(folder, "stop")
    assert runs.state_of(folder).state == "stopped"
    return folder


def resumed(folder: Path) -> list[shelf.Shelved]:
    assert isinstance(list(worker.work(folder, resume=True, train=fake_train))[-1], e.Finished)
    return shelf.list_adapters(runs.workspace_of(folder))


def test_a_stopped_run_resumed_to_its_end_has_one_entry_with_its_notes(stopped_run: Path) -> None:
    workspace = runs.workspace_of(stopped_run)
    (first,) = shelf.list_adapters(workspace)
    shelf.edit(first.stem, workspace, {"name": "My bear", "notes": "good at 0.8"})
    (last,) = resumed(stopped_run)
    assert (last.file, last.name, last.facts["notes"]) == (first.file, "My bear", "good at 0.8")
    assert last.file.read_bytes().startswith(b"whole")
    assert (stopped_run / runs.state_of(stopped_run).gallery).resolve() == last.file.resolve()
    (old,) = waste.list_bin(workspace)
    assert (old.shelved.file.read_bytes(), old.shelved.name) == (b"half", "My bear")


def test_an_entry_whose_file_somebody_changed_is_left_alone(stopped_run: Path) -> None:
    (first,) = shelf.list_adapters(runs.workspace_of(stopped_run))
    first.file.write_bytes(b"my own")
    assert {one.file.read_bytes()[:6] for one in resumed(stopped_run)} == {b"my own", b"whole "}


def test_an_entry_in_the_bin_stays_there_when_its_run_goes_on(stopped_run: Path) -> None:
    workspace = runs.workspace_of(stopped_run)
    waste.put(shelf.list_adapters(workspace)[0].stem, workspace, now=NOW)
    assert [one.file.read_bytes()[:5] for one in resumed(stopped_run)] == [b"whole"]
    assert [one.shelved.file.read_bytes() for one in waste.list_bin(workspace)] == [b"half"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UserError("Not written.", "It is full.")])
def test_a_gallery_that_takes_nothing_does_not_spoil_the_run(
    stopped_run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> Path:
        raise error

    monkeypatch.setattr(of_run, "shelve", refuse)
    events = list(worker.work(stopped_run, resume=True, train=fake_train))
    assert isinstance(events[-1], e.Finished)
    assert any(isinstance(event, e.Warned) and "run's folder" in event.message for event in events)


def test_two_runs_of_one_name_have_two_entries(stopped_run: Path) -> None:
    workspace = runs.workspace_of(stopped_run)
    again = runs.create_run(runs.read_config(stopped_run), workspace, now=NOW)
    assert len(resumed(again)) == 2


# --- small pictures --------------------------------------------------------------------------------------------------
def test_a_small_picture_is_made_once_and_anew_when_its_picture_changes(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    Image.new("RGB", (600, 300), "teal").save(picture)
    thumb = thumb_of(picture, tmp_path)
    assert thumb is not None
    with Image.open(thumb) as small:
        assert small.size == (256, 256)
    assert thumb_of(picture, tmp_path) == thumb
    Image.new("RGB", (300, 300), "red").save(picture)
    assert thumb_of(picture, tmp_path) not in (thumb, None)


def test_a_broken_picture_has_no_small_one(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"no picture")
    assert thumb_of(tmp_path / "p.png", tmp_path) is None
    assert thumb_of(tmp_path / "none.png", tmp_path) is None
