"""Drafts: captions, masks and choices belong to a file's content, and what the page shows is what a run gets."""

from __future__ import annotations

import html
import json
import re
import shutil
import tempfile
from pathlib import Path

import gradio as gr
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from PIL import Image

from reparam_diffusion.data.captions import replace_words
from reparam_diffusion.data.images import find_pictures
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import datasets, drafts
from ui import fragments
from ui.pictures import forget_words, show_draft

NAMES = ("a.png", "b.png", "c.png", "A.jpg")


def upload(home: Path, name: str, content: bytes) -> Path:
    """A file as a browser sends it: in a folder of its own."""
    file = Path(tempfile.mkdtemp(dir=home)) / name
    file.write_bytes(content)
    return file


def picture(home: Path, name: str, number: int) -> Path:
    file = Path(tempfile.mkdtemp(dir=home)) / name
    Image.new("RGB", (32, 32), (number, 90, 10)).save(file, quality=95)
    return file


def shown_by_page(workspace: Path, draft: str) -> list[str]:
    """The captions in the page, in order."""
    rows = show_draft(workspace, draft)[-1]
    return [html.unescape(text) for text in re.findall(r"<textarea[^>]*>(.*?)</textarea>", rows, re.DOTALL)]


def got_by_run(workspace: Path, draft: str) -> list[str]:
    """The captions of the dataset that Start makes of the draft, in the draft's order."""
    chosen = drafts.known(draft, workspace)
    folder = datasets.add_dataset(chosen, workspace)
    by_hash = {one.hash: one for one in find_pictures(folder, least_side=32)[0]}
    found = [by_hash.pop(one.hash) for one in chosen.pictures]
    assert not by_hash, "a run gets nothing that is left out"
    assert [one.mask is not None for one in found] == [one.mask is not None for one in chosen.pictures]
    return [one.caption or "" for one in found]


class Drafts(RuleBasedStateMachine):
    """Random adding, typing, leaving out, reloading, two browsers; `typed` and `out` are what they must lead to."""

    @initialize()
    def begin(self) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.workspace = self.home / "workspace"
        self.files = [picture(self.home, name, 40 * number) for number, name in enumerate(NAMES)]
        self.draft: str | None = None
        self.typed: dict[int, str] = {}
        self.out: set[int] = set()
        self.inside: list[int] = []

    def teardown(self) -> None:
        if hasattr(self, "home"):
            shutil.rmtree(self.home)

    def name_in_draft(self, number: int) -> str:
        """What the draft calls a file, found by its content."""
        draft = drafts.read_draft(self.draft, self.workspace)
        assert draft is not None
        raw = self.files[number].read_bytes()
        return next(entry.image.path.name for entry in draft.entries if entry.image.path.read_bytes() == raw)

    @rule(numbers=st.lists(st.integers(0, len(NAMES) - 1), min_size=1, unique=True), text=st.none() | st.just("told"))
    def add(self, numbers: list[int], text: str | None) -> None:
        """In any order, again and again; sometimes with a caption file, which wins where it is new."""
        files = [self.files[number] for number in numbers]
        if text:
            files.append(upload(self.home, Path(NAMES[numbers[0]]).stem + ".txt", text.encode()))
        known = drafts.read_draft(self.draft, self.workspace)
        given = {entry.image.hash: entry.given for entry in known.entries} if known else {}
        self.draft = drafts.add_files(files, self.workspace, self.draft)
        after = drafts.read_draft(self.draft, self.workspace)
        assert after is not None
        self.inside += [number for number in numbers if number not in self.inside]
        for number in numbers[:1] if text else []:
            name = self.name_in_draft(number)
            entry = next(entry for entry in after.entries if entry.image.path.name == name)
            if entry.image.hash not in given and number in self.typed:
                self.typed[number] = entry.image.caption or ""  # recalled, or the file's where nothing was given before
                assert self.typed[number] in ("told", *self.typed.values())
            elif given.get(entry.image.hash) != "told":
                self.typed[number] = "told"

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), text=st.text(max_size=20))
    def type_caption(self, data: st.DataObject, text: str) -> None:
        number = data.draw(st.sampled_from([one for one in self.inside if one not in self.out]))
        chosen = drafts.set_caption(str(self.draft), self.workspace, self.name_in_draft(number), text)
        image = next(one for one in chosen.pictures if one.path.name == self.name_in_draft(number))
        self.typed[number] = image.caption or ""

    @precondition(lambda self: len(self.inside) - len(self.out) > 1)
    @rule(data=st.data())
    def leave_out(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from([one for one in self.inside if one not in self.out]))
        drafts.leave_out(str(self.draft), self.workspace, self.name_in_draft(number))
        self.out.add(number)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.out)))
        drafts.put_back(str(self.draft), self.workspace, self.name_in_draft(number))
        self.out.remove(number)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def open_second_browser(self, data: st.DataObject) -> None:
        """The same files, in another order, in a browser that knows nothing of the draft."""
        order = data.draw(st.permutations(self.inside))
        self.draft = drafts.add_files([self.files[number] for number in order], self.workspace)
        self.inside = list(order)

    @precondition(lambda self: self.draft)
    @invariant()
    def compare(self) -> None:
        assert self.draft is not None
        used = [number for number in self.inside if number not in self.out]
        shown = shown_by_page(self.workspace, self.draft)
        assert shown == [self.typed.get(number, "") for number in used]
        assert got_by_run(self.workspace, self.draft) == shown


Drafts.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
TestDrafts = Drafts.TestCase


# --- one by one -------------------------------------------------------------------------------------------------------
def test_a_caption_file_that_comes_before_or_after_its_image_finds_it(tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    name = drafts.add_files([picture(tmp_path, "a.png", 1), upload(tmp_path, "b.txt", b"of b")], workspace)
    assert [bad.path.name for bad in drafts.known(name, workspace).refused] == ["b.txt"]
    drafts.add_files([picture(tmp_path, "b.png", 2)], workspace, name)
    drafts.add_files([upload(tmp_path, "a.TXT", b"of a")], workspace, name)
    drafts.add_files([upload(tmp_path, "a-masklabel.png", picture(tmp_path, "m.png", 9).read_bytes())], workspace, name)
    chosen = drafts.known(name, workspace)
    assert [one.caption for one in chosen.pictures] == ["of a", "of b"] and chosen.refused == ()
    assert [one.mask is not None for one in chosen.pictures] == [True, False]
    assert shown_by_page(workspace, name) == got_by_run(workspace, name)


def test_folders_dropped_one_by_one_keep_their_captions_apart(tmp_path: Path) -> None:
    workspace, name = tmp_path / "w", None
    for number, text in enumerate([b"a cat", b"a dog"]):
        files = [picture(tmp_path, "image1.png", number), upload(tmp_path, "image1.txt", text)]
        name = drafts.add_files(files, workspace, name)
    assert [one.caption for one in drafts.known(str(name), workspace).pictures] == ["a cat", "a dog"]
    assert got_by_run(workspace, str(name)) == ["a cat", "a dog"]


def test_the_same_folder_again_keeps_what_was_typed_and_a_changed_file_wins(tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    files = [picture(tmp_path, "a.png", 1), upload(tmp_path, "a.txt", b"first")]
    name = drafts.add_files(files, workspace)
    drafts.set_caption(name, workspace, "a.png", "typed")
    drafts.add_files([*files, picture(tmp_path, "b.png", 2)], workspace, name)
    assert shown_by_page(workspace, name) == ["typed", ""]
    drafts.add_files([files[0], upload(tmp_path, "a.txt", b"second")], workspace, name)
    assert shown_by_page(workspace, name) == ["second", ""]


def test_files_that_cannot_be_used_leave_the_draft_as_it_was(tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    with pytest.raises(UserError, match="None of the pictures"):
        drafts.add_files([upload(tmp_path, "a.txt", b"alone")], workspace)
    assert not list((workspace / "datasets" / ".drafts").glob("*"))
    name = drafts.add_files([picture(tmp_path, "a.png", 1)], workspace)
    drafts.add_files([upload(tmp_path, "bad.png", b"no image")], workspace, name)
    chosen = drafts.known(name, workspace)
    assert len(chosen.pictures) == 1 and [bad.path.name for bad in chosen.refused] == ["bad.png"]


def test_new_images_replace_an_example_and_its_words_but_not_those_of_the_user(tmp_path: Path) -> None:
    examples = datasets.example_sets()
    about = examples[0].about
    name = drafts.keep(examples[0], tmp_path, is_example=True)
    drafts.set_caption(name, tmp_path, "01.png", "typed")
    old = drafts.read_draft(name, tmp_path)
    assert forget_words(old, examples, [about.trigger, "robot"]) == ["", gr.skip()]
    new = drafts.add_files([picture(tmp_path, "a.png", 1)], tmp_path, name)
    assert new != name and len(drafts.known(new, tmp_path).pictures) == 1
    assert forget_words(drafts.read_draft(new, tmp_path), examples, [about.trigger, "robot"]) == [gr.skip(), gr.skip()]


def test_another_trigger_word_is_shown_in_the_captions_as_it_is_trained(tmp_path: Path) -> None:
    name = drafts.keep(datasets.example_sets()[0], tmp_path)
    before = shown_by_page(tmp_path, name)
    drafts.set_words(name, tmp_path, trigger="zwx", class_word="bear")
    after = shown_by_page(tmp_path, name)
    assert after == [text.replace("sks toy", "zwx bear") for text in before] and after != before
    assert got_by_run(tmp_path, name) == after


def test_a_draft_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    name = drafts.keep(datasets.example_sets()[0], tmp_path)
    file = drafts.folder_of(name, tmp_path) / "draft.json"
    kept = json.loads(file.read_text())
    for row in kept["pictures"]:
        for key in ("given", "is_left_out", "encoding", "given_name"):
            del row[key]
    del kept["is_example"]
    file.write_text(json.dumps(kept))
    assert len(drafts.known(name, tmp_path).pictures) == 6
    assert "removed" not in fragments.strip_of(drafts.leave_out(name, tmp_path, "01.png")).replace(", 1 removed", "")


@pytest.mark.parametrize(
    ("text", "old", "new", "expected"),
    [
        ("a sks toy, sks toys", "sks toy", "zwx cat", "a zwx cat, sks toys"),
        ("concatenate a cat; cat's cats", "cat", "dog", "concatenate a dog; dog's cats"),
        ("ein Bär und Bären", "Bär", "Hund", "ein Hund und Bären"),
        ("Ba\u0308r und Bar", "Bar", "x", "Bär und x"),
        ("ein Ba\u0308r", "Bär", "Hund", "ein Hund"),
        ("кот и котик", "кот", "пёс", "пёс и котик"),
        ("一只sks在草地上", "sks", "zwx", "一只zwx在草地上"),
        ("黒猫と猫が", "猫", "犬", "黒猫と犬が"),
        ("sks  toy sks_toy", "sks toy", "a\\1", "a\\1 sks_toy"),
        ("sks2 sks", "sks", "", "sks2 "),
        ("anything", "", "x", "anything"),
    ],
)
def test_words_are_replaced_as_whole_words(text: str, old: str, new: str, expected: str) -> None:
    assert replace_words(text, old, new) == expected
