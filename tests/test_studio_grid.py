"""Sweeps and grids: many pictures from one recipe, and a labelled sheet."""

from __future__ import annotations

from pathlib import Path

import pytest
from studio_tiny import finish, lora_file, pixels, recipe, tiny_workspace
from tiny_pipelines import save_tiny

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import images
from reparam_diffusion.gallery.recipe import Use
from reparam_diffusion.jobs import studio, studio_grid


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny_workspace(tmp_path, save_tiny(tmp_path / "tiny-model", "sd1"), monkeypatch)


def test_a_sweep_changes_one_strength_and_nothing_else() -> None:
    start = recipe(adapters=(Use(name="teddy"), Use(name="style", strength=0.4)))
    request = studio_grid.sweep(start)
    assert request.labels == ("0", "0.25", "0.5", "0.75", "1", "1.25", "1.5")
    for made, label in zip(request.recipes, request.labels, strict=True):
        assert made.adapters[0] == Use(name="teddy", strength=float(label))
        assert made.model_copy(update={"adapters": start.adapters}) == start and made.adapters[1] == start.adapters[1]


def test_a_grid_has_a_picture_for_each_pair_and_a_labelled_sheet(workspace: Path) -> None:
    start = recipe(prompt="a red toy", adapters=(Use(name="teddy"),))
    checkpoint = workspace / "runs" / "20261124-000000-sks-toy" / "checkpoints" / "000020" / "adapter.safetensors"
    checkpoint.parent.mkdir(parents=True)
    lora_file(checkpoint, seed=8)
    name = checkpoint.relative_to(workspace).as_posix()
    request = studio_grid.grid(start, across=("prompt", ["red", "blue"]), down=("adapter", ["style", name]))
    assert (request.rows, request.columns) == (("style", "sks-toy, step 20"), ("red", "blue"))
    assert [(one.prompt, one.adapters[0].name) for one in request.recipes] == [
        ("a red toy", "style"), ("a blue toy", "style"), ("a red toy", name), ("a blue toy", name),
    ]  # fmt: skip
    folder = studio.submit(workspace, request.model_copy(update={"device": "cpu"}))
    finish(workspace)
    state = studio.state_of(folder)
    assert state.state == "finished" and len({pixels(file) for file in state.pictures.values()}) == 4
    assert state.sheet is not None and images.settings_of(state.sheet) == images.settings_of(state.pictures[0])


@pytest.mark.parametrize(
    ("across", "down", "words"),
    [
        (("seed", ["1"]), ("seed", ["2"]), "both sides|Both sides"),
        (("seed", []), ("steps", ["2"]), "has no values"),
        (("seed", ["1.5"]), ("steps", ["2"]), "whole number"),
        (("guidance", ["nan"]), ("steps", ["2"]), "no value"),
        (("strength", ["1"]), ("steps", ["2"]), "no adapter"),
        (("prompt", ["green", "blue"]), ("steps", ["2"]), "not in the prompt"),
        (("seed", [str(n) for n in range(9)]), ("steps", [str(n) for n in range(1, 9)]), "72 pictures"),
    ],
)
def test_a_grid_that_cannot_be_is_told(across: tuple, down: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words):
        studio_grid.grid(recipe(), across=across, down=down)
