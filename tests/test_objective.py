"""The loss's weights against hand numbers, and draws that depend on nothing but their names."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.schedulers import down_to_noise, make_scheduler
from reparam_diffusion.training.objective import Objective


def model(prediction: str, **more: object) -> SimpleNamespace:
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction, **more
    )
    return SimpleNamespace(scheduler=scheduler, prediction_type=prediction)


def at_snr(objective: Objective, snr: float) -> int:
    """The timestep whose SNR is nearest."""
    alphas = objective.scheduler.alphas_cumprod
    return int((alphas / (1 - alphas) - snr).abs().argmin())


@pytest.mark.parametrize(("prediction", "high", "low"), [("epsilon", 5 / 20, 1.0), ("v_prediction", 5 / 21, 0.1 / 1.1)])
def test_min_snr_weights_are_the_papers(prediction: str, high: float, low: float) -> None:
    objective = Objective(model(prediction), min_snr_gamma=5.0, noise_offset=0.0)
    steps = torch.tensor([at_snr(objective, 20.0), at_snr(objective, 0.1)])
    torch.testing.assert_close(objective.weights(steps), torch.tensor([high, low]), rtol=0.02, atol=0.002)


def test_gamma_zero_weighs_all_alike() -> None:
    objective = Objective(model("epsilon"), min_snr_gamma=0.0, noise_offset=0.0)
    assert objective.weights(torch.tensor([0, 500, 999])).tolist() == [1.0, 1.0, 1.0]


def test_zero_terminal_snr_has_no_nan_with_v_and_refuses_epsilon() -> None:
    objective = Objective(model("v_prediction", rescale_betas_zero_snr=True), min_snr_gamma=5.0, noise_offset=0.0)
    weights = objective.weights(torch.arange(1000))
    assert (weights == 1).all(), "min-SNR would give the last step, which is pure noise, no weight at all"
    with pytest.raises(UserError, match="zero-terminal SNR"):
        Objective(model("epsilon", rescale_betas_zero_snr=True), min_snr_gamma=5.0, noise_offset=0.0)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_a_schedule_can_be_let_down_to_pure_noise(kind: str) -> None:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    own = getattr(diffusers, kind)(**betas, prediction_type="v_prediction")
    new = down_to_noise(own)
    objective = Objective(
        SimpleNamespace(scheduler=new, prediction_type="v_prediction"), min_snr_gamma=5.0, noise_offset=0
    )
    alphas, before = objective.scheduler.alphas_cumprod, own.alphas_cumprod
    assert float(alphas[-1]) == pytest.approx(0, abs=1e-6) and before[-1] > 1e-3, "the last step is pure noise"
    torch.testing.assert_close(alphas[0], before[0])
    roots, old = alphas.sqrt(), before.sqrt()  # Lin et al., alg. 1: √ᾱ shifted to end at 0, scaled to begin as before
    torch.testing.assert_close(roots, (old - old[-1]) * old[0] / (old[0] - old[-1]), rtol=0, atol=1e-4)
    drawing = make_scheduler(new)
    drawing.set_timesteps(4)
    assert float(drawing.timesteps[0]) == 999, "drawing starts at pure noise"


def test_zero_terminal_snr_without_v_prediction_is_told_at_its_setting() -> None:
    with pytest.raises(UserError, match="needs a model with v-prediction") as told:
        down_to_noise(DDPMScheduler())
    assert told.value.place == "model.zero_terminal_snr"


def test_an_unknown_prediction_is_told() -> None:
    with pytest.raises(UserError, match="sample"):
        Objective(model("sample"), min_snr_gamma=5.0, noise_offset=0.0)


def test_draws_depend_on_seed_step_and_index_alone() -> None:
    objective = Objective(model("epsilon"), min_snr_gamma=5.0, noise_offset=0.1)
    shape = torch.Size((4, 2, 2))
    assert torch.equal(objective.draw_noise(shape, 1, 2, 3), objective.draw_noise(shape, 1, 2, 3))
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(objective.draw_noise(shape, 1, 2, 3), objective.draw_noise(shape, *other))
    drawn = [objective.draw_timestep(0, step, 0) for step in range(2000)]
    assert min(drawn) >= 0 and max(drawn) <= 999 and 450 < sum(drawn) / 2000 < 550
