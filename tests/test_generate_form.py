"""The Generate tab's plain functions: what its controls show is what is drawn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_gallery_index import put

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import images, shelf
from reparam_diffusion.gallery.recipe import Recipe, Use
from reparam_diffusion.jobs import locks, studio
from reparam_diffusion.models.schedulers import SCHEDULERS
from ui import generate_api, generate_view
from ui import generate_form as form
from ui.door import guarded
from ui.generate_acts import GenerateTab, change_picture, open_drawing, restore
from ui.generate_tab import build_generate_tab, open_with

STRENGTHS = st.integers(-300, 300).map(lambda n: n / 100)
WORDS = st.text("abcdefgh äß,.", min_size=1, max_size=30).map(lambda text: text.strip(" ,")).filter(bool)

PICTURE, MASK = Image.new("RGB", (60, 40), "teal"), Image.new("L", (60, 40), 255)
KEPT = [images.source_name(one) for one in (PICTURE, MASK)]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> GenerateTab:
    workspace = tmp_path_factory.mktemp("workspace")
    for name, facts in (("teddy", {"activation text": "sks toy", "preferred weight": 0.7}), ("style", {})):
        file = workspace / f"{name}.safetensors"
        file.write_bytes(name.encode())
        shelf.add(file, workspace, name=name, facts=facts)
    assert [images.keep_source(one, workspace) for one in (PICTURE, MASK)] == KEPT
    with gr.Blocks(analytics_enabled=False):
        return build_generate_tab(workspace)


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings that the page shows."""
    shown: list[str] = []
    monkeypatch.setattr(gr, "Warning", shown.append)
    return shown


def values_of(tab: GenerateTab, updates: form.Updates | None = None) -> dict[Any, Any]:
    """What the controls hold: their first values, changed by a handler's updates."""
    held = {control: control.value for control in tab.controls.inputs()}
    for control, update in (updates or {}).items():
        if control in held:
            held[control] = update.get("value", held[control]) if isinstance(update, dict) else update
            if isinstance(update, gr.ImageEditor):  # a picture without paint
                held[control] = None
    return held


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    uses = st.builds(
        Use, name=st.sampled_from(["teddy", "style"]), strength=STRENGTHS, te_strength=st.none() | STRENGTHS
    )
    return Recipe(
        prompt=" ".join(draw(WORDS).split()),
        negative=draw(WORDS),
        adapters=tuple(draw(st.lists(uses, max_size=8))),
        seed=draw(st.integers(0, 2**53)),
        steps=draw(st.integers(1, 1000)),
        guidance=draw(st.floats(0, 100)),
        scheduler=draw(st.sampled_from(list(SCHEDULERS))),
        width=draw(st.integers(8, 8192)),
        height=draw(st.integers(8, 8192)),
        clip_skip=draw(st.integers(0, 12)),
        vae=draw(st.sampled_from(["", "better"])),
        prediction_type=draw(st.sampled_from(["auto", "epsilon", "v_prediction"])),
        **draw(st.sampled_from([{}, {"image": KEPT[0]}, {"image": KEPT[0], "mask": KEPT[1], "denoise": 0.35}])),
    )


@given(before=recipes(), recipe=recipes())
def test_what_a_restored_recipe_shows_is_the_recipe_whatever_was_there(
    tab: GenerateTab, before: Recipe, recipe: Recipe
) -> None:
    held = values_of(tab, form.show_recipe(tab.controls, before, tab.workspace))
    updates = form.show_recipe(tab.controls, recipe, tab.workspace)
    held |= {control: values_of(tab, updates)[control] for control in updates if control in held}
    assert form.read_recipe(tab.controls, held, tab.workspace, seed=int(held[tab.controls.seed])) == recipe
    assert set(updates) <= set(tab.changing())


def test_an_adapter_that_is_off_is_left_out_and_a_tag_in_the_prompt_counts(tab: GenerateTab) -> None:
    held = values_of(tab, form.show_uses(tab.controls, [Use(name="teddy"), Use(name="style")], tab.workspace))
    held |= {tab.controls.prompt: "a toy <lora:teddy:0.3:0.1>", tab.controls.rows[0].on: False}
    recipe = form.read_recipe(tab.controls, held, tab.workspace, seed=1)
    assert recipe.prompt == "a toy"
    assert recipe.adapters == (Use(name="style"), Use(name="teddy", strength=0.1, te_strength=0.3))  # as in A1111


def test_adapters_beyond_the_rows_are_kept_in_the_prompt(tab: GenerateTab, warned: list[str]) -> None:
    uses = tuple(Use(name="teddy", strength=n / 10, te_strength=0.25) for n in range(form.MOST_ADAPTERS + 3))
    recipe = Recipe(prompt="a toy", negative="", steps=2, guidance=1.0, width=64, height=64, adapters=uses)
    file = images.save_picture(PICTURE, recipe.model_copy(update={"scheduler": "DDIM"}), tab.workspace / "many.png")
    held = values_of(tab, restore(tab, file))
    assert form.read_recipe(tab.controls, held, tab.workspace, seed=0).adapters == uses
    assert any("other 3" in text for text in warned)


def test_what_an_image_of_another_program_has_and_is_not_used_is_shown(tab: GenerateTab, warned: list[str]) -> None:
    note = PngInfo()
    tags = "<lora:teddy:0.3:1:lbw=X> <lora:gone:1>"
    note.add_text(
        "parameters", f"a cat {tags}\nSteps: 20, Sampler: LMS, Seed: 1, CFG scale: 7, Size: 512x512, Model: m"
    )
    PICTURE.save(tab.workspace / "other.png", pnginfo=note)
    held = values_of(tab, restore(tab, tab.workspace / "other.png"))
    assert held[tab.controls.rows[0].strength] == 1.0 and held[tab.controls.rows[0].te] == 0.3
    for words in ("lbw=", "LMS", "gone", "base model"):
        assert any(words in text for text in warned), words
    assert not any("<lora" in text for text in warned)  # toasts are HTML


def test_trying_an_adapter_starts_at_its_preferred_strength_with_words_that_call_it(tab: GenerateTab) -> None:
    updates = open_with(tab, ["teddy"])
    held = values_of(tab, updates)
    assert form.read_recipe(tab.controls, held, tab.workspace, seed=0).adapters == (Use(name="teddy", strength=0.7),)
    assert held[tab.controls.prompt] == "a 3d icon of sks toy on a pink background"
    assert open_with(tab, ["teddy"], "my words")[tab.controls.prompt] == "my words"
    assert set(updates) <= set(tab.changing())


def test_what_is_painted_takes_the_place_of_the_mask_that_was_there(tab: GenerateTab) -> None:
    start = tab.controls.start
    recipe = Recipe(prompt="a toy", image=KEPT[0], mask=KEPT[1], denoise=0.5)
    held = values_of(tab, form.show_recipe(tab.controls, recipe, tab.workspace))
    paint = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    held[start.editor] = {"background": PICTURE, "layers": [paint], "composite": None}
    assert form.read_recipe(tab.controls, held, tab.workspace, seed=0).mask == KEPT[1]  # nothing is painted yet
    paint.paste((15, 118, 110, 153), (10, 10, 20, 30))
    read = form.read_recipe(tab.controls, held, tab.workspace, seed=0)
    assert (read.image, read.denoise) == (KEPT[0], 0.5)
    _, mask = images.open_sources(read, tab.workspace)
    assert mask is not None and mask.convert("L").getbbox() == (10, 10, 20, 30)
    assert not form.read_recipe(tab.controls, held | {start.image: ""}, tab.workspace, seed=0).mask


def test_a_dropped_picture_brings_its_size_and_one_that_is_none_is_told(tab: GenerateTab, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 2000), "red").save(tmp_path / "photo.jpg")
    updates = change_picture(tab, tmp_path / "photo.jpg", "starter")
    assert (updates[tab.controls.width], updates[tab.controls.height]) == (160, 96)
    held = values_of(tab, updates)
    image, _ = images.open_sources(
        form.read_recipe(tab.controls, held | {tab.controls.prompt: "x"}, tab.workspace, seed=0), tab.workspace
    )
    assert image is not None and image.size == (3000, 2000)
    (tmp_path / "none.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"none\.jpg cannot be used"):
        change_picture(tab, tmp_path / "none.jpg", "starter")


def test_no_file_of_this_machine_is_taken_that_was_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "sent"))
    assert generate_api._sent({"path": str(tmp_path / "sent" / "a.png")}).name == "a.png"
    for path in (tmp_path / "a.png", tmp_path / "sent" / ".." / "a.png", "/etc/passwd", None):
        with pytest.raises(UserError, match="no file that was sent"):
            generate_api._sent({"path": path})


def test_an_empty_prompt_is_told(tab: GenerateTab) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        form.read_recipe(tab.controls, values_of(tab), tab.workspace, seed=0)


def test_nothing_that_a_person_wrote_becomes_markup(tab: GenerateTab) -> None:
    evil = '<img src=x onerror="alert(1)">'
    recipe = Recipe(prompt=evil)
    for request in (
        studio.Request(recipes=(recipe,), kind="sweep", about=evil, labels=(evil,)),
        studio.Request(recipes=(recipe,), kind="grid", about=evil, rows=(evil,), columns=(evil,)),
    ):
        state = studio.RequestState(state="failed", message=evil, warnings=(evil,))
        shown = generate_view.figures_of(tab.workspace, request, state, "")
        shown += generate_view.progress_of(request, state, is_cancelling=False, holder=Path(evil))
        assert "<img src=x" not in shown and "&lt;img" in shown


@pytest.mark.parametrize("name", ["../adapters/teddy.json", "/etc/passwd", "", "2026-01-01/none.png"])
def test_only_pictures_of_the_history_can_be_picked(tab: GenerateTab, name: str) -> None:
    assert generate_view.picked_picture(tab.workspace, name) is None


@pytest.mark.parametrize(("noted", "shown"), [(0, 0.0), (2.5, 2.0), (-7, -2.0), ("much", 1.0)])
def test_a_preferred_strength_is_taken_as_far_as_the_slider_goes(tmp_path: Path, noted: object, shown: float) -> None:
    put(tmp_path, "one", notes={"preferred weight": noted})
    assert form.use_of("one", tmp_path).strength == shown


def test_the_shelf_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Path] = []
    plain = shelf.list_adapters
    monkeypatch.setattr(
        shelf, "list_adapters", lambda workspace, **most: looks.append(workspace) or plain(workspace, **most)
    )
    folder = put(tmp_path, "one").parent
    assert form.adapter_choices(tmp_path) == form.adapter_choices(tmp_path) == [("None", ""), ("one", "one")]
    assert form.use_of("one", tmp_path) == Use(name="one") and form.trigger_of("runs/a/b.safetensors", tmp_path) == ""
    assert len(looks) == 1
    put(tmp_path, "two")
    os.utime(folder, ns=(1, 1))
    assert {stem for _, stem in form.adapter_choices(tmp_path)} == {"", "one", "two"}


def test_a_long_shelf_offers_its_newest_and_takes_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "MOST_OFFERED", 2)
    for age, stem in enumerate(("old", "newer", "newest")):
        os.utime(put(tmp_path, stem), ns=(age, age))
    assert form.adapter_choices(tmp_path) == [("None", ""), ("newest", "newest"), ("newer", "newer")]
    assert form.use_of("old", tmp_path) == Use(name="old")


def test_after_a_reload_the_form_is_as_it_was_asked_for(tab: GenerateTab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studio, "wake", lambda workspace, folder=None: None)
    recipe = Recipe(prompt="a red toy", adapters=(Use(name="teddy", strength=0.4),), seed=5, steps=7, width=96)
    recipes = tuple(recipe.model_copy(update={"seed": 5 + n}) for n in range(3))
    folder = studio.submit(tab.workspace, studio.Request(recipes=recipes))
    updates = open_drawing(tab, folder.name)
    held = values_of(tab, updates)
    shown = form.read_recipe(tab.controls, held, tab.workspace, seed=5)
    assert (shown.prompt, shown.adapters, shown.steps, shown.width) == ("a red toy", recipe.adapters, 7, 96)
    assert held[tab.controls.count] == 3 and updates[tab.drawing] == folder.name
    assert ("style", "style") in updates[tab.controls.rows[0].name]["choices"]
    assert set(updates) <= set(tab.changing())
    assert tab.controls.prompt not in open_drawing(tab, None)


def test_a_base_model_that_is_not_known_here_is_not_taken_over(
    tab: GenerateTab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(gr, "Warning", said.append)
    for model, is_taken in (("someones-mix-v3", False), ("starter", True), ("owner/model", True)):
        recipe = Recipe(prompt="a toy", steps=3, guidance=2, width=64, height=64, model=model)
        file = images.save_picture(Image.new("RGB", (8, 8)), recipe, tmp_path / "picture.png")
        assert (restore(tab, file)[tab.controls.model] == model) == is_taken
    assert len(said) == 1 and "someones-mix-v3" in said[0]


def test_no_program_waits_for_ever_and_is_told_in_plain_text(
    tab: GenerateTab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio, "wake", lambda workspace, folder=None: None)
    folder = studio.submit(tmp_path, studio.Request(recipes=(Recipe(prompt="a toy"),)))
    with locks.try_hold(studio.studio_lock(tmp_path)) as is_held:  # a studio that does not come to it
        assert is_held
        with pytest.raises(UserError, match=r"Not drawn within 0\.1 seconds"):
            generate_api._awaited(folder, tmp_path, patience=0.1)
    assert studio.is_asked(folder, "cancel")

    def mistaken() -> None:
        raise UserError('There is no "<b>".', do="Look & choose.")

    with pytest.raises(gr.Error) as told:
        guarded(mistaken, tmp_path, plain=True)()
    assert told.value.message == 'There is no "<b>". Look & choose.'
