"""What a base model is used to: caption template, class prompt, preview prompts, steps and guidance.

A model folder may carry a habits.json; other models have the photographs' habits below.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from reparam_diffusion.errors import UserError

DENOISE = 0.6
"""How much of a picture to begin from may change where nobody says: the share of noise that is put on it."""


class Habits(BaseModel):
    """Templates know {trigger}, {class}, {a class} (with its article) and {background}."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    caption: str = "a photo of {trigger} {class}"
    style_caption: str = "a picture in {trigger} style"
    class_prompt: str = "a photo of {a class}"
    preview: list[str] = ["a photo of {trigger} {class} on a beach", "a photo of {trigger} {class} in the snow"]
    style_preview: list[str] = ["a castle in {trigger} style", "a cat in {trigger} style"]
    backgrounds: list[str] = []
    negative: str = ""
    steps: int = 25
    guidance: float = 7.0


def read_habits(folder: Path | None) -> Habits:
    """The habits.json beside a model, or the defaults. Raises UserError when the file is broken."""
    file = None if folder is None else folder / "habits.json"
    if file is None or not file.is_file():
        return Habits()
    try:
        return Habits.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        raise UserError(f"{file} is not a habits file.", str(error).splitlines()[0], "Mend or delete it.") from None


def unseen_backgrounds(habits: Habits, captions: list[str], *, count: int) -> list[str]:
    """The model's first backgrounds that no caption names: a preview on them shows that prompts still count."""
    text = " ".join(f" {caption} " for caption in captions)
    unseen = [name for name in habits.backgrounds if f" {name} background" not in text]
    return (unseen or habits.backgrounds)[:count]
