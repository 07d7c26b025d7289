"""Training on from an adapter: the same change at step 0 whatever wrote the file, its sizes, and what is refused."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import save_pictures, save_quick

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import TrainConfig, parse_set, settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Started, Step, Warned
from reparam_diffusion.formats.peft import write_diffusers, write_peft
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.gallery import shelf
from reparam_diffusion.jobs.runs import create_run, read_config
from reparam_diffusion.models.load import Model, load_model
from reparam_diffusion.training.learner import Learner, plan_run
from reparam_diffusion.training.loop import train
from reparam_diffusion.training.processes import Processes
from ui import starting


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("start")
    save_quick(place / "model", "sd1")
    save_pictures(place / "pictures")
    return place


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    return load_model(place / "model", dtype=torch.float32)


def config_for(place: Path, *settings: str) -> TrainConfig:
    base = [
        f"model.path='{place / 'model'}'", "model.precision=fp32", f"data.images='{place / 'pictures'}'",
        "data.trigger=sks", "targets.unet=['unet.down_blocks*', 'unet.mid_block*']", "targets.text_encoder=attention", "training.steps=3",
        "training.learning_rate=0.05", "training.warmup=0.0", "output.file_precision=fp32", "output.sample_every=1000",
        "output.validate_every=1000",
    ]  # fmt: skip
    return settle(parse_set([*base, *settings]))


SIZES = {
    "lora": ("adapter.rank=3", "adapter.alpha=5.0"),
    "loha": ("adapter.rank=2", "adapter.alpha=3.0"),
    "lokr": ("adapter.factor=4", "adapter.low_rank=true", "adapter.rank=2", "adapter.decompose_both=true"),
    "oft": ("adapter.block_size=4", "adapter.constraint=0.01"),
    "adalora": ("adapter.init_rank=5", "adapter.target_rank=3", "adapter.alpha=4.0"),
}
"""What is not the default, so that a file's sizes differ from the settings'."""


class Trained(dict[str, Path]):
    """A trained file of each method, made when it is asked for."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __missing__(self, method: str) -> Path:
        folder = self.place / method
        list(train(config_for(self.place, f"adapter.method={method}", *SIZES.get(method, ())), folder=folder))
        self[method] = folder / "adapter.safetensors"
        return self[method]


@pytest.fixture(scope="module")
def trained(place: Path) -> Trained:
    return Trained(place)


def changes_of(adapters: Any, model: Model) -> dict[str, torch.Tensor]:
    """ΔW by site."""
    found = {}
    for site, adapter in adapters.items():
        part, _, path = site.partition(".")
        found[site] = adapter.delta(model.parts[part].get_submodule(path).weight).detach()
    return found


def begun(model: Model, config: TrainConfig) -> Learner:
    """The learner of a run before its first step."""
    start = Path(config.training.start_from)
    return Learner(model, config, plan_run(model, config), Processes(), start=start)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_begins_with_the_change_of_the_adapter_it_starts_from(
    method: str, place: Path, model: Model, trained: Trained
) -> None:
    config = config_for(place, f"adapter.method={method}", f"training.start_from='{trained[method]}'")
    learner = begun(model, config)
    with learner.injection:
        now = changes_of(learner.adapters, model)
    exact = changes_of(read_adapter(trained[method]).match(model.parts)[0], model)
    assert exact and max(float(change.abs().max()) for change in exact.values()) > 1e-3
    for site, change in now.items():
        torch.testing.assert_close(change, exact.get(site, torch.zeros_like(change)), rtol=1e-5, atol=1e-6)
        if site in exact and method not in ("adalora", "oft"):
            assert torch.equal(change, exact[site])
    if method == "adalora":
        for adapter in learner.adapters.values():
            eye = torch.eye(adapter.plan.rank)  # type: ignore[attr-defined]  # AdaLoRA's
            for rows in (adapter.left.T, adapter.right.flatten(1)):  # type: ignore[operator]  # AdaLoRA's
                torch.testing.assert_close(rows @ rows.T, eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dialect", ["peft", "diffusers", "doubled alpha"])
def test_any_dialect_can_be_trained_on(
    dialect: str, place: Path, model: Model, trained: Trained, tmp_path: Path
) -> None:
    adapters, _ = read_adapter(trained["lora"]).match(model.parts)
    file = tmp_path / "adapter.safetensors"
    if dialect == "peft":
        write_peft(tmp_path / "folder", adapters, parts=model.parts, precision="fp32")
        file = tmp_path / "folder"
    elif dialect == "diffusers":
        write_diffusers(file, adapters, parts=model.parts, precision="fp32")
    else:
        tensors = load_file(trained["lora"])
        save_file({key: tensor * (2 if key.endswith("alpha") else 1) for key, tensor in tensors.items()}, file)
    learner = begun(model, config_for(place, f"training.start_from='{file}'"))
    with learner.injection:
        now = changes_of(learner.adapters, model)
    factor = 2 if dialect == "doubled alpha" else 1
    for site, change in changes_of(adapters, model).items():
        torch.testing.assert_close(now[site], factor * change, rtol=1e-5, atol=1e-6)


def test_the_files_sizes_win_with_a_note_and_other_layers_start_fresh(
    place: Path, trained: Trained, tmp_path: Path
) -> None:
    few = tmp_path / "few.safetensors"
    save_file({key: t for key, t in load_file(trained["lora"]).items() if "down_blocks" in key}, few)
    config = config_for(place, f"training.start_from='{few}'", "adapter.dropout=0.5")
    events = list(train(config, folder=tmp_path / "run"))
    notes = [event.message for event in events if isinstance(event, Warned)]
    assert any("rank 3, not 16" in note and "alpha 5, not 16" in note for note in notes)
    ranks = next(event for event in events if isinstance(event, Started)).ranks
    assert {rank for site, rank in ranks.items() if "down_blocks" in site} == {3}
    assert 3 not in {rank for site, rank in ranks.items() if "down_blocks" not in site}
    file = read_adapter(tmp_path / "run" / "adapter.safetensors")
    assert file.metadata["reparam_started_from"].startswith("few.safetensors ")
    assert file.metadata["ss_steps"] == "3", "steps count from 0"


def test_a_run_goes_on_bit_for_bit_when_the_adapter_is_gone(place: Path, trained: Trained, tmp_path: Path) -> None:
    start = tmp_path / "start-here.safetensors"
    shutil.copyfile(trained["lora"], start)
    config = config_for(place, f"training.start_from='{start}'", "output.checkpoint_every=1")
    list(train(config, folder=tmp_path / "whole"))
    for event in train(config, folder=tmp_path / "cut"):
        if isinstance(event, Step) and event.step == 2:
            break
    start.unlink()
    list(train(config, folder=tmp_path / "cut", resume=True))
    whole, cut = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, cut[key]) for key, tensor in whole.items())


def test_what_cannot_be_trained_on_is_told(place: Path, model: Model, trained: Trained, tmp_path: Path) -> None:
    def told(*settings: str) -> UserError:
        with pytest.raises(UserError) as caught:
            plan_run(model, config_for(place, *settings))
        return caught.value

    other = told("adapter.method=loha", f"training.start_from='{trained['lora']}'")
    assert "is no LoHa" in other.what and "`convert`" in other.do and other.place == "training.start_from"
    assert "is no AdaLoRA" in told("adapter.method=adalora", f"training.start_from='{trained['oft']}'").what
    narrow = told("targets.text_encoder=none", f"training.start_from='{trained['lora']}'")
    assert "The first is te1." in narrow.why and narrow.place == "targets.text_encoder"
    strange = tmp_path / "strange.safetensors"
    save_file(load_file(trained["lora"]) | {"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)}, strange)
    assert "keys have no place" in told(f"training.start_from='{strange}'").why
    with pytest.raises(UserError, match="There is no adapter at"):
        list(train(config_for(place, "training.start_from=nothing"), folder=tmp_path / "run"))


def test_the_gallery_fills_the_form_to_train_on_from_an_adapter(place: Path, trained: Trained, workspace: Path) -> None:
    ours = shelf.add(trained["loha"], workspace, name="ours")
    shown = starting.on_from(workspace, shelf.stem_of(ours))
    assert (shown["method"], shown["training.start_from"], shown["training.steps"]) == ("loha", "ours", 3)
    assert shown["adapter.loha.rank"] == 2 and shown["output.name"] == "", "its own settings, under a new name"
    foreign = place / "foreign.safetensors"
    tensors = load_file(trained["lora"])
    save_file(tensors | {"bundle_emb.blorp.string_to_param.*": torch.ones(3, 16)}, foreign)
    shown = starting.on_from(workspace, shelf.stem_of(shelf.add(foreign, workspace, name="foreign")))
    assert (shown["method"], shown["targets.text_encoder"]) == ("lora", "attention+mlp")
    assert (shown["data.trigger"], shown["embedding.vectors"]) == ("blorp", 3)
    save_file({f"{key.split('.')[0]}.diff": t for key, t in tensors.items() if "lora_up" in key}, foreign)
    with pytest.raises(UserError, match="cannot be trained on as it is"):
        starting.on_from(workspace, shelf.stem_of(shelf.add(foreign, workspace, name="full")))


def test_a_gallery_name_becomes_a_path_when_a_run_is_made(place: Path, trained: Trained, workspace: Path) -> None:
    kept = shelf.add(trained["lora"], workspace, name="My teddy")
    made = create_run(config_for(place, "training.start_from='my teddy'"), workspace, now=datetime.datetime.now())
    assert read_config(made).training.start_from == str(kept.resolve())
    with pytest.raises(UserError, match="no adapter called") as told:
        create_run(config_for(place, "training.start_from=rabbit"), workspace, now=datetime.datetime.now())
    assert told.value.place == "training.start_from"
