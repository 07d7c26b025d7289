"""Settings that cannot be, told before anything is made or loaded."""

from __future__ import annotations

from reparam_diffusion.config import TrainConfig
from reparam_diffusion.errors import UserError
from reparam_diffusion.models.parts import make_scheduler
from reparam_diffusion.models.schedulers import down_to_noise
from reparam_diffusion.models.source import find_source
from reparam_diffusion.training.embedding import check_trigger
from reparam_diffusion.training.optim import check_optimizer


def check_settings(config: TrainConfig) -> None:
    """Raise UserError, with its place, for settings that exclude each other or need what is not installed."""
    check_optimizer(config)
    check_trigger(config)
    _check_noise(config)
    if config.model.block_offload and config.training.compile:
        raise UserError(
            "Compiled blocks cannot be offloaded.",
            do="Switch training.compile or model.block_offload off.",
            place="training.compile",
        )


def _check_noise(config: TrainConfig) -> None:
    """Whether the model can be trained down to pure noise; one that is not on this machine is asked in its run."""
    model = config.model
    if not model.zero_terminal_snr or model.prediction_type == "v_prediction":
        return
    try:
        own = make_scheduler(find_source(model.path, fetch=False).configs)
    except UserError:
        return
    if model.prediction_type != "auto":
        own = type(own).from_config(own.config, prediction_type=model.prediction_type)
    down_to_noise(own)
