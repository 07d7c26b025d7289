"""Settings that cannot be, told before anything is made or loaded."""

from __future__ import annotations

from reparam_diffusion.config import TrainConfig
from reparam_diffusion.errors import UserError
from reparam_diffusion.training.embedding import check_trigger
from reparam_diffusion.training.optim import check_optimizer


def check_settings(config: TrainConfig) -> None:
    """Raise UserError, with its place, for settings that exclude each other or need what is not installed."""
    check_optimizer(config)
    check_trigger(config)
    if config.model.block_offload and config.training.compile:
        raise UserError(
            "Compiled blocks cannot be offloaded.",
            do="Switch training.compile or model.block_offload off.",
            place="training.compile",
        )
