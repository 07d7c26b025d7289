"""The page's plain functions: controls from settings, pieces of HTML, and who may reach the page."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import pytest

import app
from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import TrainingSettings, find_preset, settle
from reparam_diffusion.data.images import Refused
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Sampled, Validated
from reparam_diffusion.jobs import datasets, runs
from reparam_diffusion.jobs.fold import RunState
from ui import fragments, plot, run_view, train_tab
from ui.door import guarded, page_log
from ui.form import Form, nested

VALUES = {"data.trigger": "sks", "data.class_word": "toy", "data.kind": "subject", "method": "lora", "preset": "quick"}


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


def test_untouched_controls_settle_to_the_presets_own_config() -> None:
    for _, preset in train_tab.presets_to_choose():
        for name in METHODS:
            shown = train_tab.defaults(preset, "subject", name)
            own = f"adapter.{name}."
            values = {f"adapter.{k.removeprefix(own)}" if k.startswith(own) else k: v for k, v in shown.items()}
            config = settle(*train_tab.layers_for(preset, "subject", name), nested(values))
            assert config == train_tab.settled(preset, "subject", name)


def test_presets_of_one_base_model_are_one_choice() -> None:
    choices = dict(train_tab.presets_to_choose())
    assert next(iter(choices.values())) == train_tab.FIRST_PRESET
    assert choices["Quick"] == "quick"
    assert not [name for name in choices.values() if name.endswith(("-subject", "style"))]
    assert choices["Stable Diffusion 1.5"] == "sd15"
    assert train_tab.settled("sd15", "subject", "oft").adapter.method == "oft"
    assert train_tab.settled("sd15", "subject", "lora").training.steps == find_preset("sd15-lora")["training"]["steps"]


def test_a_new_default_reaches_only_controls_that_nobody_touched() -> None:
    form = Form()
    with gr.Blocks(analytics_enabled=False):
        form.add(TrainingSettings(), "training", ["steps", "batch"])
    before, after = {"training.steps": 500, "training.batch": 1}, {"training.steps": 300, "training.batch": 4}
    updates = form.refreshed({"training.steps": 42, "training.batch": 1}, before, after)
    assert list(updates) == [form.controls["training.batch"]]


def test_starting_makes_a_run_of_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Path] = []
    monkeypatch.setattr(train_tab.worker, "launch", launched.append)
    teddy = datasets.example_sets()[0]
    values = VALUES | {"data.trigger": " zwx ", "training.steps": 7, "adapter.lora.rank": 3, "adapter.loha.rank": 99}
    run = train_tab.start_run(tmp_path, teddy, values)
    config = runs.read_config(run)
    assert launched == [run]
    assert (config.training.steps, config.adapter.model_dump()["rank"]) == (7, 3)
    captions = [file.read_text() for file in Path(str(config.data.images)).glob("*.txt")]
    assert len(captions) == 6
    assert all("zwx toy" in caption and "sks" not in caption for caption in captions)


@pytest.mark.parametrize(
    ("chosen", "change", "words"),
    [
        (False, {}, "no pictures"),
        (True, {"data.trigger": "  "}, "trigger word"),
        (True, {"training.steps": 0}, "steps"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_made(
    tmp_path: Path, chosen: bool, change: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        train_tab.start_run(tmp_path, datasets.example_sets()[0] if chosen else None, VALUES | change)
    assert list(tmp_path.iterdir()) == []


def test_the_same_pictures_are_kept_once_and_others_get_a_number(tmp_path: Path) -> None:
    teddy, rocket, _ = datasets.example_sets()
    first = datasets.add_dataset(teddy, tmp_path)
    assert datasets.add_dataset(teddy, tmp_path) == first
    renamed = datasets.PictureSet(rocket.pictures, rocket.captions, (), teddy.about)
    assert datasets.add_dataset(renamed, tmp_path).name == f"{first.name}-2"
    assert sorted(folder.name for folder in first.parent.iterdir()) == [first.name, f"{first.name}-2"]


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="At most 200"):
        datasets.sort_files([tmp_path / f"{number}.png" for number in range(201)])


def test_names_and_messages_are_escaped() -> None:
    evil = "<script>alert(1)</script>"
    chosen = datasets.PictureSet((), {}, (Refused(Path(evil), evil),))
    state = RunState(state="failed", message=evil, warnings=[evil], samples=[Sampled(0, evil, 0, "samples/0.png")])
    for html in (
        fragments.strip_of(chosen),
        fragments.progress_of(state, ""),
        fragments.pairs_of(Path("/nowhere"), state.samples, is_live=True),
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
    for name in ("../secret", "", None):
        with pytest.raises(UserError, match="There is no run"):
            run_view.run_called(tmp_path, name)
    assert run_view.run_to_open(tmp_path, "../secret") is None


@pytest.mark.parametrize("arguments", [["--share"], ["--host", "0.0.0.0"], ["--host", "::"], ["--auth", "me:"]])
def test_a_page_open_to_strangers_without_a_password_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(arguments) == 2
    assert "--auth" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.0.1"])
def test_the_own_machine_needs_no_password(host: str) -> None:
    assert app.check_safe(app.read_options(["--host", host])) is None
