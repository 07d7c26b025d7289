"""Reads A1111's "parameters" text, as Forge, SD.Next and others write it too, and our own."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.recipe import NEGATIVE, SOURCE
from reparam_diffusion.gallery.restore import Restored, build_recipe, find_scheduler
from reparam_diffusion.models.habits import DENOISE

_LONGEST = 200_000  # characters that are looked into
_PAIR = re.compile(r'\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NOT_USED = {
    "hires": "hires fix",
    "controlnet": "ControlNet",
    "adetailer": "ADetailer",
    "refiner": "refiner",
    "variation seed": "variation seed",
    "tiling": "tiling",
    "face restoration": "face restoration",
    "regional prompter": "Regional Prompter",
    "rp ": "Regional Prompter",
    "freeu": "FreeU",
    "dynthres": "dynamic thresholding",
    "token merging": "token merging",
}
"""How keys of settings begin that change an image and are not supported, and what they belong to."""


def read_infotext(text: str) -> Restored:
    """The recipe in a text. Raises UserError when it has no settings, or no prompt."""
    lines = text[:_LONGEST].strip().split("\n")
    found = next((n for n in reversed(range(len(lines))) if _has_settings(lines[n])), None)
    if found is None:
        raise UserError("There are no settings in this image.", "Its text is not in a known form.", "Use another one.")
    pairs = _read_pairs(lines[found])
    start = next((n for n, line in enumerate(lines[:found]) if line.startswith(NEGATIVE)), found)
    notes = []
    width, _, height = pairs.get("size", "").partition("x")
    scheduler, note = find_scheduler(pairs.get("sampler"), pairs.get("schedule type"))
    notes.append(note)
    values: dict[str, Any] = {  # Any: text, which becomes numbers or notes
        "prompt": "\n".join(lines[:start]).removeprefix("Prompt: "),
        "negative": "\n".join(lines[start:found]).removeprefix(NEGATIVE).strip(),
        "seed": pairs.get("seed"),
        "steps": pairs.get("steps"),
        "guidance": pairs.get("cfg scale", pairs.get("guidance scale")),
        "scheduler": scheduler,
        "width": width or pairs.get("width"),
        "height": height or pairs.get("height"),
        "model": pairs.get("model"),
    }
    skip = pairs.get("clip skip", "")
    values["clip_skip"] = max(0, int(skip) - 1) if skip.isdecimal() and len(skip) < 3 else 0
    if pairs.get("vae", "").lower() not in ("", "automatic", "none"):
        values["vae"] = pairs["vae"]
    if pairs.get("prediction type") in ("epsilon", "v_prediction"):
        values["prediction_type"] = pairs["prediction type"]
    unused = {name for key in pairs for begin, name in _NOT_USED.items() if key.startswith(begin)}
    if SOURCE.fullmatch(pairs.get("start image", "")):  # only ours name a start image
        values |= {"image": pairs["start image"], "denoise": pairs.get("denoising strength", DENOISE)}
        values["mask"] = pairs["mask"] if SOURCE.fullmatch(pairs.get("mask", "")) else ""
    elif "denoising strength" in pairs and "hires fix" not in unused:
        notes.append("The image was made from another image, which is not in the file.")
    if unused:
        notes.append(f"Not supported and not used: {', '.join(sorted(unused))}.")
    return build_recipe(values, notes=tuple(filter(None, notes)))


def _has_settings(line: str) -> bool:
    """Whether a line is the one with the settings: steps, a seed, and one more."""
    if "eed:" not in line or "teps:" not in line:  # most lines are not looked into
        return False
    return {"steps", "seed"} <= _read_pairs(line).keys()


def _read_pairs(line: str) -> dict[str, str]:
    """ "Steps: 20, Model: x" -> {"steps": "20", "model": "x"}. SD.Next's newer versions write | between them."""
    if "| Seed:" in line or "| Steps:" in line:
        line = line.replace("| ", ", ")
    pairs: dict[str, str] = {}
    for key, value in _PAIR.findall(line):
        text = value.strip()
        if text.startswith('"'):
            with suppress(ValueError):
                text = str(json.loads(text))
        pairs.setdefault(key.strip().lower(), text)
    return pairs
