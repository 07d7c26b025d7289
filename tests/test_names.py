"""Names of presets, adapters, runs and the rest: the nearest is offered, and none leads out of its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import new_run
from test_gallery_index import put

from reparam_diffusion import __main__ as program
from reparam_diffusion import config as c
from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import catalog, shelf
from reparam_diffusion.gallery.blend.blending import blend_method
from reparam_diffusion.gallery.recipe import make_recipe
from reparam_diffusion.jobs import presets, runs, studio
from reparam_diffusion.jobs.file_commands import path_of
from reparam_diffusion.jobs.overview import Overview
from reparam_diffusion.models.schedulers import require_scheduler
from reparam_diffusion.models.source import find_source
from ui import runs_api, starting


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with one adapter and one preset, seen from a working directory with things of the same names."""
    workspace = tmp_path / "workspace"
    put(workspace, "teddy")
    presets.save(c.settle(), workspace, title="Mine")
    here = tmp_path / "here"
    (here / "teddy").mkdir(parents=True)
    (here / "teddy" / "picture.png").touch()
    (here / "secret.safetensors").write_bytes(b"x")
    (here / "secret.toml").write_text('title = "secret"')
    monkeypatch.chdir(here)
    return workspace


def test_a_bare_name_is_the_gallerys_whatever_the_working_directory_has(workspace: Path) -> None:
    file = shelf.shelf_of(workspace) / "teddy.safetensors"
    config = c.settle({"training": {"start_from": "teddy"}})
    assert runs.with_start(config, workspace).training.start_from == str(file.resolve())
    assert path_of("teddy", workspace) == shelf.locate("teddy", workspace) == file
    (Path.cwd() / "other").mkdir()
    with pytest.raises(UserError, match='no adapter called "other"'):
        shelf.locate("other", workspace)


@pytest.mark.parametrize(
    "name", ["secret", "secret.safetensors", "../here/secret.safetensors", "~/x", "runs/../x", ".."]
)
def test_page_and_api_open_no_adapter_by_a_path(workspace: Path, name: str) -> None:
    with pytest.raises(UserError):
        studio.adapter_file(name, workspace)
    with pytest.raises(UserError) as caught:
        starting.resolve_start(c.settle({"training": {"start_from": name}}), workspace)
    assert caught.value.place == "training.start_from"


def test_the_page_continues_from_what_lies_in_the_workspace(workspace: Path) -> None:
    file = shelf.shelf_of(workspace).resolve() / "teddy.safetensors"
    for name in ("teddy", str(file)):
        config = starting.resolve_start(c.settle({"training": {"start_from": name}}), workspace)
        assert config.training.start_from == str(file)


@pytest.mark.parametrize(
    "name",
    ["secret", "secret.toml", "../here/secret", "../../presets/quick", "cards/8", "mine/../../here/secret", "mine/"],
)
def test_page_and_api_open_no_preset_by_a_path(workspace: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        presets.layers(name, workspace, kind="subject", method="lora")
    assert caught.value.place == "preset"
    with pytest.raises(UserError):
        runs_api.train_on(workspace, [], {"preset": name})


def test_known_presets_are_taken(workspace: Path) -> None:
    for _, name in presets.choices(workspace):
        assert presets.layers(name, workspace, kind="subject", method="lora")
    assert presets.layers("mine/mine", workspace, kind="style", method="loha")


@pytest.mark.parametrize(
    ("look_up", "near"),
    [
        (lambda w: shelf.find("tedy", w), "teddy"),
        (lambda w: shelf.locate("tedy", w), "teddy"),
        (lambda w: presets.layers("sd51", w, kind="subject", method="lora"), "sd15"),
        (lambda w: presets.layers("mine/mien", w, kind="subject", method="lora"), "mine/mine"),
        (lambda w: c.find_preset("quik"), "quick"),
        (lambda w: c.settle({"adapter": {"method": "lokrr"}}), "lokr"),
        (lambda w: c.settle({"training": {"optimizer": "adamw8bits"}}), "adamw8bit"),
        (lambda w: c.settle({"training": {"schedule": "cosin"}}), "cosine"),
        (lambda w: c.settle({"training": {"learning_rat": 1}}), "learning_rate"),
        (lambda w: require_scheduler("Eulr a"), "Euler a"),
        (lambda w: make_recipe({"prompt": "a", "scheduler": "dpm++ 2m"}), "DPM++ 2M"),
        (lambda w: find_source("startr"), "starter"),
        (lambda w: blend_method("tis"), "ties"),
        (lambda w: runs_api.train_on(w, [], {"method": "lorra"}), "lora"),
        (lambda w: catalog.sort([], "newst"), "newest"),
        (lambda w: catalog.require_filters([], base="sd-xl", method=""), "sdxl"),
        (lambda w: catalog.require_filters([], base="", method="adalor"), "adalora"),
        (lambda w: Overview(w).find(new_run(w).name[:-1]), "-"),
        (lambda w: program._run_folder(new_run(w).name[:-1], w), "-"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(workspace: Path, look_up: Callable[[Path], object], near: str) -> None:
    with pytest.raises(UserError, match="Did you mean") as caught:
        look_up(workspace)
    assert near in caught.value.do + caught.value.what
