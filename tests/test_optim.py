"""Optimizers from packages of their own: they train, resume bit for bit, and tell what does not go together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import save_pictures, save_quick
from torch import nn

from reparam_diffusion.config import TrainingSettings, parse_set, settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Step, Warned
from reparam_diffusion.training.estimate import cost_of
from reparam_diffusion.training.estimate_memory import _state_bytes
from reparam_diffusion.training.loop import train
from reparam_diffusion.training.optim import EXTRA, TORCHS, learning_rates, make_optimizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a small run on a tiny model."""
    place = tmp_path_factory.mktemp("optim")
    model, pictures = save_quick(place / "model", "sd1"), save_pictures(place / "pictures")
    return [
        f"model.path='{model}'", "model.precision=fp32", f"data.images='{pictures}'", "data.trigger=sks",
        "targets.unet=attention", "targets.text_encoder=attention", "adapter.rank=4", "output.file_precision=fp32",
        "output.sample_every=1000", "output.validate_every=4", "training.steps=8", "output.checkpoint_every=4",
        "training.learning_rate=0.01", "training.text_learning_rate=0.01",
    ]  # fmt: skip


def settings_for(optimizer: str) -> list[str]:
    return [f"training.optimizer={optimizer}"] + (
        ["training.learning_rate=1.0", "training.text_learning_rate=0.0"] if optimizer == "prodigy" else []
    )


@pytest.mark.parametrize("optimizer", EXTRA)
def test_broken_off_at_6_and_resumed_from_4_equals_8_steps(optimizer: str, base: list[str], tmp_path: Path) -> None:
    total = settle(parse_set([*base, *settings_for(optimizer)]))
    for event in train(total, folder=tmp_path / "cut"):
        if isinstance(event, Step) and event.step == 6:
            break
    list(train(total, folder=tmp_path / "cut", resume=True))
    steps = [event for event in train(total, folder=tmp_path / "whole") if isinstance(event, Step)]
    whole, cut = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, cut[key]) for key, tensor in whole.items())
    assert any(tensor.any() for key, tensor in whole.items() if "up" in key)
    assert all(0 <= rate <= 1 for step in steps for rate in step.learning_rates.values())


def learn(name: str, steps: int, **settings: Any) -> tuple[Any, nn.Parameter]:
    """An optimizer after some steps towards 1, and what it moved."""
    weight = nn.Parameter(torch.zeros(8, 640))
    total = TrainingSettings(optimizer=name, steps=100, **settings)  # type: ignore[arg-type]
    optimizer = make_optimizer(total, {"unet": [weight]})
    for _ in range(steps):
        optimizer.zero_grad()
        (weight - 1).square().sum().backward()
        optimizer.step()
    return optimizer, weight


@pytest.mark.parametrize("name", [*TORCHS, *EXTRA])
def test_the_memory_told_is_what_the_optimizer_keeps(name: str) -> None:
    optimizer, weight = learn(name, 2, learning_rate=0.01)
    kept = sum(t.nbytes for k, t in optimizer.state[weight].items() if torch.is_tensor(t) and not k.startswith("qmap"))
    if name == "prodigy":  # its start is kept only where it is not zero
        kept += weight.nbytes
    if name == "adafactor":
        assert kept < 0.5 * weight.nbytes
    else:
        assert kept == pytest.approx(_state_bytes(name, weight.numel()), abs=16)


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_states_of_8_bits_go_on_bit_for_bit_when_read_back(name: str, tmp_path: Path) -> None:
    optimizer, weight = learn(name, 3, learning_rate=0.01)
    torch.save((optimizer.state_dict(), weight.detach()), tmp_path / "state")
    again, other = learn(name, 0, learning_rate=0.01)
    state, values = torch.load(tmp_path / "state", weights_only=True)
    again.load_state_dict(state)
    other.data.copy_(values)
    for one, moved in ((optimizer, weight), (again, other)):
        moved.grad = torch.linspace(-1, 1, 5120).reshape(8, 640)
        one.step()
    assert torch.equal(weight, other) and optimizer.state[weight]["state1"].dtype == torch.uint8


def test_prodigy_tells_the_rate_that_it_found_and_trains_with() -> None:
    optimizer, weight = learn("prodigy", 30, learning_rate=1.0, warmup=0.0)
    before = weight.detach().clone()
    told = learning_rates(optimizer)["unet"]
    assert told == optimizer.param_groups[0]["d"] > 2e-6, "it has grown from where it began"
    optimizer.step()
    assert 0 < float((weight.detach() - before).abs().max()) < 3 * told


def test_schedule_free_warms_up_by_itself_and_says_so() -> None:
    optimizer, _ = learn("adamw_schedulefree", 1, learning_rate=0.01, warmup=0.1)
    assert learning_rates(optimizer)["unet"] == pytest.approx(0.01 * 2 / 10)


def test_schedule_free_is_looked_at_and_saved_at_its_average(base: list[str], tmp_path: Path) -> None:
    config = settle(parse_set([*base, "training.optimizer=adamw_schedulefree", "training.steps=6"]))
    list(train(config, folder=tmp_path))
    state = torch.load(tmp_path / "checkpoints" / "000006" / "state.pt", weights_only=True)
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    up = state["adapters"][site]["up"]
    group = state["optimizer"]["param_groups"][0]
    z = next(row["z"] for row in state["optimizer"]["state"].values() if row["z"].shape == up.shape)
    assert group["train_mode"] and z.shape == up.shape
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"
    written = load_file(tmp_path / "adapter.safetensors")[key]
    assert not torch.equal(written, up), "the checkpoint holds where training is, the file the average"


def notes(base: list[str], tmp_path: Path, *settings: str) -> list[str]:
    """What a run says before it needs its pictures."""
    broken = tmp_path / "images" / "broken.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no image")
    config = settle(parse_set([*base, *settings, f"data.images='{broken.parent}'"]))
    told: list[str] = []
    with pytest.raises(UserError, match=r"broken\.png"):
        told.extend(event.message for event in train(config, folder=tmp_path) if isinstance(event, Warned))
    return told


def test_the_estimate_before_start_tells_what_the_run_would(base: list[str], tmp_path: Path) -> None:
    settings = ["training.optimizer=prodigy", "training.text_learning_rate=0.5"]
    cost = cost_of(settle(parse_set([*base, *settings])), pictures=4, workspace=tmp_path, threads=1)
    assert set(cost.notes) >= set(told := notes(base, tmp_path / "a", *settings)) and len(told) == 2


def test_settings_that_make_no_sense_together_are_told(base: list[str], tmp_path: Path) -> None:
    small = notes(base, tmp_path / "a", "training.optimizer=prodigy", "training.text_learning_rate=0.5")
    assert "which is 0.01: it will learn next to nothing" in small[0] and "one learning rate for all parts" in small[1]
    assert not notes(base, tmp_path / "b", *settings_for("prodigy"))
    free = "training.optimizer=adamw_schedulefree"
    assert "cosine is not used" in notes(base, tmp_path / "c", free)[0]
    for wrong, words in (
        ("training.ema=0.9", "moving average"),
        ("adapter={method='adalora'}", "AdaLoRA does not go"),
        ("training.betas=[0.0, 0.9]", "first beta"),
    ):
        with pytest.raises(UserError, match=words):
            list(train(settle(parse_set([*base[:4], free, wrong])), folder=tmp_path / "d"))


def test_a_missing_package_is_told_with_the_way_to_it(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(UserError, match="needs prodigyopt, which is not installed") as told:
        list(train(settle(parse_set([*base, "training.optimizer=prodigy"])), folder=tmp_path))
    assert "pip install -r requirements-extras.txt" in told.value.do and told.value.place == "training.optimizer"
