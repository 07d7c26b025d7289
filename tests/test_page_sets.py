"""Masks and further sets in the page: the table's rows, what Start copies, what a draft keeps, and a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest
from page_browser import Open, Served, serve_page
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from run_folders import wait_for
from tiny_pipelines import save_pictures

from reparam_diffusion.config import DatasetSettings, parse_set, read_settings, settle, to_toml
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import datasets, drafts, presets, runs
from ui import sets, starting
from ui.advanced import as_file, draw_advanced, from_file
from ui.form import Form

FULL = DatasetSettings(
    images="/p/one", trigger="zwx", class_word="", weight=0.5, repeats=3, masks="alpha", unmasked_weight=0.0,
    caption_template="a photo of {trigger}", kind="style", flip=False,
)  # fmt: skip
LEAN = DatasetSettings(images="/p/two")
SETS = {
    "data": {"trigger": "sks", "masks": "beside", "sets": [one.model_dump(exclude_none=True) for one in (FULL, LEAN)]}
}


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> Form:
    """The page's own form, without the page."""
    form = Form()
    with gr.Blocks(analytics_enabled=False):
        form.keep("method", gr.Radio(["lora"]))
        for place in ("data.kind", "data.trigger", "data.class_word"):
            form.keep(place, gr.Textbox())
        draw_advanced(form, tmp_path_factory.mktemp("workspace"))
    return form


# --- the table --------------------------------------------------------------------------------------------------------
def test_every_set_comes_back_from_its_row_and_from_files_and_presets(form: Form, tmp_path: Path) -> None:
    config = settle(SETS)
    assert config.data.sets == [FULL, LEAN]
    shown = starting.shown_of(config)
    assert settle(starting.layer_of(form.settings(shown))) == config
    file = tmp_path / "settings.toml"
    file.write_text(as_file(form.settings(shown)), encoding="utf-8")
    assert settle(read_settings(file)) == config
    assert settle(parse_set([])) == settle(starting.layer_of(form.settings(starting.shown_of(settle({})))))
    assert from_file(str(file))["data.sets"] == shown["data.sets"]
    name = presets.save(config, tmp_path, title="Two sets")
    assert starting.settled(tmp_path, name, "subject", "lora").data.sets == [FULL, LEAN]
    assert "[[data.sets]]" in to_toml(config)


def test_empty_rows_are_ignored_and_empty_cells_take_the_main_sets(form: Form) -> None:
    width = len(sets.COLUMNS)
    rows = [[""] * width, ["/p/one", "-", None, " 0.5 ", *[""] * (width - 4)], [None] * width]
    found = settle(starting.layer_of(form.settings({"method": "lora", "data.sets": rows}))).data.sets
    assert found == [DatasetSettings(images="/p/one", trigger="", weight=0.5)]
    assert sets.with_a_row(None) == [[""] * width]
    assert sets.with_a_row(rows)[:-1] == rows


@pytest.mark.parametrize(
    ("column", "text", "words"),
    [("weight", "much", "must be a number"), ("weight", "0", "more than 0"), ("flip", "perhaps", "true or false"),
     ("kind", "toy", "must be one of"), ("repeats", "1.5", "whole number")],
)  # fmt: skip
def test_a_mistake_in_a_cell_is_told_at_the_table(form: Form, column: str, text: str, words: str) -> None:
    row = ["/p/one" if name == "images" else text if name == column else "" for name in sets.COLUMNS]
    with pytest.raises(UserError, match=words) as told:
        settle(starting.layer_of(form.settings({"method": "lora", "data.sets": [row]})))
    assert told.value.place == f"data.sets.0.{column}"
    place = starting.at_control(told.value.place, "lora")
    (update,) = form.marked(place, "wrong").values()
    assert update["label"] == "⚠ wrong"
    assert starting.at_control("training.betas.1", "lora") == "training.betas"


# --- drafts and Start -------------------------------------------------------------------------------------------------
def uploads(folder: Path) -> list[Path]:
    """Files as a browser sends them: each in a folder of its own; a mask for the first picture."""
    files = []
    for number, (name, colour) in enumerate(
        [("My Dog.png", "red"), ("b.jpg", "blue"), ("My Dog-masklabel.png", "white")]
    ):
        place = folder / str(number)
        place.mkdir(parents=True)
        Image.new("RGB", (64, 48), colour).save(place / name)
        files.append(place / name)
    return files


def test_a_dropped_mask_stays_with_its_picture_through_draft_start_and_again(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting.queue, "submit", lambda run: None)
    chosen = datasets.sort_files(uploads(tmp_path / "up"))
    assert [(one.path.name, one.mask and one.mask.name) for one in chosen.pictures] == [
        ("My Dog.png", "My Dog-masklabel.png"),
        ("b.jpg", None),
    ]
    name = drafts.keep(chosen, tmp_path)
    kept = drafts.read(name, tmp_path)
    assert kept is not None
    assert [one.mask and one.mask.name for one in kept.pictures] == ["my-dog-masklabel.png", None]
    values = form.settings(starting.shown_of(settle({"data": {"trigger": "sks", "masks": "beside"}})))
    with pytest.raises(UserError, match=r"1 of 2 pictures has no mask: b\.jpg") as told:
        starting.start_run(tmp_path, kept, values)
    assert told.value.place == "data.masks"
    left = drafts.leave_out(name, tmp_path, "b.jpg")
    run = starting.start_run(tmp_path, left, values)
    folder = Path(str(runs.read_config(run).data.images))
    assert {file.name for file in folder.iterdir()} == {"my-dog.png", "my-dog-masklabel.png", "dataset.toml"}
    draft, shown = starting.again(tmp_path, run)
    again = drafts.read(draft, tmp_path)
    assert again is not None and again.pictures[0].mask is not None
    assert shown["data.masks"] == "beside"


def test_a_folder_of_masks_is_copied_beside_the_pictures(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting.queue, "submit", lambda run: None)
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("My Dog.png", "b.png"):
        Image.new("L", (64, 48), 255).save(masks / name)
    chosen = drafts.known(drafts.keep(datasets.sort_files(uploads(tmp_path / "up")[:2]), tmp_path), tmp_path)
    values = form.settings(starting.shown_of(settle({"data": {"trigger": "sks", "masks": str(masks)}})))
    config = runs.read_config(starting.start_run(tmp_path, chosen, values))
    assert config.data.masks == "beside"
    copied = {file.name for file in Path(str(config.data.images)).glob("*-masklabel*")}
    assert copied == {"my-dog-masklabel.png", "b-masklabel.png"}


def test_a_wrong_folder_of_a_further_set_is_told_before_anything_is_made(form: Form, tmp_path: Path) -> None:
    values = form.settings(starting.shown_of(settle(SETS)))
    with pytest.raises(UserError, match="There is no folder /p/one") as told:
        starting.start_run(tmp_path, datasets.example_sets()[0], values)
    assert told.value.place == "data.sets.0.images"
    assert list(tmp_path.iterdir()) == []


# --- in a browser -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def served(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_page(tmp_path_factory.mktemp("page")) as served:
        yield served


def write(page: Page, column: int, text: str) -> None:
    """Type into a cell of the first row, once it is open: keys pressed before go beside it."""
    cell = page.locator(f"#sets [data-row='0'][data-col='{column}']").first
    cell.dblclick()
    editor = cell.locator("textarea, input").first
    expect(editor).to_be_focused()
    editor.fill(text)
    editor.press("Enter")
    expect(cell).to_have_text(re.compile(rf"^\s*{re.escape(text)}\s*⋮?\s*$"))  # ⋮ opens the row's menu


@pytest.mark.page
def test_a_second_set_is_added_told_when_wrong_and_trained_on(opened: Open, served: Served, tmp_path: Path) -> None:
    more = save_pictures(tmp_path / "more", count=1, size=(64, 64))
    page = opened()
    page.get_by_role("button", name="Teddy bear").click()
    expect(page.get_by_text("6 pictures ready, 6 with a caption.")).to_be_visible()
    page.get_by_role("button", name="Advanced settings").click()
    page.get_by_role("tab", name="Pictures").click()
    page.get_by_role("button", name="Add a set of pictures").click()
    write(page, 0, str(tmp_path / "nowhere"))
    write(page, 1, "zwx")
    write(page, 3, "0.5")
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#trouble")).to_contain_text("There is no folder")
    expect(page.locator("#sets")).to_contain_text("⚠ There is no folder")
    write(page, 0, str(more))
    expect(page.locator("#sets")).not_to_contain_text("⚠")
    page.get_by_role("button", name="Start training").click()
    wait_for(lambda: any((served.workspace / "runs").glob("*/config.toml")), seconds=120)
    (run,) = (served.workspace / "runs").iterdir()
    (found,) = runs.read_config(run).data.sets
    assert (found.images, found.trigger, found.weight) == (str(more), "zwx", 0.5)
