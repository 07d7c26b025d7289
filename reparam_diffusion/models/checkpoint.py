"""What a single-file checkpoint is, told from its header alone: family, prediction, and what cannot be used.

The keys are the original Stable Diffusion's. No weights are read, but for one small tensor of a 2.x model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.parts import MODEL_CONFIGS

Kind = Literal["sd1", "sd2-base", "sd2-768-v", "sdxl"]
Shapes = Mapping[str, tuple[int, ...]]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT: dict[Kind, tuple[str, ...]] = {
    "sd1": ("cond_stage_model.transformer.",),
    "sd2-base": ("cond_stage_model.model.",),
    "sd2-768-v": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
"""Where each text encoder's keys begin."""
_FIRST = f"{UNET}input_blocks.0.0.weight"
_TELLING = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SPREAD = 0.09
"""The 2.x models with v-prediction have this bias spread wider, those with ε narrower (ComfyUI's rule)."""
_OTHERS = {
    "double_blocks.": "a Flux model",
    "joint_blocks.": "a Stable Diffusion 3 model",
    "lora_": "an adapter, not a base model",
    "lycoris_": "an adapter, not a base model",
    "lora_A.": "an adapter, not a base model",
    "control_model.": "a ControlNet",
    "down_blocks.": "one part of a model in diffusers' layout",
    "decoder.": "a VAE, not a whole model",
}
"""Piece of a key -> what such a file is."""


@dataclass(frozen=True)
class Checkpoint:
    """A single file that can be used. `zero_snr`: its schedule ends in pure noise."""

    file: Path
    kind: Kind
    is_v_prediction: bool
    zero_snr: bool = False

    @property
    def configs(self) -> Path:
        """Our configuration folder for its kind."""
        return MODEL_CONFIGS / self.kind


def read_header(file: Path) -> tuple[Shapes, dict[str, str]]:
    """Shapes by key, and the metadata. Raises UserError for what is no whole .safetensors file."""
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file.name} is not a .safetensors file.",
            "Pickled checkpoints can run code and are never opened.",
            "Convert it to safetensors first.",
        )
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = file.stat().st_size
            if length > size - 8:
                raise ValueError("it ends within its header")
            header = json.loads(stream.read(length))
        metadata: dict[str, str] = header.pop("__metadata__", {})
        shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
        whole = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file.name} cannot be read.", f"{error}.".capitalize(), "Download it again.") from None
    if size < whole:
        raise UserError(
            f"{file.name} is cut short.", f"It has {size:,} of {whole:,} bytes.", "Download it again to the end."
        )
    return shapes, metadata


def read_checkpoint(file: Path) -> Checkpoint:
    """What a checkpoint is. Raises UserError, naming it, for what cannot be trained or drawn with."""
    shapes, metadata = read_header(file)
    if _FIRST not in shapes:
        raise _no_checkpoint(file, shapes)
    _refuse_special(file, shapes)
    kind = _kind_of(file, shapes)
    prefixes = (VAE, *TEXT[kind])
    missing = [prefix for prefix in prefixes if not any(key.startswith(prefix) for key in shapes)]
    if missing:
        raise UserError(
            f"{file.name} holds only a part of the model.",
            f"There is nothing under {missing[0]} in it.",
            "Get the whole checkpoint, with its VAE and text encoders.",
        )
    told = metadata.get("modelspec.prediction_type", "")
    is_v = "v_pred" in shapes or told.startswith("v")
    if kind.startswith("sd2") and not told and not is_v:
        is_v = _is_spread(file)
    if kind.startswith("sd2"):
        kind = "sd2-768-v" if is_v else "sd2-base"
    return Checkpoint(file, kind, is_v, zero_snr="ztsnr" in shapes)


def _kind_of(file: Path, shapes: Shapes) -> Kind:
    """The family, by the width of the text that the UNet reads."""
    widths = {shape[1] for key, shape in shapes.items() if key.startswith(UNET) and key.endswith("attn2.to_k.weight")}
    kinds: dict[int, Kind] = {768: "sd1", 1024: "sd2-base", 2048: "sdxl"}
    if len(widths) != 1 or not widths & kinds.keys():
        raise UserError(
            f"{file.name} is no Stable Diffusion 1.x, 2.x or XL model.",
            f"Its UNet reads text of width {', '.join(str(width) for width in sorted(widths)) or 'nothing'}.",
            "Use a model of one of these families.",
        )
    return kinds[widths.pop()]


def _refuse_special(file: Path, shapes: Shapes) -> None:
    """Raise UserError for variants of the families that are made for something else."""
    channels = shapes[_FIRST][1]
    names = {9: "an inpainting model", 8: "an editing model (InstructPix2Pix)", 7: "an upscaler", 5: "a depth model"}
    why = f"Its UNet reads {channels} channels, not 4."
    name = names.get(channels, "" if channels == 4 else "a model for another purpose")
    is_refiner = any(key.startswith("conditioner.embedders.0.model.") for key in shapes)
    if is_refiner:
        name, why = "the SDXL refiner", "It only finishes what the base model has begun."
    if "edm_mean" in shapes or any(key.startswith("edm_vpred") for key in shapes):
        name, why = "an EDM model", "Its noise follows another schedule."
    if name:
        raise UserError(f"{file.name} is {name}.", why, "Train on the plain version of the model.")


def _no_checkpoint(file: Path, shapes: Shapes) -> UserError:
    found = next((name for piece, name in _OTHERS.items() if any(piece in key for key in shapes)), "")
    why = "It has no UNet in the original Stable Diffusion layout."
    if found:
        return UserError(f"{file.name} is {found}.", why, "Give a Stable Diffusion 1.x, 2.x or XL checkpoint.")
    return UserError(f"{file.name} is not a Stable Diffusion checkpoint.", why, "Check the file.")


def _is_spread(file: Path) -> bool:
    """Whether the telling bias says v-prediction; nothing else in a 2.x file does."""
    from safetensors import safe_open

    with safe_open(str(file), "pt") as tensors:
        return float(tensors.get_tensor(_TELLING).float().std(unbiased=False)) > _SPREAD
