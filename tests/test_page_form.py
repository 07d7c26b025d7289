"""The page's plain functions: controls from settings, pieces of HTML, and who may reach the page."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import UnionType
from typing import get_origin

import gradio as gr
import pytest
from pydantic.fields import FieldInfo

import app
from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import TrainingSettings, find_preset, settle
from reparam_diffusion.data.images import Picture, Refused
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Sampled, Validated
from reparam_diffusion.jobs import datasets, drafts, presets, runs
from reparam_diffusion.jobs.fold import RunState
from reparam_diffusion.jobs.overview import Overview
from ui import fragments, plot, run_fragments, starting
from ui.advanced import draw_advanced
from ui.door import guarded, page_log
from ui.form import Form


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_has_a_control_with_its_default_and_help(name: str) -> None:
    spec = METHODS[name].spec()
    form = Form()
    with gr.Blocks(analytics_enabled=False):
        form.add(spec, f"adapter.{name}")
    fields = {key: field for key, field in type(spec).model_fields.items() if key != "method"}
    assert list(form.controls) == [f"adapter.{name}.{key}" for key in fields]
    for key, field in fields.items():
        control = form.controls[f"adapter.{name}.{key}"]
        assert (control.value, control.info) == (getattr(spec, key), field.description)


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


def test_every_setting_of_a_run_has_a_control_but_the_pictures(form: Form) -> None:
    config = settle({})
    places = {place for place in starting.shown_of(config) if not place.startswith("adapter.")}
    assert places <= set(form.controls)
    for name, method in METHODS.items():
        assert {f"adapter.{name}.{field}" for field in method.spec.model_fields if field != "method"} <= set(
            form.controls
        )


def test_what_the_form_shows_settles_to_the_presets_own_config(form: Form, tmp_path: Path) -> None:
    for _, preset in presets.choices(tmp_path):
        for name in METHODS:
            config = starting.settled(tmp_path, preset, "subject", name)
            back = settle(starting.layer_of(form.settings(starting.shown_of(config))))
            assert back == config.model_copy(update={"title": "", "about": ""})


def test_lists_pairs_and_rules_come_back_from_text_as_they_were(form: Form) -> None:
    config = settle(
        {
            "targets": {
                "unet": ["unet.*attn2*", "unet.mid_block.*"],
                "text_encoder": ["te1.*q_proj"],
                "rules": [
                    {"match": "*attn2*", "adapter": {"method": "lokr", "factor": 4, "decompose_both": True}},
                    {"match": "*", "adapter": {"method": "oft", "side": "input"}},
                ],
            },
            "training": {"betas": [0.8, 0.999]},
            "output": {"sample_prompts": ["a photo of {trigger}, red", "another, of {class}"]},
        }
    )
    assert settle(starting.layer_of(form.settings(starting.shown_of(config)))) == config


@pytest.mark.parametrize(
    ("place", "text", "words"),
    [
        ("targets.rules", "*attn2*", "names no method"),
        ("targets.rules", "*attn2* lokr factor=no", "factor"),
        ("targets.rules", "*attn2* magic", "no method called"),
        ("training.betas", "0.9", "betas"),
        ("training.betas", "0.9, x", "betas"),
    ],
)
def test_a_text_that_is_no_setting_is_told_with_its_place(form: Form, place: str, text: str, words: str) -> None:
    shown = {**starting.shown_of(settle({})), place: text}
    with pytest.raises(UserError, match=words) as told:
        settle(starting.layer_of(form.settings(shown)))
    assert told.value.place.startswith(place)


def shown_and_used(form: Form, place: str, typed: object) -> object:
    """What a run gets where a control shows `typed`; raises UserError where it is refused."""
    method = place.split(".")[1] if place.startswith("adapter.") else "lora"
    values = starting.shown_of(settle({"adapter": {"method": method}, "data": {"trigger": "sks"}}))
    value = form.controls[place].preprocess(typed)
    config = settle(starting.layer_of(form.settings(values | {place: value})))
    return starting.shown_of(config)[place]


def wrong_values(field: FieldInfo) -> list[object]:
    """Nothing, and numbers that a person may type by mistake."""
    values: list[object] = [None]
    if field.annotation is int:
        values += [1.5, 0.25, -0.5]
    if field.annotation in (int, float):
        values += [-1e9, -1, 0, 1, 2, 1e12]
    if field.annotation is str or get_origin(field.annotation) is UnionType:
        values = ["", "  ", "something"]
    return values


def test_every_field_of_the_form_is_used_as_it_is_shown_or_refused_at_its_place(form: Form) -> None:
    refused = 0
    for place, field in form.fields.items():
        for typed in wrong_values(field):
            if isinstance(form.controls[place], gr.Textbox | gr.Dataframe) and typed is None:
                continue
            try:
                used = shown_and_used(form, place, typed)
            except UserError as error:
                refused += 1
                method = place.split(".")[1] if place.startswith("adapter.") else "lora"
                assert starting.at_control(error.place, method) == place, (place, typed, error)  # noqa: PT017
                continue
            if isinstance(typed, str):
                assert str(used).strip() == typed.strip(), (place, typed, used)
            else:
                assert used == typed and typed is not None, (place, typed, used)
    assert refused > 150


@pytest.mark.parametrize(("place", "typed"), [("training.learning_rate", None), ("training.steps", 1.5)])
def test_an_emptied_or_fractional_number_is_not_replaced_in_silence(form: Form, place: str, typed: object) -> None:
    with pytest.raises(UserError, match=place) as told:
        shown_and_used(form, place, typed)
    assert told.value.place == place


def test_an_emptied_setting_of_another_method_does_not_matter(form: Form) -> None:
    values = starting.shown_of(settle({"data": {"trigger": "sks"}}))
    assert settle(starting.layer_of(form.settings(values | {"adapter.loha.rank": None}))).adapter.method == "lora"


def test_presets_of_one_base_model_are_one_choice(tmp_path: Path) -> None:
    choices = dict(presets.choices(tmp_path))
    assert next(iter(choices.values())) == presets.FIRST
    assert choices["Quick"] == "quick"
    assert not [name for name in choices.values() if name.endswith(("-subject", "style"))]
    assert choices["Stable Diffusion 1.5 and 2.x"] == "sd15"
    assert starting.settled(tmp_path, "sd15", "subject", "oft").adapter.method == "oft"
    steps = find_preset("sd15-lora")["training"]["steps"]
    assert starting.settled(tmp_path, "sd15", "subject", "lora").training.steps == steps


def test_a_saved_preset_keeps_everything_but_what_belongs_to_one_run(tmp_path: Path) -> None:
    config = settle(
        {
            "adapter": {"method": "lokr", "factor": 3},
            "data": {"images": "/home/me/secret", "trigger": "sks", "class_word": "toy", "flip": True},
            "output": {"name": "mine"},
        }
    )
    name = presets.save(config, tmp_path, title="My <b> preset")
    assert ("My <b> preset (yours)", name) in presets.choices(tmp_path)
    back = starting.settled(tmp_path, name, "style", "lora")
    assert (back.adapter, back.data.flip) == (config.adapter, True)
    assert (back.data.images, back.data.trigger, back.output.name) == ("", "", "")
    binned = presets.remove(name, tmp_path)
    assert binned.is_file() and name not in dict(presets.choices(tmp_path)).values()
    with pytest.raises(UserError, match="comes with the program"):
        presets.remove("quick", tmp_path)
    for hostile in ("mine/../../etc/passwd", "mine/", "mine/nothing"):
        with pytest.raises(UserError, match="no preset"):
            presets.layers(hostile, tmp_path, kind="subject", method="lora")


def test_a_new_default_reaches_only_controls_that_nobody_touched() -> None:
    form = Form()
    with gr.Blocks(analytics_enabled=False):
        form.add(TrainingSettings(), "training", ["steps", "batch"])
    before, after = {"training.steps": 500, "training.batch": 1}, {"training.steps": 300, "training.batch": 4}
    updates = form.refreshed({"training.steps": 42, "training.batch": 1}, before, after)
    assert list(updates) == [form.controls["training.batch"]]


def test_starting_makes_a_run_of_what_the_page_shows(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lined_up: list[Path] = []
    monkeypatch.setattr(starting.queue, "submit", lined_up.append)
    teddy = datasets.example_sets()[0]
    values = starting.shown_of(settle({}))
    values |= {"data.trigger": " zwx ", "data.class_word": "toy", "training.steps": 7, "adapter.lora.rank": 3}
    run = starting.start_run(tmp_path, teddy, form.settings(values | {"adapter.loha.rank": 99}))
    config = runs.read_config(run)
    assert lined_up == [run]
    assert (config.training.steps, config.adapter.model_dump()["rank"]) == (7, 3)
    captions = [file.read_text() for file in Path(str(config.data.images)).glob("*.txt")]
    assert len(captions) == 6
    assert all("zwx toy" in caption and "sks" not in caption for caption in captions)
    draft, shown = starting.again(tmp_path, run)
    again = drafts.read(draft, tmp_path)
    assert again is not None and sorted(str(p.caption) for p in again.pictures) == sorted(c.strip() for c in captions)
    assert (shown["training.steps"], shown["adapter.lora.rank"], shown["data.trigger"]) == (7, 3, "zwx")


@pytest.mark.parametrize(
    ("chosen", "change", "told_as"),
    [
        (False, {}, ("no pictures", "")),
        (True, {"data.trigger": "  "}, ("trigger word", "data.trigger")),
        (True, {"training.steps": 0}, ("steps", "training.steps")),
        (True, {"adapter.lora.rank": 0}, ("rank", "adapter.rank")),
    ],
)
def test_what_is_missing_is_told_before_anything_is_made(
    form: Form, tmp_path: Path, chosen: bool, change: dict[str, object], told_as: tuple[str, str]
) -> None:
    words, place = told_as
    values = form.settings(starting.shown_of(settle({"data": {"trigger": "sks"}})) | change)
    with pytest.raises(UserError, match=words) as told:
        starting.start_run(tmp_path, datasets.example_sets()[0] if chosen else None, values)
    assert told.value.place == place
    assert list(tmp_path.iterdir()) == []


# --- drafts ----------------------------------------------------------------------------------------------------------
def test_a_draft_outlives_the_page_with_its_captions_and_refusals(tmp_path: Path) -> None:
    teddy = datasets.example_sets()[0]
    refused = (Refused(Path("/upload/holiday.jpg"), "It is empty."),)
    name = drafts.keep(datasets.PictureSet(teddy.pictures, refused, teddy.about), tmp_path)
    first = drafts.read(name, tmp_path)
    assert first is not None
    assert [p.caption for p in first.pictures] == [p.caption for p in teddy.pictures]
    assert [(bad.path.name, bad.why) for bad in first.refused] == [("holiday.jpg", "It is empty.")]
    drafts.set_caption(name, tmp_path, first.pictures[1].path.name, "  a sks toy\n on the moon ")
    drafts.set_caption(name, tmp_path, first.pictures[2].path.name, " ")
    drafts.leave_out(name, tmp_path, first.pictures[0].path.name)
    later = drafts.read(name, tmp_path)
    assert later is not None
    assert [p.caption for p in later.pictures[:2]] == ["a sks toy on the moon", None]
    assert len(later.pictures) == 5
    folder = datasets.add_dataset(later, tmp_path)
    assert len(list(folder.glob("*.png"))) == 5 and len(list(folder.glob("*.txt"))) == 4


def test_many_hands_lose_no_caption_and_the_describer_overwrites_none(tmp_path: Path) -> None:
    name = drafts.keep(datasets.example_sets()[0], tmp_path)
    names = [picture.path.name for picture in drafts.known(name, tmp_path).pictures]
    hands = [threading.Thread(target=drafts.set_caption, args=[name, tmp_path, one, f"a {one}"]) for one in names]
    for hand in hands:
        hand.start()
    for hand in hands:
        hand.join()
    assert [picture.caption for picture in drafts.known(name, tmp_path).pictures] == [f"a {one}" for one in names]
    drafts.set_caption(name, tmp_path, names[0], "described", only_empty=True)
    assert drafts.known(name, tmp_path).pictures[0].caption == f"a {names[0]}"


def test_one_set_added_by_many_at_once_is_whole_and_kept_once(tmp_path: Path) -> None:
    teddy = datasets.example_sets()[0]
    made: list[Path] = []
    hands = [threading.Thread(target=lambda: made.append(datasets.add_dataset(teddy, tmp_path))) for _ in range(6)]
    for hand in hands:
        hand.start()
    for hand in hands:
        hand.join()
    assert len(made) == 6 and len(set(made)) == 1
    assert len(list(made[0].glob("*.png"))) == 6


def test_a_draft_is_found_by_its_own_name_only_and_forgotten_after_a_week(tmp_path: Path) -> None:
    name = drafts.keep(datasets.example_sets()[0], tmp_path)
    for hostile in ("../" + name, "..", "", None, name.upper() + "/..", "0" * 16, 7):
        assert drafts.read(hostile, tmp_path) is None
    with pytest.raises(UserError, match="no picture called"):
        drafts.set_caption(name, tmp_path, "../draft.json", "x")
    drafts.tidy(tmp_path)
    assert drafts.read(name, tmp_path) is not None
    drafts.tidy(tmp_path, now=time.time() + drafts.KEPT_SECONDS + 60)
    assert drafts.read(name, tmp_path) is None


def test_the_same_pictures_are_kept_once_and_others_get_a_number(tmp_path: Path) -> None:
    teddy, rocket, _ = datasets.example_sets()
    first = datasets.add_dataset(teddy, tmp_path)
    assert datasets.add_dataset(teddy, tmp_path) == first
    renamed = datasets.PictureSet(rocket.pictures, (), teddy.about)
    assert datasets.add_dataset(renamed, tmp_path).name == f"{first.name}-2"
    assert sorted(folder.name for folder in first.parent.iterdir()) == [first.name, f"{first.name}-2"]


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="At most 200"):
        datasets.sort_files([tmp_path / f"{number}.png" for number in range(201)])


def test_names_and_messages_are_escaped() -> None:
    evil = "<script>alert(1)</script>"
    chosen = datasets.PictureSet((Picture(Path(evil), 9, 9, "", evil),), (Refused(Path(evil), evil),))
    state = RunState(state="failed", message=evil, warnings=[evil], samples=[Sampled(0, evil, 0, "samples/0.png")])
    for html in (
        fragments.strip_of(chosen),
        fragments.captions_of(chosen),
        run_fragments.progress_of("run", state, ""),
        run_fragments.pairs_of(Path("/nowhere"), state.samples, is_live=True),
        run_fragments.ranks_of({evil: 1, "b": 2}),
        run_fragments.list_of([(Path(evil.replace("/", "")), state)], None, most=9),
    ):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html


def test_a_mistake_of_ours_goes_to_the_log_and_a_persons_is_escaped(tmp_path: Path) -> None:
    def ours() -> None:
        raise KeyError("colour")

    def theirs() -> None:
        raise UserError("No <b>.", "Why & what.")

    with pytest.raises(gr.Error) as told:
        guarded(ours, tmp_path)()
    assert str(page_log(tmp_path)) in told.value.message
    with pytest.raises(gr.Error) as told:
        guarded(theirs, tmp_path)()
    assert told.value.message == "<strong>No &lt;b&gt;.</strong> Why &amp; what."


def test_the_loss_is_drawn_within_its_frame_whatever_its_values() -> None:
    losses = [(step, loss) for step, loss in enumerate((1.0, float("nan"), 1e-9, 7.3, float("inf"), 0.2), 1)]
    drawn = plot.loss_plot(RunState(losses=losses, steps=6, validations=[Validated(0, 0.5, False)]))
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert plot.loss_plot(RunState(losses=[(1, 0.0), (2, 0.0)])).count("polyline") == 2


def test_a_run_that_is_none_of_ours_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.toml").touch()
    overview = Overview(tmp_path)
    for name in ("../secret", "", None):
        with pytest.raises(UserError, match="There is no run"):
            overview.find(name)
    assert overview.newest("../secret") is None


@pytest.mark.parametrize("arguments", [["--share"], ["--host", "0.0.0.0"], ["--host", "::"], ["--auth", "me:"]])
def test_a_page_open_to_strangers_without_a_password_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(arguments) == 2
    assert "--auth" in capsys.readouterr().err


def test_a_space_is_reached_from_outside_and_guarded_by_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "me/mine")
    options = app.read_options([])
    assert options.host == "0.0.0.0" and app.check_safe(options) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.0.1"])
def test_the_own_machine_needs_no_password(host: str) -> None:
    assert app.check_safe(app.read_options(["--host", host])) is None
