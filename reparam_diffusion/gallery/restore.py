"""Settings of an image that another program made: what can be used becomes a recipe, the rest a note."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.recipe import LONGEST, MOST_ADAPTERS, Recipe
from reparam_diffusion.models.lora_tags import STRONGEST, parse_tags
from reparam_diffusion.models.sample import finite
from reparam_diffusion.models.schedulers import SCHEDULERS
from reparam_diffusion.printable import remove_control

LABELS = {
    "negative": "Negative prompt",
    "seed": "Seed",
    "steps": "Steps",
    "guidance": "CFG scale",
    "scheduler": "Sampler",
    "width": "Width",
    "height": "Height",
    "clip_skip": "Clip skip",
    "model": "Model",
    "vae": "VAE",
    "prediction_type": "Prediction type",
    "image": "Start image",
    "mask": "Mask",
    "denoise": "Denoising strength",
}
"""A recipe's fields as other programs call them."""
_PLAIN_SCHEDULES = ("", "automatic", "normal", "simple", "uniform", "sgmuniform", "native")
_ALIASES = {
    "eulera": "Euler a", "eulerancestral": "Euler a", "eulerancestraldiscrete": "Euler a", "eulerdiscrete": "Euler",
    "dpm2m": "DPM++ 2M", "dpmsolvermultistep": "DPM++ 2M", "dpmpp2msdegpu": "DPM++ 2M SDE", "heundiscrete": "Heun",
    "pndm": "PLMS", "unipcmultistep": "UniPC", "ddiminverse": "DDIM",
}  # fmt: skip


@dataclass(frozen=True)
class Restored:
    """A recipe out of an image, and a sentence for everything in the image that it does not use."""

    recipe: Recipe
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lora:
    """An adapter as another program names it; `text_strength` None is the same as `strength`. Any: unchecked values."""

    name: Any
    strength: Any = 1.0
    text_strength: Any = None


def build_recipe(
    values: Mapping[str, Any], *, loras: tuple[Lora, ...] = (), notes: tuple[str, ...] = (), unet_first: bool = False
) -> Restored:
    """A recipe out of another program's values; each that cannot be used is left out with a note.

    `unet_first` is the order of two numbers in the prompt's tags, as `parse_tags`. Raises UserError without a prompt.
    Any: values as another program wrote them.
    """
    told = list(notes)
    prompt = parse_tags(
        remove_control(str(values.get("prompt") or ""))[:LONGEST], is_restored=True, unet_first=unet_first
    )
    told += prompt.notes
    if not prompt.text:
        raise UserError(
            "This image has no prompt.", "Its other settings cannot be used without one.", "Choose another image."
        )
    given = {key: value for key, value in values.items() if value not in (None, "") and key != "prompt"}
    if isinstance(given.get("negative"), str):
        given["negative"] = remove_control(given["negative"])[:LONGEST]
    tags = [Lora(tag.name, tag.strength, tag.text_strength) for tag in prompt.tags]
    uses = [use for lora in (*loras, *tags) if (use := _use_lora(lora, told)) is not None]
    if len(uses) > MOST_ADAPTERS:
        told.append(f"The image uses {len(uses)} adapters; only the first {MOST_ADAPTERS} are restored.")
    given |= {"prompt": prompt.text, "adapters": uses[:MOST_ADAPTERS], "negative": given.get("negative", "")}
    while True:
        try:
            return Restored(Recipe.model_validate(given), tuple(dict.fromkeys(told)))
        except ValidationError as error:
            place = error.errors()[0]["loc"]
            key = str(place[0]) if place else "mask"
            if key not in given or key in ("prompt", "adapters"):
                raise UserError("The settings in this image cannot be read.", do="Choose another image.") from None
            told.append(f"{LABELS.get(key, key)} {str(given.pop(key))[:60]!r} cannot be used; the default is.")


def _use_lora(lora: Lora, told: list[str]) -> dict[str, Any] | None:
    """An adapter as a recipe names it: without the folder and the ending that it had in another program."""
    name = remove_control(str(lora.name)).strip()
    if name.endswith(".safetensors") and not name.startswith("runs/"):  # which is a checkpoint of a run of ours
        name = re.split(r"[\\/]", name)[-1].removesuffix(".safetensors").strip()
    name = re.sub(r"[<>:\n]", "", name)[:400]
    if not name:
        told.append("An adapter without a name was left out.")
        return None
    strengths: list[float | None] = []
    for value in (lora.strength, lora.text_strength):
        try:
            number = None if value is None else finite(str(value))
        except ValueError:
            told.append(f"The strength {str(value)[:40]!r} of {name} is not a number; 1 is used.")
            number = 1.0
        if number is not None and abs(number) > STRONGEST:
            limit = STRONGEST if number > 0 else -STRONGEST
            told.append(f"The strength {number:g} of {name} is out of range; {limit:g} is used.")
            number = limit
        strengths.append(number)
    strength, text = strengths
    return {"name": name, "strength": strength, "te_strength": None if text == strength else text}


def find_scheduler(sampler: object, schedule: object = "") -> tuple[str, str]:
    """Our name for another program's sampler and schedule, "" where there is none, and a note where it is another one.

    Known are A1111's names, ComfyUI's, InvokeAI's and diffusers' classes.
    """
    if not isinstance(sampler, str) or not sampler.strip():
        return "", ""
    known = {_plain(name): name for name in SCHEDULERS} | _ALIASES
    word, kind = _plain(sampler), _plain(str(schedule or ""))
    for ending in ("karras", "k"):
        if word not in known and word.endswith(ending) and len(word) > len(ending):
            word, kind = word.removesuffix(ending), "karras"
            break
    name = known.get(word) or known.get(word.removeprefix("k")) or ""
    shown = " ".join(str(part)[:60] for part in (sampler, schedule) if part)
    if not name:
        return "", f'The sampler "{shown}" is not available here; the model\'s default is used.'
    if kind == "karras" and f"{name} Karras" in SCHEDULERS:
        return f"{name} Karras", ""
    return name, "" if kind in _PLAIN_SCHEDULES else f'The sampler "{shown}" is not available here; "{name}" is used.'


def _plain(name: str) -> str:
    return re.sub(r"[\s_\-]", "", name.lower()).replace("++", "pp").removesuffix("scheduler")
