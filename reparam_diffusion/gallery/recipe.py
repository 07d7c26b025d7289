"""A recipe: everything a picture is drawn from, as A1111's "parameters" text and back."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.habits import DENOISE
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.lora_tags import parse_tags
from reparam_diffusion.models.schedulers import down_to_noise, own_name, require_scheduler
from reparam_diffusion.models.start import fitting_size
from reparam_diffusion.printable import remove_control
from reparam_diffusion.validation import explain

MOST_ADAPTERS = 32
LONGEST = 20_000  # characters of a prompt
NEGATIVE = "Negative prompt:"
SOURCE = re.compile(r"images/sources/[0-9a-f]{24}\.png")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Use(_Frozen):
    """An adapter in a picture: its name on the shelf (or its path in the workspace) and how strongly it counts."""

    name: str = Field(min_length=1, max_length=400)
    strength: float = Field(1.0, ge=-10, le=10)
    te_strength: float | None = Field(None, ge=-10, le=10)

    @field_validator("name")
    @classmethod
    def _fits_a_tag(cls, name: str) -> str:
        if set(name) & set("<>:\n"):
            raise ValueError("a name has none of < > : in it")
        return name


class Recipe(_Frozen):
    """What one picture is drawn from. None, "" and no size stand for the model's own.

    `image` and `mask` are pictures of the workspace by their path in it; `denoise` says how much of them may change.
    """

    prompt: str = Field(min_length=1, max_length=LONGEST)
    negative: str | None = Field(None, max_length=LONGEST)
    adapters: tuple[Use, ...] = Field((), max_length=MOST_ADAPTERS)
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance: float | None = Field(None, ge=0, le=100)
    scheduler: str = Field("", max_length=60)
    width: int | None = Field(None, ge=8, le=8192)
    height: int | None = Field(None, ge=8, le=8192)
    clip_skip: int = Field(0, ge=0, le=20)
    model: str = Field("starter", min_length=1, max_length=1000)
    vae: str = Field("", max_length=1000)
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    image: str = Field("", max_length=200)
    mask: str = Field("", max_length=200)
    denoise: float = Field(DENOISE, gt=0, le=1)

    @field_validator("image", "mask")
    @classmethod
    def _lies_in_the_workspace(cls, path: str) -> str:
        if path and not SOURCE.fullmatch(path):
            raise ValueError("it is not an image of this workspace")
        return path

    @model_validator(mode="after")
    def _mask_has_its_picture(self) -> Recipe:
        if self.mask and not self.image:
            raise ValueError("a mask was given without an image")
        return self


def make_recipe(values: Mapping[str, Any], *, note: Callable[[str], None] | None = None) -> Recipe:
    """A recipe from plain values, <lora:…> tags in the prompt becoming adapters. Raises UserError for a mistake.

    `note` gets a sentence for each part of a tag that is not used. Any: values as a form or another program gives them.
    """
    values = {key: remove_control(value) if isinstance(value, str) else value for key, value in values.items()}
    prompt = parse_tags(str(values.get("prompt") or ""))
    if note is not None:
        for sentence in prompt.notes:
            note(sentence)
    if not prompt.text:
        raise UserError("The prompt is empty.", do="Say what to draw.")
    used = [{"name": tag.name, "strength": tag.strength, "te_strength": tag.text_strength} for tag in prompt.tags]
    require_scheduler(str(values.get("scheduler") or ""))
    if str(values.get("seed")).strip() in ("-1", "-1.0"):  # a random one, as in A1111
        values["seed"] = secrets.randbelow(2**32)
    adapters = [*values.get("adapters", ()), *used]
    try:
        return Recipe.model_validate({**values, "prompt": prompt.text, "adapters": adapters})
    except ValidationError as error:
        place, message = explain(error)
        raise UserError(f"{_name_setting(place)} {message}.".strip(), place=".".join(map(str, place))) from None


def _name_setting(place: tuple[int | str, ...]) -> str:
    """A setting as the form names it: "Steps", "The strength of adapter 2"."""
    words = [str(word).replace("te_strength", "text encoder strength").replace("_", " ") for word in place]
    if len(words) == 3 and isinstance(place[1], int):
        return f"The {words[2]} of adapter {place[1] + 1}"
    return " ".join(words).capitalize() or "This"


def filled(
    recipe: Recipe, model: Model, picture: tuple[int, int] | None = None, *, zero_terminal_snr: bool = False
) -> Recipe:
    """The recipe with the model's own values where it left them open, so that it says all by itself.

    `picture` is the size of the one that it begins from, `zero_terminal_snr` whether it is drawn from pure noise.
    """
    own = down_to_noise(model.scheduler) if zero_terminal_snr else model.scheduler
    habits = model.habits
    side = model.size
    width, height = fitting_size(picture, side=side, step=model.size_step) if picture else (side, side)
    return recipe.model_copy(
        update={
            "negative": habits.negative if recipe.negative is None else recipe.negative,
            "steps": recipe.steps or habits.steps,
            "guidance": habits.guidance if recipe.guidance is None else recipe.guidance,
            "scheduler": recipe.scheduler or own_name(own),
            "width": recipe.width or width,
            "height": recipe.height or height,
        }
    )


def told_of(model: str) -> str:
    """How a model is named to others: a path by its last word, which says nothing of the machine it lay on."""
    is_path = Path(model).expanduser().exists() or model.startswith(("/", "~", ".")) or "\\" in model
    return Path(model).name.removesuffix(".safetensors") if is_path else model


def to_text(recipe: Recipe) -> str:
    """A1111's text of a recipe whose every value is filled in."""
    lines = [recipe.prompt + "".join(f" {write_tag(use)}" for use in recipe.adapters)]
    if recipe.negative:
        lines.append(f"{NEGATIVE} {recipe.negative}")
    pairs = {
        "Steps": recipe.steps,
        "Sampler": recipe.scheduler,
        "CFG scale": f"{recipe.guidance:g}",
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Clip skip": recipe.clip_skip + 1 if recipe.clip_skip else None,
        "Model": told_of(recipe.model).replace(",", " "),
        "VAE": told_of(recipe.vae).replace(",", " ") or None,
        "Prediction type": None if recipe.prediction_type == "auto" else recipe.prediction_type,
        "Denoising strength": f"{recipe.denoise:g}" if recipe.image else None,
        "Start image": recipe.image or None,
        "Mask": recipe.mask or None,
    }
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items() if value is not None))
    return "\n".join(lines)


def write_tag(use: Use) -> str:
    """One number where both strengths are the same; A1111 reads two numbers the other way round, so they get names."""
    if use.te_strength is None or use.te_strength == use.strength:
        return f"<lora:{use.name}:{use.strength:g}>"
    return f"<lora:{use.name}:te={use.te_strength:g}:unet={use.strength:g}>"
