"""Reads settings that programs write as plain JSON: InvokeAI, SwarmUI, Fooocus, NovelAI, Easy Diffusion."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.restore import Lora, Restored, build_recipe, find_scheduler

NAMES = {
    "prompt": ("positive_prompt", "prompt", "positive_conditioning"),
    "negative": ("negative_prompt", "negativeprompt", "uc"),
    "seed": ("seed", "noise_seed"),
    "steps": ("steps", "num_inference_steps"),
    "guidance": ("cfg_scale", "cfgscale", "guidance_scale", "scale", "cfg"),
    "scheduler": ("scheduler", "sampler", "sampler_name"),
    "width": ("width",),
    "height": ("height",),
    "clip_skip": ("clip_skip",),
    "model": ("model", "model_name", "base_model", "model_weights", "use_stable_diffusion_model"),
}
"""What each value is called there, most usual first."""


def read_json(text: str | Mapping[str, Any], program: str) -> Restored:
    """The recipe in a program's JSON. Raises UserError when it has no prompt. Any: JSON's own values."""
    try:
        data = json.loads(text) if isinstance(text, str) else dict(text)
        for wrapper in ("sui_image_params", "image", "meta"):
            if isinstance(data.get(wrapper), dict):
                data = {**data, **data[wrapper]}
        data = {str(key).lower().replace(" ", "_"): value for key, value in data.items()}
        values = {field: next((data[n] for n in names if n in data), None) for field, names in NAMES.items()}
        values["prompt"] = _join(values["prompt"])
        values["negative"] = _join(values["negative"])
        values["model"] = _name(values["model"])
        size = re.fullmatch(r"\(?(\d{1,5})\D{1,5}(\d{1,5})\)?", str(data.get("resolution", "")))
        if size:
            values |= {"width": size[1], "height": size[2]}
        scheduler, note = find_scheduler(values["scheduler"], data.get("noise_schedule"))
        notes = [f"Read from the settings that {program} wrote; parts that are not in the form are not used.", note]
        if data.get("init_image") or str(data.get("generation_mode", "")).endswith(("img2img", "inpaint", "outpaint")):
            notes.append("The image was made from another image, which is not in the file.")
        loras = _loras(data)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        raise UserError(
            f"The {program} settings in this image cannot be read.", "They are damaged.", "Choose another image."
        ) from None
    return build_recipe({**values, "scheduler": scheduler}, loras=loras, notes=tuple(filter(None, notes)))


def _join(prompt: Any) -> str:
    """A prompt as text; older InvokeAI wrote a list of parts with weights."""
    if isinstance(prompt, list):
        return " ".join(str(part.get("prompt", "") if isinstance(part, dict) else part) for part in prompt)
    return prompt if isinstance(prompt, str) else ""


def _name(model: Any) -> str:
    """The name of a model, which InvokeAI describes at length."""
    if isinstance(model, dict):
        model = next((model[key] for key in ("name", "model_name", "key") if isinstance(model.get(key), str)), "")
    return re.split(r"[\\/]", model)[-1].removesuffix(".safetensors") if isinstance(model, str) else ""


def _loras(data: Mapping[str, Any]) -> tuple[Lora, ...]:
    """InvokeAI: objects with a weight. SwarmUI: names, and weights in a list of their own. Fooocus: [name, weight]."""
    listed = data.get("loras")
    found: list[Lora] = []
    if isinstance(listed, list):
        weights = data.get("loraweights")
        for number, lora in enumerate(listed):
            if isinstance(lora, dict):
                model = next((lora[key] for key in ("model", "lora") if key in lora), lora.get("name"))
                found.append(Lora(_name(model), lora.get("weight", 1.0)))
            elif isinstance(lora, list) and len(lora) > 1:
                found.append(Lora(lora[0], lora[1]))
            else:
                weight = weights[number] if isinstance(weights, list) and number < len(weights) else 1.0
                found.append(Lora(lora, weight))
    for key, value in data.items():
        if re.fullmatch(r"lora_(combined_)?\d+", key) and isinstance(value, str) and " : " in value:
            name, _, weight = value.rpartition(" : ")
            found.append(Lora(name, weight))
    return tuple(found)
