"""Loading a single-file checkpoint, part by part: the original names become diffusers', with our configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.checkpoint import TEXT, UNET, VAE, Checkpoint, read_header
from reparam_diffusion.models.parts import Parts, clip_tokenizers, empty_parts, make_scheduler

State = dict[str, Tensor]


def load_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype) -> Parts:
    """The parts of a checkpoint, the VAE in fp32. Raises UserError when some of it is missing."""
    return fill_parts(checkpoint, dtype, lambda prefix: read_tensors(checkpoint.file, prefix))


def fill_parts(checkpoint: Checkpoint, dtype: torch.dtype, read: Callable[[str], State]) -> Parts:
    """The same with the tensors under a prefix from `read`, one part after the other so that little is held at once."""
    from accelerate import init_empty_weights
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    name, configs = checkpoint.file.name, checkpoint.configs
    with init_empty_weights(include_buffers=False):
        parts = empty_parts(configs)
    fill(parts.unet, convert_ldm_unet_checkpoint(read(UNET), dict(parts.unet.config)), dtype, name=f"{name}: the UNet")
    fill_vae(parts.vae, read(VAE), name=f"{name}: the VAE")
    for number, (encoder, prefix) in enumerate(zip(parts.text_encoders, TEXT[checkpoint.kind], strict=True), 1):
        fill(encoder, text_state(encoder, read(prefix), prefix), dtype, name=f"{name}: text encoder {number}")
    parts.tokenizers = clip_tokenizers(configs)
    changes: dict[str, object] = {"prediction_type": "v_prediction" if checkpoint.is_v_prediction else "epsilon"}
    if checkpoint.zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    parts.scheduler = make_scheduler(configs, **changes)
    return parts


def read_tensors(file: Path, prefix: str) -> State:
    """The tensors whose keys begin so."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys() if key.startswith(prefix)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file.name} cannot be read.", str(error), "Download it again.") from None


def text_state(encoder: Any, tensors: State, prefix: str) -> State:
    """A text encoder's tensors in transformers' names: CLIP's are in them already, OpenCLIP's are not."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    if prefix.endswith(".model."):
        state = convert_open_clip_checkpoint(encoder, tensors, prefix=prefix)
    else:
        state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    wraps = hasattr(encoder, "text_model")  # CLIPTextModelWithProjection does, CLIPTextModel does no longer
    return state if wraps else {key.removeprefix("text_model."): tensor for key, tensor in state.items()}


def fill(module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype, *, name: str) -> None:
    """Put a state into an empty module. What the module does not know is left out; what it lacks is an error."""
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    if missing:
        raise UserError(
            f"{name} is not whole.", f"It lacks {len(missing)} tensors, such as {missing[0]}.", "Get the file again."
        )
    for key, tensor in wanted.items():
        if state[key].shape != tensor.shape:
            raise UserError(
                f"{name} has another shape than its family.",
                f"{key} is {tuple(state[key].shape)}, not {tuple(tensor.shape)}.",
                "Use a model of the usual shape.",
            )
    module.load_state_dict({key: state[key].to(dtype) for key in wanted}, assign=True)


def fill_vae(vae: Any, tensors: State, *, name: str) -> None:
    """Put a VAE's tensors, in either naming, into an empty VAE, in fp32."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    is_original = any("encoder.down.0." in key for key in tensors)
    state = convert_ldm_vae_checkpoint(tensors, dict(vae.config)) if is_original else tensors
    fill(vae, state, torch.float32, name=name)


def load_vae(path: Path, configs: Path) -> Any:
    """A VAE by itself: a folder in diffusers' layout, or a single file in either naming, for a model's family."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL
    from safetensors import SafetensorError

    if path.is_dir():
        folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
        try:
            return AutoencoderKL.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"The VAE {path.name} could not be loaded.", reason, "Check the folder.") from error
    if not path.is_file():
        raise UserError(f'There is no VAE at "{path}".', do="Check the path.", place="model.vae")
    read_header(path)
    with init_empty_weights(include_buffers=False):
        vae = empty_parts(configs).vae
    tensors = read_tensors(path, "")
    fill_vae(vae, tensors, name=path.name)
    return vae
