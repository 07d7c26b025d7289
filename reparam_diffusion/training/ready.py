"""The base model as a run wants it: in its number format, keeping or recomputing, compiled or not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from reparam_diffusion.config import TrainConfig
from reparam_diffusion.models.eightbit import Linear8bit
from reparam_diffusion.models.load import Model, load_model
from reparam_diffusion.models.outline import outline, outline_vae
from reparam_diffusion.models.precision import DTYPES, faster_on_cpu, name_of, pick_device, pick_precision
from reparam_diffusion.training.batch import teaches_text, text_is_live
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
        base_8bit=config.model.base_8bit,
        block_offload=config.model.block_offload,
        staged=True,
    )
    return model, processes


def outline_for(config: TrainConfig, device: torch.device) -> Model:
    """The run's base model without its numbers, in the format that `load_base` would load it in."""
    dtype = dtype_of(config.model.path, config.model.precision, device)
    model = outline(config.model.path, dtype=dtype, base_8bit=config.model.base_8bit)
    vae = outline_vae(config.model.vae)
    return model if vae is None else replace(model, vae=vae)


def at_work(model: Model, config: TrainConfig) -> AbstractContextManager[None]:
    """While the body runs, what training computes with is on the device, and nothing else has to be."""
    return model.using(model.unet, *(model.text_encoders if text_is_live(config) else []))


def recomputes(config: TrainConfig) -> bool:
    """Whether activations are computed again on the way back: as asked, or because offloaded blocks need it."""
    return config.training.gradient_checkpointing or config.model.block_offload


def dtype_of(path: str, precision: str, device: torch.device) -> torch.dtype:
    """The number format that a run trains a model in; on a CPU "auto" is measured, before any weight is loaded."""
    if precision == "auto" and device.type == "cpu":
        return faster_on_cpu(outline(path, fetch=True).unet)
    return pick_precision(precision, device)


def settled(model: Model, config: TrainConfig) -> list[str]:
    """What the settings of the base model come to here, where that is not what they say."""
    notes = []
    if config.model.block_offload and model.device.type != "cuda":
        notes.append("There is nothing to offload the blocks from: only a CUDA card has memory of its own.")
    if recomputes(config) and not config.training.gradient_checkpointing:
        notes.append("Gradient checkpointing is on: block_offload needs it.")
    if config.model.base_8bit and not any(isinstance(inner, Linear8bit) for inner in model.unet.modules()):
        notes.append("The model has no linear layers large enough for 8 bits: it stays as it is.")
    return notes


def make_ready(model: Model, config: TrainConfig) -> None:
    """Switch on what the settings ask of the model, after the adapters are attached."""
    if recomputes(config):
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
