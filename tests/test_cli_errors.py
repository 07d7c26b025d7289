"""A user's mistake on the command line ends in one sentence and exit code 2, never in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel, TypeAdapter, ValidationError
from test_gallery_index import put

import app as page_app
from reparam_diffusion import __main__ as program
from reparam_diffusion import config as c
from reparam_diffusion.adapters import METHODS
from reparam_diffusion.errors import Note, UserError, explain_os_error
from reparam_diffusion.gallery.blend.forms import Form
from reparam_diffusion.gallery.recipe import Recipe, make_recipe
from reparam_diffusion.jobs import runs, studio_grid
from reparam_diffusion.printable import hush_libraries, printable, remove_control, say
from reparam_diffusion.validation import MESSAGES, describe

ESC = "\x1b[31mred\x1b[0m\x07\u202e"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs the program; gives its exit code and what it printed. Any: a function."""
    monkeypatch.chdir(tmp_path)
    shown = warnings.showwarning

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["reparam_diffusion", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            program.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out + err

    yield run
    warnings.showwarning = shown


def images(folder: Path, count: int = 2) -> Path:
    """A folder of images."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.effect_noise((64, 64), 50 + number).save(folder / f"{number}.png")
    return folder


def read_only(folder: Path) -> Path:
    """A folder that cannot be written, also as root: a file is in its place."""
    folder.write_text("")
    return folder


TRAIN = ("train", "--images", "images", "--trigger", "sks", "--set", "training.steps=1")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((*TRAIN, "--workspace", "a-file"), "a-file is a file"),
        (("demo", "--workspace", "a-file"), "a-file is a file"),
        (("gallery", "--workspace", "a-file"), "not a workspace"),
        (("import", "t.safetensors", "--workspace", "a-file"), "a-file is a file"),
        (("resume", "last", "--workspace", "a-file"), "not a workspace"),
        (("stop", "last", "--workspace", "a-file"), "not a workspace"),
        (("generate", "--prompt", "x", "--workspace", "a-file"), "a-file is a file"),
        (("generate", "--prompt", "x", "--out", "a-file/x.png"), "a-file is a file"),
        (("generate", "--prompt", "x", "--out", "x.jpg"), "not a PNG"),
        (("generate", "--prompt", "x", "--out", "folder.png"), "is a folder"),
        (("generate", "--prompt", " "), "prompt is empty"),
        (("generate", "--prompt", "x", "--adapter", ""), "name of an adapter is missing"),
        (("generate", "--prompt", "x", "--adapter", ":1"), "name of an adapter is missing"),
        (("generate", "--prompt", "x", "--adapter", "t.safetensors:0,8"), "decimal comma"),
        (("generate", "--prompt", "x", "--adapter", "t:0.8:0,5"), "decimal comma"),
        (("generate", "--prompt", "x", "--adapter", "nothing"), "no adapter called"),
        (("generate", "--prompt", "x <lora:t:0,8>"), "decimal comma"),
        (("generate", "--prompt", "x", "--scheduler", "Eulr"), 'Did you mean "Euler"'),
        (("generate", "--prompt", "x", "--model", "startr"), 'Did you mean "starter"'),
        (("generate", "--prompt", "x", "--model", ""), "Model must not be empty"),
        (("generate", "--prompt", "x", "--image", "images"), "images"),
        (("generate", "--prompt", "x", "--image", "none.png"), "none.png"),
        (("generate", "--prompt", "x", "--seed", "-2"), "Seed must be at least 0"),
        (("generate", "--prompt", "x", "--device", "gpu"), "gpu"),
        (("generate", "--prompt", "x", "--vae", "none"), "none"),
        (("train", "--trigger", "sks"), "No pictures"),
        (("train", "--images", "nowhere", "--trigger", "sks"), "nowhere"),
        (("train", "--images", "a-file", "--trigger", "sks"), "a-file"),
        ((*TRAIN, "--preset", "quik"), 'Did you mean "quick"'),
        ((*TRAIN, "--preset", "../x"), "no preset"),
        ((*TRAIN, "--preset", "none.toml"), "none.toml"),
        ((*TRAIN, "--preset", "folder.toml"), "folder.toml"),
        ((*TRAIN, "--card", "lots"), "lots"),
        ((*TRAIN, "--set", "training.steps"), "key=value"),
        ((*TRAIN, "--set", "training.steps=0"), "training.steps must be at least 1, not 0"),
        ((*TRAIN, "--set", "training.steps=1,5"), "training.steps must be a whole number"),
        ((*TRAIN, "--set", "training.learning_rate=0,1"), "decimal comma"),
        ((*TRAIN, "--set", "adapter.method=lokrr"), 'Did you mean "lokr"'),
        ((*TRAIN, "--set", "training.start_from=none"), "no adapter called"),
        ((*TRAIN, "--model", "nowhere"), "no model"),
        ((*TRAIN, "--set", f"data.trigger={ESC}"), "control character"),
        (("train", "--images", "images", "--trigger", ESC), "control character"),
        ((*TRAIN, "--name", ESC), "control character"),
        (("resume", "nothing"), "no run called"),
        (("resume", ""), "no run called"),
        (("stop", "images"), "no run called"),
        (("inspect", ""), "name of an adapter is missing"),
        (("inspect", "images"), "no adapter called"),
        (("inspect", "images/0.png"), "0.png"),
        (("inspect", f"nothing{ESC}"), "no adapter called"),
        (("gallery", "--sort", "nwest"), 'Did you mean "newest"'),
        (("gallery", "--base", "sdx"), 'Did you mean "sdxl"'),
        (("gallery", "--method", "lorra"), 'Did you mean "lora"'),
        (("doctor", "images/none.safetensors"), "no adapter at"),
        (("blend", "t.safetensors:0,8"), "decimal comma"),
        (("blend", "t.safetensors:1", "--method", "tis"), 'Did you mean "ties"'),
    ],
)
def test_a_mistake_is_one_sentence(call: Any, tmp_path: Path, words: tuple[str, ...], part: str) -> None:
    images(tmp_path / "images")
    read_only(tmp_path / "a-file")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "t.safetensors").write_bytes(b"x")
    code, shown = call(*words)
    assert code == 2
    assert part in shown
    assert "Traceback" not in shown and "Errno" not in shown and "put should" not in shown
    assert "\x1b" not in shown and "\u202e" not in shown
    assert not list(tmp_path.glob("workspace/runs/*"))


@pytest.mark.parametrize(
    "words",
    [("generate",), ("generate", "--prompt"), ("generate", "--prompt", "x", "--steps", "0"), ("resume",), ("nonsense",),
     ("generate", "--prompt", "x", "--count", "many"), ("import", "none.safetensors"), ("train", "extra")],
)  # fmt: skip
def test_missing_and_wrong_arguments_are_said(call: Any, words: tuple[str, ...]) -> None:
    code, shown = call(*words)
    assert code == 2 and "Traceback" not in shown


def test_reading_works_in_a_workspace_that_cannot_be_written(call: Any, tmp_path: Path, monkeypatch: Any) -> None:
    put(tmp_path / "workspace", "teddy")
    mkdir, really = Path.mkdir, os.mkdir

    def refuse(path: Any, *args: Any, **named: Any) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(os, "mkdir", refuse)
    assert mkdir and really
    code, shown = call("gallery")
    assert code == 0 and "teddy" in shown
    code, shown = call("inspect", "teddy")
    assert code == 0


# --- what the system refuses -----------------------------------------------------------------------------------------
def test_a_refusal_of_the_system_is_a_sentence(call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reparam_diffusion.gallery.catalog.list_entries", refuse)
    code, shown = call("gallery")
    assert code == 2 and "The disk is full." in shown
    assert explain_os_error(OSError("no number")) is None
    assert explain_os_error(ConnectionError(111, "refused")) is None


def test_app_refuses_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_only(tmp_path / "a-file")
    shown = warnings.showwarning
    for words in (["--workspace", str(tmp_path / "a-file")], ["--port", "0"], ["--port", "99999"], ["--auth", "x"]):
        assert page_app.main(words) == 2
        text = capsys.readouterr().err
        assert text.startswith("Error: ") and text.count("\n") == 1
    warnings.showwarning = shown


# --- words of libraries ----------------------------------------------------------------------------------------------
JUNK: list[Any] = [
    None, True, -5, 0, 0.5, 2.5, 10**30, 1e300, float("nan"), float("inf"), "", "x", "0,8", "nan", "x" * 30_000,
    "\ud800", [], ["x"], [1, 2, 3], [0.5], [2.0, 2.0], {}, {"a": 1}, {"method": "lora"}, {"method": "?"}, (), b"x",
    [{"match": 3}], [{"match": "*", "adapter": {}}], [{"images": 3}], [{"name": ""}] * 40, object(),
]  # fmt: skip


def specs() -> list[Any]:
    """Every model of settings that users can fill in. Any: models, and unions of them."""
    groups = [c.TrainConfig, c.DatasetSettings, c.Rule, Recipe, Form]
    groups += [
        field.annotation for field in c.TrainConfig.model_fields.values() if hasattr(field.annotation, "model_fields")
    ]
    return [*groups, *(method.spec for method in METHODS.values())]


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.__name__)
def test_every_complaint_of_pydantic_has_our_words(spec: type[BaseModel]) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(spec)
    for given in [*JUNK, *({name: value} for name in [*spec.model_fields, "nonsense"] for value in JUNK)]:
        try:
            adapter.validate_python(given)
        except ValidationError as error:
            for mistake in error.errors(include_url=False):
                assert mistake["type"] in MESSAGES, mistake
                words = describe(mistake)
                assert "nput should" not in words and "Value error" not in words and "{" not in words
                assert len(words) < 400


def test_settings_and_recipes_say_it_with_the_name() -> None:
    with pytest.raises(UserError, match=r"^training\.steps must be at least 1, not 0\.$"):
        c.settle({"training": {"steps": 0}})
    with pytest.raises(UserError, match=r"^Steps must be at least 1, not 0\.$"):
        make_recipe({"prompt": "a", "steps": 0})


def test_only_our_warnings_reach_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = warnings.showwarning
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            hush_libraries()
            np.float64(1.0) / np.float64(0.0)
            warnings.warn("please open an issue", UserWarning, stacklevel=1)
            warnings.warn("a layer is not used", Note, stacklevel=1)
    finally:
        warnings.showwarning = shown
    if not sys.warnoptions:
        assert capsys.readouterr().err == "Note: a layer is not used\n"


# --- seeds -----------------------------------------------------------------------------------------------------------
def test_minus_one_is_a_random_seed_everywhere(tmp_path: Path) -> None:
    seeds = {make_recipe({"prompt": "a", "seed": -1}).seed for _ in range(4)}
    assert len(seeds) > 1 and all(seed >= 0 for seed in seeds)
    grid = studio_grid.grid(make_recipe({"prompt": "a"}), across=("seed", ["-1", "7"]), down=("guidance", ["1", "2"]))
    assert len({recipe.seed for recipe in grid.recipes}) == 2 and grid.columns[1] == "Seed 7"
    config = c.settle({"data": {"images": str(images(tmp_path / "images"))}, "training": {"seed": -1}})
    kept = runs.read_config(runs.create_run(config, tmp_path, now=__import__("datetime").datetime.now()))
    assert kept.training.seed >= 0 and kept.output.sample_seed == 0


def test_the_random_seed_that_was_used_is_shown(call: Any, tmp_path: Path) -> None:
    _, shown = call("generate", "--prompt", "x", "--steps", 1, "--seed", -1, "--out", "o.png", "--json")
    row = json.loads(next(line for line in shown.splitlines() if line.startswith("{")))
    assert f"Seed {row['seed']}" in shown
    from reparam_diffusion.gallery.images import settings_of

    assert settings_of(tmp_path / "o.png").seed == row["seed"]


# --- control characters ----------------------------------------------------------------------------------------------
def test_control_characters_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\tb\nc ä熊") == "a\tb\nc ä熊"
    assert printable("\x1b[2J\x9b\x7f\u202e\ud800") == "\\u001b[2J\\u009b\\u007f\\u202e\\ud800"
    assert remove_control("a\x1b[2J\r\nb\rc") == "a[2J\nb\nc"
    assert json.loads(printable(json.dumps({"a": ESC}, ensure_ascii=False).replace("\\u001b", "\x1b"))) == {"a": ESC}
    say(ESC)
    assert "\x1b" not in capsys.readouterr().out
    assert make_recipe({"prompt": f"a{ESC} cat", "negative": ESC}).prompt == "a[31mred[0m cat"


def test_a_terminal_that_knows_few_letters_gets_them_written_out(tmp_path: Path) -> None:
    put(tmp_path / "workspace", "teddy")
    done = subprocess.run(
        [sys.executable, "-m", "reparam_diffusion", "inspect", "熊\udcff", "--workspace", str(tmp_path)],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr and b"no adapter" in done.stderr
