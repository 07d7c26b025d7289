"""The base model as a run wants it: in its number format, keeping or recomputing, compiled or not."""

from __future__ import annotations

import torch

from reparam_diffusion.config import TrainConfig
from reparam_diffusion.models.load import Model, load_model
from reparam_diffusion.models.outline import outline
from reparam_diffusion.models.precision import DTYPES, faster_on_cpu, name_of, pick_device, pick_precision
from reparam_diffusion.training.batch import teaches_text
from reparam_diffusion.training.processes import Processes, join_processes


def load_base(config: TrainConfig, *, precision: str) -> tuple[Model, Processes]:
    """The base model in a number format ("auto" takes the faster one), and the processes that train it together."""
    processes = join_processes(pick_device(config.model.device))
    assert processes.device is not None
    # The first process decides: each would measure for itself, and two may come to different answers.
    name = name_of(dtype_of(config.model.path, precision, processes.device)) if processes.is_main else ""
    dtype = DTYPES[processes.agree(name)]
    model = load_model(
        config.model.path,
        device=processes.device,
        dtype=dtype,
        vae=config.model.vae,
        prediction_type=config.model.prediction_type,
        zero_terminal_snr=config.model.zero_terminal_snr,
    )
    return model, processes


def dtype_of(path: str, precision: str, device: torch.device) -> torch.dtype:
    """The number format that a run trains a model in; on a CPU "auto" is measured, before any weight is loaded."""
    if precision == "auto" and device.type == "cpu":
        return faster_on_cpu(outline(path, fetch=True).unet)
    return pick_precision(precision, device)


def make_ready(model: Model, config: TrainConfig) -> None:
    """Switch on what the settings ask of the model, after the adapters are attached."""
    if config.training.gradient_checkpointing:
        recompute(model, text=teaches_text(config))
    if config.training.compile:
        model.unet.compile_repeated_blocks()


def recompute(model: Model, *, text: bool) -> None:
    """Let the UNet, and with `text` the text encoders, compute activations again on the way back."""
    model.unet.enable_gradient_checkpointing()
    for encoder in model.text_encoders if text else []:
        encoder.train()  # transformers recomputes only in training mode; CLIP has no dropout
        enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
        enable({"use_reentrant": False})


def keep(model: Model) -> None:
    """The inverse of `recompute`."""
    model.unet.disable_gradient_checkpointing()
    for encoder in model.text_encoders:
        encoder.eval()
        disable = getattr(encoder, "activation_checkpointing_disable", encoder.gradient_checkpointing_disable)
        disable()
