"""What the adapters learn: the noise (ε) or the velocity (v), weighted by min-SNR.

ε: Ho et al. 2020, arXiv:2006.11239, eq. 14.  v = α ε − σ x: Salimans and Ho 2022, arXiv:2202.00512, app. D.
Min-SNR: Hang et al. 2023, arXiv:2303.09556, eq. 9: ε min(SNR, γ)/SNR, v min(SNR, γ)/(SNR + 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reparam_diffusion.errors import UserError
from reparam_diffusion.maths.chance import generator
from reparam_diffusion.models.encode import Encoded
from reparam_diffusion.models.load import Model

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Noised:
    """One batch ready for the UNet. latents and noise (batch, channels, height, width), timesteps (batch,).

    `places` (batch, height, width) is how much the loss counts at each latent; None where all count alike.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    places: Tensor | None = None


class Objective:
    """The forward process of one model and the loss on its prediction.

    `gamma` is min-SNR's, 0 where a model's noise ends in pure noise: its weight falls to 0 there, so that the last
    steps, for whose sake such noise is chosen, would learn nothing.
    """

    def __init__(self, model: Model, *, min_snr_gamma: float, noise_offset: float) -> None:
        from diffusers import DDPMScheduler

        self.scheduler: Any = DDPMScheduler.from_config(model.scheduler.config)
        self.prediction = model.prediction_type
        self.noise_offset = noise_offset
        if self.prediction not in PREDICTIONS:
            raise UserError(
                f"The model predicts {self.prediction}.",
                "Training knows epsilon and v_prediction.",
                "Use another model.",
            )
        ends_in_noise = float(self.scheduler.alphas_cumprod[-1]) < 1e-6
        self.gamma = 0.0 if ends_in_noise else min_snr_gamma
        if self.prediction == "epsilon" and float(self.scheduler.alphas_cumprod[-1]) <= 0:
            raise UserError(
                "This model has zero-terminal SNR with epsilon prediction.",
                "At the last timestep there is no picture left in the noise to learn from.",
                "Use its v-prediction version, or switch rescale_betas_zero_snr off in its scheduler.",
            )

    def draw_timestep(self, seed: int, step: int, index: int) -> int:
        """Uniform over the schedule, a function of (seed, step, index)."""
        chance = generator(seed, step, index, "timestep")
        return int(torch.randint(self.scheduler.config.num_train_timesteps, (1,), generator=chance))

    def draw_noise(self, shape: torch.Size, seed: int, step: int, index: int) -> Tensor:
        """Standard normal (channels, height, width), with one extra offset a channel when asked."""
        noise = torch.randn(shape, generator=generator(seed, step, index, "noise"))
        if self.noise_offset:
            offset = torch.randn(shape[0], 1, 1, generator=generator(seed, step, index, "offset"))
            noise = noise + self.noise_offset * offset
        return noise

    def losses(self, unet: Any, batch: Noised, text: Encoded, time_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Weighted squared error of each picture (batch,), in fp32."""
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        added = None
        if text.pooled is not None:
            added = {"text_embeds": text.pooled.to(dtype), "time_ids": time_ids}
        predicted = unet(
            noisy.to(dtype), batch.timesteps, text.hidden.to(dtype), added_cond_kwargs=added, return_dict=False
        )[0]
        target = batch.noise
        if self.prediction == "v_prediction":
            target = self.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        error = _mean((predicted.float() - target).square(), batch.places)
        return error * self.weights(batch.timesteps)

    def weights(self, timesteps: Tensor) -> Tensor:
        """Min-SNR weight of each timestep (batch,); ones when gamma is 0."""
        if not self.gamma:
            return torch.ones_like(timesteps, dtype=torch.float32)
        from diffusers.training_utils import compute_snr

        snr = compute_snr(self.scheduler, timesteps).float()
        capped = snr.clamp(max=self.gamma)
        return capped / (snr if self.prediction == "epsilon" else snr + 1)


def _mean(error: Tensor, places: Tensor | None) -> Tensor:
    """Each picture's mean (batch,) over channels and latents, Σ w·e / Σ w: a small mask learns like a large one."""
    if places is None:
        return error.mean(dim=(1, 2, 3))
    return (error.mean(dim=1) * places).sum(dim=(1, 2)) / places.sum(dim=(1, 2))
