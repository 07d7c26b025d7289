"""The gallery's list: quick through a cache that may be deleted, damaged or out of date without harm."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from safetensors.torch import save_file

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import catalog, index, shelf
from reparam_diffusion.gallery.report import report_lines, report_of
from ui import gallery_cards, gallery_look
from ui.gallery_tab import build_gallery_tab

SITE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
LEAVES = {
    "lora": ("lora_down.weight", "lora_up.weight"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
}


def put(
    workspace: Path, stem: str, *, method: str = "lora", rank: int = 4, notes: object = None, **header: str
) -> Path:
    """A tiny adapter on the shelf, as somebody might copy it there by hand."""
    file = shelf.shelf_of(workspace) / f"{stem}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    down, up = torch.ones(rank, 8), torch.ones(8, rank)
    tensors = {
        f"{SITE}.{leaf}": (down if leaf.endswith(("down.weight", "_b")) else up).clone() for leaf in LEAVES[method]
    }
    save_file(tensors | {f"{SITE}.alpha": torch.tensor(1.0)}, file, header or None)
    if notes is not None:
        file.with_suffix(".json").write_text(json.dumps(notes))
    return file


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose headers were read, as they are."""
    seen: list[str] = []

    def read(file: Path, once: Callable[[Path], index.Header] = index.read_header) -> index.Header:
        seen.append(file.name)
        return once(file)

    monkeypatch.setattr(index, "read_header", read)
    return seen


# --- the cache -------------------------------------------------------------------------------------------------------
def test_a_file_is_read_once_until_it_changes(tmp_path: Path, reads: list[str]) -> None:
    put(tmp_path, "a")
    put(tmp_path, "b", rank=2)
    first = catalog.list_entries(tmp_path)
    assert catalog.list_entries(tmp_path) == first
    assert sorted(reads) == ["a.safetensors", "b.safetensors"]
    put(tmp_path, "b", rank=3)
    changed = {entry.stem: entry.header for entry in catalog.list_entries(tmp_path)}
    assert changed["b"] is not None
    assert changed["b"].largest_rank == 3
    assert reads[2:] == ["b.safetensors"]


def test_what_left_the_shelf_leaves_the_cache(tmp_path: Path, reads: list[str]) -> None:
    file = put(tmp_path, "a")
    put(tmp_path, "b")
    catalog.list_entries(tmp_path)
    content = file.read_bytes()
    file.unlink()
    assert [entry.stem for entry in catalog.list_entries(tmp_path)] == ["b"]
    file.write_bytes(content)
    assert len(catalog.list_entries(tmp_path)) == 2
    assert reads.count("a.safetensors") == 2


@pytest.mark.parametrize("harm", ["deleted", "damaged", "damaged inside", "older", "a folder"])
def test_the_cache_may_come_to_any_harm(tmp_path: Path, harm: str) -> None:
    put(tmp_path, "a")
    before = catalog.list_entries(tmp_path)
    file = index.index_of(tmp_path)
    file.unlink()
    if harm == "damaged":
        file.write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)
    elif harm == "damaged inside":
        with closing(sqlite3.connect(file)) as foreign, foreign:
            foreign.execute(f"PRAGMA user_version = {index.VERSION}")
            foreign.execute("CREATE TABLE headers (name, size, time, header)")
            foreign.execute("INSERT INTO headers VALUES ('a.safetensors', 1, 1, '{\"nonsense\": 1}')")
    elif harm == "older":
        with closing(sqlite3.connect(file)) as old:
            old.execute("CREATE TABLE headers (something TEXT)")
    elif harm == "a folder":
        file.mkdir()
    assert catalog.list_entries(tmp_path) == before
    assert catalog.list_entries(tmp_path) == before


def test_a_look_with_little_time_shows_every_file_and_reads_on_at_the_next(tmp_path: Path) -> None:
    for stem in "abc":
        put(tmp_path, stem)
    assert [entry.header for entry in catalog.list_entries(tmp_path, seconds=0)] == [None, None, None]
    assert all(entry.header for entry in catalog.list_entries(tmp_path, seconds=60))
    assert all(entry.header for entry in catalog.list_entries(tmp_path, seconds=0))


def test_a_file_that_cannot_be_read_is_listed_with_the_reason(tmp_path: Path) -> None:
    put(tmp_path, "good")
    put(tmp_path, "bad").write_bytes(b"no adapter")
    headers = {entry.stem: entry.header for entry in catalog.list_entries(tmp_path)}
    assert headers["bad"] is not None and headers["good"] is not None
    assert "not a whole .safetensors file" in headers["bad"].problem
    assert headers["good"].problem == ""
    assert catalog.found_methods(catalog.list_entries(tmp_path)) == ["lora"]


def test_a_workspace_without_a_shelf_has_an_empty_list(tmp_path: Path) -> None:
    assert catalog.list_entries(tmp_path / "new") == []


# --- looking through it ----------------------------------------------------------------------------------------------
@pytest.fixture
def entries(tmp_path: Path) -> list[catalog.Entry]:
    xl = {"ss_base_model_version": "sdxl_base_v1-0", "ss_trigger_words": "ohwx man"}
    put(tmp_path, "teddy", notes={"name": "Brown Bear", "tags": ["toy"], "preferred weight": 0.7})
    put(tmp_path, "portrait", method="loha", rank=2, **xl)
    put(tmp_path, "straße", rank=60, notes={"name": "Élan", "activation text": "", "notes": "wants a low strength"})
    for age, stem in enumerate(("teddy", "portrait", "straße")):
        os.utime(shelf.at(stem, tmp_path), (1000 + age, 1000 + age))
    return catalog.list_entries(tmp_path)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", "straße portrait teddy"),
        ("BEAR", "teddy"),
        ("brown toy", "teddy"),
        ("brown portrait", ""),
        ("ohwx", "portrait"),
        ("loha", "portrait"),
        ("low strength", "straße"),
        ("STRASSE", "straße"),
        ("élan", "straße"),
        ("<script>", ""),
    ],
)
def test_search_finds_every_word_anywhere_in_any_case(entries: list[catalog.Entry], query: str, found: str) -> None:
    assert [entry.stem for entry in catalog.search(entries, query)] == found.split()


@pytest.mark.parametrize(
    ("order", "first"),
    [("newest", "straße"), ("oldest", "teddy"), ("name", "teddy"), ("largest", "straße")],
)
def test_each_order_begins_with_its_first(entries: list[catalog.Entry], order: str, first: str) -> None:
    ordered = catalog.sort(entries, order)
    assert ordered[0].stem == first
    assert len(ordered) == 3


def test_an_unknown_order_names_those_that_there_are(entries: list[catalog.Entry]) -> None:
    with pytest.raises(UserError, match="newest, oldest, name, largest"):
        catalog.sort(entries, "best")


def test_filters_choose_among_what_is_there(entries: list[catalog.Entry]) -> None:
    assert catalog.found_methods(entries) == ["loha", "lora"]
    assert catalog.found_bases(entries) == ["sdxl", "unknown"]
    assert [entry.stem for entry in catalog.keep(entries, base="sdxl")] == ["portrait"]
    assert [entry.stem for entry in catalog.keep(entries, base="sdxl", method="lora")] == []


def test_a_persons_word_comes_before_the_files(entries: list[catalog.Entry]) -> None:
    told = {entry.stem: (entry.trigger, entry.strength, entry.tags) for entry in entries}
    assert told == {
        "teddy": ("", 0.7, ["toy"]),
        "portrait": ("ohwx man", 1.0, []),
        "straße": ("", 1.0, []),  # a person emptied it
    }


@pytest.mark.parametrize("nonsense", [[], 5, "x", {"name": 5, "tags": {"a": 1}, "preferred weight": [], "notes": None}])
def test_notes_of_any_kind_are_listed(tmp_path: Path, nonsense: object) -> None:
    put(tmp_path, "a", notes=nonsense)
    (entry,) = catalog.search(catalog.list_entries(tmp_path), "a")
    assert (entry.name, entry.tags, entry.strength, entry.trigger) == ("a", [], 1.0, "")


# --- how quick it is -------------------------------------------------------------------------------------------------
def test_two_thousand_adapters_are_listed_and_told_how_quickly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = put(tmp_path, "a0", notes={"name": "A", "notes": "x" * 200})
    for number in range(1, 2000):
        for ending in (".safetensors", ".json"):
            os.link(shelf.companion(first, ending), first.with_name(f"a{number}{ending}"))
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        assert len(catalog.search(catalog.list_entries(tmp_path), "lora")) == 2000
        seconds.append(time.perf_counter() - begun)
    with capsys.disabled():
        sys.stdout.write(f"\n2,000 adapters: {seconds[0]:.2f} s cold, {seconds[1]:.2f} s warm\n")


@pytest.mark.parametrize("steps", ["²", "9" * 5000, "-3", "many", ""])
def test_a_count_of_steps_that_is_none_is_left_out(tmp_path: Path, steps: str) -> None:
    report = report_of(put(tmp_path, "odd", ss_steps=steps, ss_network_module="some.tool"))
    assert not any(line.startswith("Trained") for line in report_lines(report))
    assert "Trained" not in gallery_cards.head_of(catalog.entry_at(shelf.at("odd", tmp_path), tmp_path), report)


@pytest.mark.parametrize(("noted", "used"), [(0, 0.0), (2.5, 2.5), ("0.5", 0.5), (None, 1.0), ("strong", 1.0)])
def test_a_preferred_strength_of_zero_is_a_strength(tmp_path: Path, noted: object, used: float) -> None:
    file = put(tmp_path, "one", notes={"preferred weight": noted})
    assert catalog.entry_at(file, tmp_path).strength == used
    assert gallery_look.notes_of(shelf.shelved_at(file))["preferred weight"] == used


def test_what_was_typed_stays_though_an_older_look_comes_in_late(tmp_path: Path) -> None:
    put(tmp_path, "one", notes={"name": "One", "notes": "red"})
    with gr.Blocks(analytics_enabled=False):
        tab = build_gallery_tab(tmp_path)
    values: dict[Any, Any] = {control: getattr(control, "value", None) for control in tab.asked()}
    older = dict(values)  # nothing is chosen yet
    chosen = gallery_look.look(tmp_path, tab, values, news={tab.selected: "one"})
    values |= {control: chosen[control] for control in tab.asked() & chosen.keys() - {tab.base, tab.method}}
    name, notes = tab.fields["name"], tab.fields["notes"]
    assert (values[name], values[notes]) == ("One", "red")
    values |= {tab.shown: gallery_look.look(tmp_path, tab, older)[tab.shown], name: "Mimi"}
    updates = gallery_look.look(tmp_path, tab, values)
    assert tab.head in updates and name not in updates  # the details anew, and not over what was typed
    shelf.edit("one", tmp_path, {"notes": "blue", "name": "Other"})
    updates = gallery_look.look(tmp_path, tab, values)
    assert (updates[notes], name in updates) == ("blue", False)
