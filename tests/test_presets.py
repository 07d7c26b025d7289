"""Every preset settles into a whole config, says what it is, and reads back from the file a run writes."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import PRESETS, find_preset, settle, to_toml

NAMES = sorted(file.stem for file in PRESETS.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_settles_and_reads_back(name: str) -> None:
    config = settle(find_preset(name))
    assert config.title and config.about.endswith(".")
    assert settle(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_method_has_its_presets(family: str) -> None:
    for method in METHODS:
        assert settle(find_preset(f"{method}-subject")).adapter.method == method
        assert settle(find_preset(f"{family}-{method}")).adapter.method == method


def test_presets_lie_beside_the_library() -> None:
    assert Path(PRESETS).is_dir() and {"quick", "style"} <= set(NAMES)
