"""Captions for pictures that have none, from a BLIP or Florence-2 model in a local folder, by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.precision import pick_device
from reparam_diffusion.models.quiet import quiet

if TYPE_CHECKING:
    from PIL.Image import Image

FLORENCE_TASK = "<CAPTION>"
MOST_TOKENS = 48
_KINDS = ("blip", "florence2")


def load_describer(folder: Path, *, device: str = "auto") -> Callable[[Image], str]:
    """A function from an RGB picture to a plain sentence. Raises UserError for a folder that holds no such model."""
    kind = _kind_of(folder)
    place = pick_device(device)
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        with quiet():
            processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)  # Any: the model's own class
            model: Any = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"The model in {folder.name} could not be loaded.",
            str(error).strip().splitlines()[0],
            "Use a whole BLIP or Florence-2 folder with .safetensors weights.",
        ) from error
    model = model.to(place).eval()
    task = {"text": FLORENCE_TASK} if kind == "florence2" else {}

    @torch.no_grad()
    def describe(image: Image) -> str:
        inputs = processor(images=image, return_tensors="pt", **task).to(place)
        tokens = model.generate(**inputs, max_new_tokens=MOST_TOKENS, num_beams=3, do_sample=False)
        return " ".join(processor.batch_decode(tokens, skip_special_tokens=True)[0].split()).rstrip(".")

    return describe


def _kind_of(folder: Path) -> str:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = found.get("model_type", "") if isinstance(found, dict) else ""
    except (OSError, ValueError):
        raise UserError(
            f"{folder} holds no model.", "It has no config.json that can be read.", "Give the folder of a BLIP model."
        ) from None
    if kind not in _KINDS:
        raise UserError(
            f"{folder.name} is not a model that describes pictures.",
            f"It is of the kind {kind or 'unknown'}.",
            "Use BLIP (image captioning) or Florence-2.",
        )
    return str(kind)
