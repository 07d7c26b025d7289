"""Every scheduler draws, early looks come near the picture, and what a model cannot do is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from studio_tiny import FAST
from tiny_pipelines import save_tiny

from reparam_diffusion.errors import UserError
from reparam_diffusion.models import decode, sample
from reparam_diffusion.models.glance import glance_at
from reparam_diffusion.models.load import load_model
from reparam_diffusion.models.schedulers import SCHEDULERS, make_scheduler, own_name
from reparam_diffusion.models.source import STARTER


def keeper(rounds: list[list[Image.Image]]) -> sample.OnLook:
    return lambda number, new: rounds.append(new)


def difference(one: Image.Image, other: Image.Image) -> float:
    return float(np.mean(np.asarray(ImageChops.difference(one, other))))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_scheduler_draws_and_its_early_looks_end_near_the_picture(
    family: str, prediction: str, tmp_path: Path
) -> None:
    model = load_model(save_tiny(tmp_path / "model", family, prediction=prediction), device="cpu")
    for name in SCHEDULERS:
        rounds: list[list[Image.Image]] = []
        options = FAST | {"steps": 8, "guidance": 1.5, "scheduler": name}
        picture = sample.draw(model, "a toy", seeds=[1], on_look=keeper(rounds), **options)[0]
        early = [new[0] for new in rounds]
        assert len(early) >= 3 and picture.getextrema() != ((0, 0),) * 3
        far = [difference(look.resize(picture.size), picture) for look in early]
        assert far[-1] <= far[0], name


def test_the_expected_latents_of_a_perfect_model_are_the_clean_ones() -> None:
    """However a scheduler scales its noise: x₀ comes back from x_t and the true ε or v."""
    model_like = load_model(STARTER, device="cpu").scheduler
    clean, noise = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    for prediction in ("epsilon", "v_prediction"):
        for name in SCHEDULERS:
            scheduler = make_scheduler(
                type(model_like).from_config(model_like.config, prediction_type=prediction), name
            )
            scheduler.set_timesteps(10)
            timestep = scheduler.timesteps[2]
            bar = scheduler.alphas_cumprod[int(timestep)]
            noisy = bar.sqrt() * clean + (1 - bar).sqrt() * noise
            output = noise if prediction == "epsilon" else bar.sqrt() * noise - (1 - bar).sqrt() * clean
            is_wide = name.startswith(("Euler", "Heun"))  # these keep x = x₀ + σ ε and scale what the UNet sees
            sigma = ((1 - bar) / bar).sqrt()
            given = noisy * (1 + sigma**2).sqrt() if is_wide else noisy
            if is_wide:
                scheduler.sigmas[2] = sigma
            found = decode.expected(scheduler, output, timestep, given)
            torch.testing.assert_close(
                found, clean, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_scheduler_that_cannot_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "model", "sd1", prediction="v_prediction", zero_snr=True), device="cpu")
    assert own_name(model.scheduler) == "DDIM"
    with pytest.raises(UserError, match="zero terminal SNR"):
        make_scheduler(model.scheduler, "Heun")
    with pytest.raises(UserError, match="Choose one of DDIM"):
        make_scheduler(model.scheduler, "Quantum")


def test_a_glance_says_what_the_loaded_model_says() -> None:
    model, seen = load_model(STARTER, device="cpu"), glance_at("starter")
    assert (seen.size, seen.size_step, seen.habits) == (model.size, model.size_step, model.habits)
    assert glance_at("someone/unknown").size is None
