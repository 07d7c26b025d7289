"""kohya's folder layout: <repeats>_<trigger class> gives sets on the command line, in Python and on the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from reparam_diffusion.config import DataSettings, settle
from reparam_diffusion.data.folder_layout import expand_folders, split_words
from reparam_diffusion.data.sets import find_all
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Started, Warned
from reparam_diffusion.jobs import datasets, runs
from reparam_diffusion.training.loop import train
from ui import starting


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(["10_sks cat", "30_zwx  dog", "notes", "0_none", "empty"]):
        (tmp_path / "root" / name).mkdir(parents=True)
        if name != "empty":
            Image.new("RGB", (64, 64), (50 * number, 9, 9)).save(tmp_path / "root" / name / "image1.png")
    (tmp_path / "root" / "10_sks cat" / "image1.txt").write_text("a cat of its own")
    return tmp_path / "root"


def test_each_sub_folder_is_a_set_with_its_repeats_and_words(root: Path) -> None:
    data, notes = expand_folders(DataSettings(images=str(root)))
    found = find_all(data, least_side=8)
    assert [(one.source.trigger, one.source.class_word, one.source.repeats) for one in found] == [
        ("sks", "cat", 10),
        ("zwx", "dog", 30),
    ]
    assert [one.pictures[0].caption for one in found] == ["a cat of its own", None]
    assert [note for note in notes if '"10_sks cat"' in note and "10 repeats" in note and '"sks"' in note]
    assert [note for note in notes if '"notes" is left out' in note] and [note for note in notes if '"0_none"' in note]
    assert expand_folders(data) == (data, [])


def test_what_the_user_gave_wins(root: Path) -> None:
    data, _ = expand_folders(DataSettings(images=str(root), trigger="sks", repeats=2))
    assert (data.trigger, data.class_word, data.repeats) == ("sks", "cat", 2)
    assert (data.sets[0].trigger, data.sets[0].class_word, data.sets[0].repeats) == ("sks", "zwx dog", 2)


@pytest.mark.parametrize(
    ("words", "trigger", "class_word", "expected"),
    [
        ("sks dog", "", "", ("sks", "dog")),
        ("cat", "", "", ("cat", "")),
        ("cat", "sks", "", ("sks", "cat")),
        ("SKS big dog", "sks", "", ("sks", "big dog")),
        ("sks dog", "sks", "puppy", ("sks", "puppy")),
        ("sksy dog", "sks", "", ("sks", "sksy dog")),
        ("cat", "", "cat", ("", "cat")),
    ],
)
def test_words_of_a_folder(words: str, trigger: str, class_word: str, expected: tuple[str, str]) -> None:
    assert split_words(words, trigger, class_word) == expected


def test_other_folders_stay_as_they_are(root: Path) -> None:
    Image.new("RGB", (64, 64)).save(root / "here.png")
    data = DataSettings(images=str(root))
    assert expand_folders(data) == (data, [])
    refused = find_all(data, least_side=8)[0].refused
    assert {"10_sks cat", "30_zwx  dog", "notes", "0_none"} == {bad.path.name for bad in refused}


def test_one_folder_of_masks_for_images_of_one_name_is_asked_about(root: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (64, 64), 255).save(masks / "image1.png")
    with pytest.raises(UserError, match="cannot be told apart") as told:
        expand_folders(DataSettings(images=str(root), masks=str(masks)))
    assert told.value.place == "data.masks"
    for name in ("10_sks cat", "30_zwx  dog"):
        (masks / name).mkdir()
        Image.new("L", (64, 64), 255).save(masks / name / "image1.png")
    data, _ = expand_folders(DataSettings(images=str(root), masks=str(masks)))
    found = [one.masks[0] for one in find_all(data, least_side=8)]
    assert [mask and mask.path.parent.name for mask in found] == ["10_sks cat", "30_zwx  dog"]


def test_a_further_set_on_the_page_is_expanded(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting.queue, "submit", lambda run: None)
    config = settle({"data": {"trigger": "sks", "class_word": "toy", "sets": [{"images": str(root)}]}})
    run = starting.start_config(tmp_path / "w", datasets.example_sets()[0], config)
    sets = runs.read_config(run).data.sets
    assert [(Path(one.images).name, one.trigger, one.repeats) for one in sets] == [
        ("10_sks cat", "sks", 10),
        ("30_zwx  dog", "zwx", 30),
    ]


def test_training_from_python_takes_the_layout_and_tells_it(root: Path, tmp_path: Path) -> None:
    config = settle({"data": {"images": str(root)}, "training": {"steps": 1}, "adapter": {"rank": 1}})
    events = list(train(config, folder=tmp_path / "run"))
    assert any(isinstance(event, Warned) and "10 repeats" in event.message for event in events)
    (started,) = [event for event in events if isinstance(event, Started)]
    assert [line.split(",")[0] for line in started.sets] == ["sks cat: 1 picture × 10", "zwx dog: 1 picture × 30"]
