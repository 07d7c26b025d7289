"""Settings by graphics card: they go over every preset, they fit, and a run that does not fit is told which would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import pytest
import torch
from tiny_pipelines import save_pictures, save_tiny
from typer.testing import CliRunner

from reparam_diffusion.__main__ import app
from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import PRESETS, TrainConfig, find_preset, parse_set, read_settings, settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import estimates, presets
from reparam_diffusion.models.outline import outline
from reparam_diffusion.models.parts import MODEL_CONFIGS
from reparam_diffusion.models.room import KEPT_FREE
from reparam_diffusion.training.cards import FOLDER, advise, card_layer, cards, with_card
from reparam_diffusion.training.estimate_memory import Memory, count_memory
from ui import ahead, runs_api, starting
from ui.advanced import draw_advanced
from ui.form import Form


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's configuration without its weights."""
    folder = tmp_path_factory.mktemp("model") / "sdxl"
    shutil.copytree(MODEL_CONFIGS / "sdxl", folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "sdxl", "sdxl")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


def counted(model: Path, *layers: object, memory: int | None = None) -> Memory:
    config = settle(*layers, {"model": {"path": str(model)}})  # type: ignore[arg-type]
    base = outline(model, dtype=torch.bfloat16, base_8bit=config.model.base_8bit)
    return count_memory(base, config, "cuda", memory=memory)


def test_a_card_goes_over_every_preset_and_says_what_it_is() -> None:
    assert cards() == (6, 8, 12, 16, 24)
    for card in cards():
        told = read_settings(FOLDER / f"{card}.toml")
        assert told["title"] == f"{card} GB" and told["about"].endswith(".")
        for file in PRESETS.glob("*.toml"):
            plain, config = settle(find_preset(file.stem)), settle(find_preset(file.stem), card_layer(card))
            assert (config.title, config.adapter, config.targets) == (plain.title, plain.adapter, plain.targets)
            assert config.training.gradient_checkpointing == (card < 24)
    assert card_layer("8 GB") == card_layer(8) and card_layer("") == {}
    assert card_layer("10") == card_layer(8), "a card in between has the next smaller one's"
    for wrong in ("5", "large"):
        with pytest.raises(UserError, match="6, 8, 12, 16, 24 GB"):
            card_layer(wrong)


def test_sdxl_at_1024_pixels_fits_on_8_gb(sdxl: Path) -> None:
    """All methods and cards are counted in docs/memory.md; this one takes the seconds that a test may."""
    memory = counted(sdxl, find_preset("sdxl-lora"), card_layer(8), memory=8 * 2**30)
    assert memory.peak <= 8 * 2**30 - KEPT_FREE
    assert memory.training < 5.5e9


def test_what_each_setting_saves_is_counted(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reparam_diffusion.models import eightbit

    monkeypatch.setattr("reparam_diffusion.models.outline.to_8bit", lambda unet: eightbit.to_8bit(unet, least=0))
    path = str(tiny)
    plain, small, offloaded = (
        counted(tiny, {"model": {"path": path, **more}, "training": {"gradient_checkpointing": True}})
        for more in ({}, {"base_8bit": True}, {"block_offload": True})
    )
    unets = [outline(tiny, dtype=torch.bfloat16, base_8bit=word).unet for word in (False, True)]
    whole, less = (sum(t.nbytes for t in (*unet.parameters(), *unet.buffers())) for unet in unets)
    assert plain.training - small.training == pytest.approx(1.1 * (whole - less), rel=0.35)
    assert offloaded.training < plain.training - 0.5 * whole
    assert plain.loading == 0, "a card's memory is taken part by part"
    base = outline(tiny, dtype=torch.bfloat16)
    assert not base.is_staged and not any(m._forward_hooks or m._forward_pre_hooks for m in base.unet.modules())


def test_tiles_are_counted_where_memory_is_short(sdxl: Path) -> None:
    from reparam_diffusion.models.tiles import taken

    vae = outline(sdxl).vae
    whole, pieces = (taken(vae, "decode", 1024, 1024, device="cuda", side=side) for side in (0, 512))
    assert pieces < whole / 3


# --- advice ----------------------------------------------------------------------------------------------------------
def needing(**sizes: int) -> Callable[[TrainConfig], int | None]:
    """A run's memory by what its base is."""

    def peak_of(config: TrainConfig) -> int | None:
        kind = "offloaded" if config.model.block_offload else "small" if config.model.base_8bit else "plain"
        return sizes.get(kind)

    return peak_of


def test_a_run_that_does_not_fit_is_told_the_largest_card_whose_settings_do() -> None:
    config = settle({"training": {"batch": 8}})
    told = needing(plain=9, small=6, offloaded=3)
    gb = 2**30
    assert advise(config, 5, room=5, memory=8 * gb, peak_of=told).sentence == ""
    found = advise(config, 20, room=7, memory=8 * gb, peak_of=told)
    assert "Choose the 8 GB card's settings (--card 8" in found.sentence and found.unknown is None
    assert "the 6 GB card's" in advise(config, 20, room=4, memory=8 * gb, peak_of=told).sentence
    assert "smaller data.resolution" in advise(config, 20, room=1, memory=8 * gb, peak_of=told).sentence
    waiting = advise(config, 20, room=7, memory=8 * gb, peak_of=needing())
    assert waiting.unknown == with_card(config, 8) and "being found out" in waiting.sentence
    assert with_card(config, 8).training.batch == 1


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A computer with 8 GB whose free memory holds the tiny model with no more than one picture at a time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for place in ("cards", "estimate"):
        monkeypatch.setattr(f"reparam_diffusion.training.{place}.memory_of", lambda device: 8 * 2**30, raising=False)
    monkeypatch.setattr("reparam_diffusion.jobs.estimates.memory_of", lambda device: 8 * 2**30)
    monkeypatch.setattr("reparam_diffusion.training.cards.free_on", lambda device: 200_000_000)


@pytest.mark.usefixtures("short")
def test_a_dry_run_names_the_card_whose_settings_fit(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    words = ["train", "--images", str(pictures), "--trigger", "sks", "--dry-run", "--workspace", str(tmp_path)]
    words += [f"--set=model.path='{tiny}'", "--set=model.precision=fp32", "--set=training.batch=256"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert "It does not fit: about 0.2 GB are free for it. Choose the 8 GB card's settings (--card 8" in told.output
    fits = CliRunner().invoke(app, [*words[:-1], "--card", "8"])
    assert fits.exit_code == 0 and "does not fit" not in fits.output, fits.output
    wrong = CliRunner().invoke(app, [*words, "--card", "5"])
    assert isinstance(wrong.exception, UserError) and "6, 8, 12, 16, 24 GB" in str(wrong.exception)


@pytest.mark.usefixtures("short")
def test_what_would_fit_is_found_out_beside_the_run_itself(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    base = [f"model.path='{tiny}'", "model.precision=fp32", f"data.images='{pictures}'", "training.batch=256"]
    config = settle(parse_set(base))
    estimates._answer(config, 0.0)
    cost = estimates.cost(config, pictures=3, workspace=tmp_path)
    assert "Choose the 8 GB card's settings" in cost.advice
    assert cost.seconds is None, "a run that does not fit is not tried"
    assert not estimates.find_out([config])


# --- the page --------------------------------------------------------------------------------------------------------
def test_the_page_and_programs_take_a_card(pictures: Path, tmp_path: Path) -> None:
    form = Form()
    with gr.Blocks(analytics_enabled=False):
        draw_advanced(form, tmp_path)
    assert [value for _, value in form.controls["card"].choices] == ["", "6", "8", "12", "16", "24"]
    for method in METHODS:
        shown = starting.defaults(tmp_path, "sdxl", "subject", method, card="6")
        assert shown["model.block_offload"] and shown["training.gradient_checkpointing"]
    assert starting.settled(tmp_path, presets.FIRST, "subject", "lora", card="8").training.batch == 1
    layer = starting.layer_of({"method": "lora", "preset": "sdxl", "card": "8", "data.trigger": "sks"})
    assert "card" not in layer
    files = sorted(pictures.glob("*.png"))
    with pytest.raises(UserError, match="card"):
        runs_api.train_on(tmp_path, files, {"card": "5", "data.trigger": "sks"})


def test_what_does_not_fit_is_told_under_the_button(pictures: Path, tmp_path: Path) -> None:
    from reparam_diffusion.jobs import datasets
    from reparam_diffusion.training.estimate import Cost

    cost = Cost(3, 1000, 2000, (), 0, 9_000_000_000, "cuda", (), advice="It does not fit <b>.")
    chosen = datasets.sort_files(sorted(pictures.glob("*.png")))
    told = ahead.told_of(tmp_path, chosen, settle({}), cost, is_measuring=False)
    assert '<p class="callout bad" role="alert">It does not fit &lt;b&gt;.</p>' in told


def test_a_preset_for_another_model_and_a_card_that_is_not_there_are_told(tiny: Path) -> None:
    starter, other = settle({}), settle({"model": {"path": str(tiny)}})
    assert (
        presets.notes_on("quick", starter) == presets.notes_on("sdxl-lora", other) == presets.notes_on("", other) == []
    )
    (wrong,) = presets.notes_on(presets.FIRST, other)
    assert "Stable Diffusion XL" in wrong
    assert presets.notes_on("sdxl", settle({"model": {"path": "owner/not-fetched-yet"}})) == []
    (also,) = presets.notes_on("sdxl", starter)
    assert "starter" in also
    (card,) = presets.notes_on("quick", settle({"model": {"device": "cpu"}}), card="8")
    assert "no graphics card" in card
