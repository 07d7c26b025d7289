"""Training where things go sideways: an average with pruned ranks, overflow, globs on text encoders, an early stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import save_pictures, save_tiny

from reparam_diffusion.config import parse_set, settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Event, Ranked, Started, Step, Stopped
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.training import learner as learning
from reparam_diffusion.training.loop import train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "sdxl", "sdxl")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


def events_of(model: Path, pictures: Path, folder: Path, *assignments: str, **named: Any) -> list[Event]:
    base = [
        f"model.path='{model}'", "model.precision=fp32", f"data.images='{pictures}'", "data.trigger=sks",
        "training.steps=4", "training.warmup=0.0", "output.file_precision=fp32", "output.sample_prompts=['a photo']",
        "output.validate_every=100", "targets.unet=attention",
    ]  # fmt: skip
    return list(train(settle(parse_set([*base, *assignments])), folder=folder, **named))


def steps_of(events: Sequence[Event]) -> list[Step]:
    return [event for event in events if isinstance(event, Step)]


def test_a_moving_average_does_not_bring_pruned_ranks_back(model: Path, pictures: Path, tmp_path: Path) -> None:
    adalora = ["adapter.method=adalora", "adapter.init_rank=4", "adapter.target_rank=1", "adapter.t_init=0.0",
               "adapter.t_final=0.3", "training.steps=12", "training.learning_rate=0.05"]  # fmt: skip
    events = events_of(model, pictures, tmp_path, *adalora, "training.ema=0.9")
    sites = next(event.sites for event in events if isinstance(event, Started))
    assert sum(read_adapter(tmp_path / "adapter.safetensors").ranks.values()) == sites


def test_rules_with_another_schedule_share_a_budget_of_their_own(model: Path, pictures: Path, tmp_path: Path) -> None:
    rule = "{match='*attn2*', adapter={method='adalora', init_rank=4, target_rank=3, t_init=0.0, t_final=0.6}}"
    events = events_of(
        model, pictures, tmp_path, "adapter.method=adalora", "adapter.init_rank=4", "adapter.target_rank=1",
        "adapter.t_final=0.2", "training.steps=10", "training.learning_rate=0.02", f"targets.rules=[{rule}]",
    )  # fmt: skip
    ranks = [event.ranks for event in events if isinstance(event, Ranked)][-1]
    ruled = {site for site in ranks if "attn2" in site}
    assert sum(ranks[site] for site in ruled) == 3 * len(ruled)
    assert sum(ranks[site] for site in ranks.keys() - ruled) == len(ranks) - len(ruled)
    assert min(ranks.values()) < max(ranks.values())


def test_a_step_that_overflows_is_not_taken_and_the_run_goes_on(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fp16 on a GPU does, here with the scaler switched on by hand and infinite gradients at step 2."""
    before: dict[int, list[torch.Tensor]] = {}
    update = learning.Learner.update

    def overflowing(self: learning.Learner, step: int) -> float | None:
        if step == 1:
            self.scaler = torch.amp.GradScaler("cpu", enabled=True)
            self.scaler.scale(torch.zeros(()))  # as the loss would have been
            self.scaler._scale.fill_(1.0)
        if step == 2:
            for parameter in self.parameters:
                parameter.grad = torch.full_like(parameter, float("inf"))
        before[step] = [parameter.detach().clone() for parameter in self.parameters]
        return update(self, step)

    monkeypatch.setattr(learning.Learner, "update", overflowing)
    taken = steps_of(events_of(model, pictures, tmp_path, "training.learning_rate=0.01"))
    assert [step.gradient_norm is None for step in taken] == [False, True, False, False]
    assert all(torch.equal(a, b) for a, b in zip(before[2], before[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before[3], before[4], strict=True))


def test_an_overflow_without_a_scaler_ends_the_run_with_a_sentence(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = learning.Learner.update

    def overflowing(self: learning.Learner, step: int) -> float | None:
        self.parameters[0].grad = torch.full_like(self.parameters[0], float("nan"))
        return update(self, step)

    monkeypatch.setattr(learning.Learner, "update", overflowing)
    with pytest.raises(UserError, match="lower learning rate"):
        events_of(model, pictures, tmp_path)


def test_globs_choose_layers_of_one_text_encoder(model: Path, pictures: Path, tmp_path: Path) -> None:
    events_of(model, pictures, tmp_path, "targets.text_encoder=['te2.*q_proj']")
    text = {key for key in load_file(tmp_path / "adapter.safetensors") if key.startswith("lora_te")}
    assert text and all(key.startswith("lora_te2_") for key in text)
    assert {key.partition(".")[0].rpartition("self_attn_")[2] for key in text if ".lora_" in key} >= {"q_proj"}


def test_a_glob_that_no_text_encoder_has_is_told(model: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No layer of a text encoder matches") as told:
        events_of(model, pictures, tmp_path, "targets.text_encoder=['te3.*']")
    assert "te1, te2" in str(told.value) and told.value.place == "targets.text_encoder"


@pytest.mark.parametrize("request_", ["stop", "pause"])
def test_a_request_while_preparing_ends_the_run_without_a_step(
    request_: str, model: Path, pictures: Path, tmp_path: Path
) -> None:
    events = events_of(model, pictures, tmp_path, stop=lambda: request_)
    assert not steps_of(events)
    assert type(events[-1]).__name__ == ("Stopped" if request_ == "stop" else "Paused")
    assert not isinstance(events[-1], Stopped) or events[-1].path == ""
    assert not (tmp_path / "adapter.safetensors").exists()
