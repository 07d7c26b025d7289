"""Many pictures from one recipe: a sweep over one adapter's strength, a grid over any two things."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.recipe import Recipe, Use
from reparam_diffusion.jobs.studio import MOST_PICTURES, Request
from reparam_diffusion.models.sample import finite

SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def sweep(recipe: Recipe, *, which: int = 0) -> Request:
    """One picture a strength of one of the recipe's adapters, everything else alike."""
    if not recipe.adapters:
        raise UserError("There is no adapter to sweep.", do="Choose one first.")
    use = recipe.adapters[which]
    return Request(
        recipes=tuple(_with_use(recipe, which, _at(use, strength)) for strength in SWEEP),
        kind="sweep",
        about=use.name,
        labels=tuple(f"{strength:g}" for strength in SWEEP),
    )


def _at(use: Use, strength: float) -> Use:
    """The adapter at another strength; a text encoder's strength of its own keeps its distance in proportion."""
    if use.te_strength is None or use.te_strength == use.strength:
        return use.model_copy(update={"strength": strength, "te_strength": None})
    share = use.te_strength / use.strength if use.strength else 1.0
    return use.model_copy(update={"strength": strength, "te_strength": strength * share})


def _with_use(recipe: Recipe, which: int, use: Use) -> Recipe:
    adapters = list(recipe.adapters)
    adapters[which] = use
    return recipe.model_copy(update={"adapters": tuple(adapters)})


# --- grids -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Axis:
    """Something that a grid varies. `change(recipe, value, first value)` gives the recipe at a value."""

    name: str
    hint: str
    example: tuple[str, ...]
    change: Callable[[Recipe, str, str], Recipe]


def _adapter(recipe: Recipe, value: str, first: str) -> Recipe:
    """The first adapter is replaced; there need not be one."""
    if not recipe.adapters:
        return recipe.model_copy(update={"adapters": (Use(name=value),)})
    return _with_use(recipe, 0, recipe.adapters[0].model_copy(update={"name": value}))


def _strength(recipe: Recipe, value: str, first: str) -> Recipe:
    if not recipe.adapters:
        raise UserError("There is no adapter whose strength could change.", do="Choose one first.")
    return _with_use(recipe, 0, _at(recipe.adapters[0], _number(value, low=-10, high=10)))


def _seed(recipe: Recipe, value: str, first: str) -> Recipe:
    return recipe.model_copy(update={"seed": int(_number(value, low=0, high=2**63 - 1, whole=True))})


def _guidance(recipe: Recipe, value: str, first: str) -> Recipe:
    return recipe.model_copy(update={"guidance": _number(value, low=0, high=100)})


def _steps(recipe: Recipe, value: str, first: str) -> Recipe:
    return recipe.model_copy(update={"steps": int(_number(value, low=1, high=1000, whole=True))})


def _denoise(recipe: Recipe, value: str, first: str) -> Recipe:
    if not recipe.image:
        raise UserError("There is no picture to start from.", do="Choose one first.")
    return recipe.model_copy(update={"denoise": _number(value, low=0.01, high=1)})


def _prompt(recipe: Recipe, value: str, first: str) -> Recipe:
    """The first value is what stands in the prompt; each value takes its place."""
    if first not in recipe.prompt:
        raise UserError(f'"{first}" is not in the prompt.', do="Let the first value be words of the prompt.")
    return recipe.model_copy(update={"prompt": recipe.prompt.replace(first, value)})


AXES = {
    "adapter": Axis("Adapter", "Adapters, or checkpoints of a run.", (), _adapter),
    "strength": Axis("Strength", "Of the first adapter.", ("0", "0.5", "1"), _strength),
    "seed": Axis("Seed", "Whole numbers.", ("1", "2", "3"), _seed),
    "guidance": Axis("Guidance", "How strictly the prompt is obeyed.", ("2", "4", "7"), _guidance),
    "steps": Axis("Steps", "Sampling steps.", ("10", "25"), _steps),
    "denoise": Axis("Change", "How much of the picture to start from may change.", ("0.3", "0.6", "0.9"), _denoise),
    "prompt": Axis("Prompt part", "First words of the prompt, then what takes their place.", (), _prompt),
}
"""By the word that requests and the page use."""


def grid(recipe: Recipe, *, across: tuple[str, Sequence[str]], down: tuple[str, Sequence[str]]) -> Request:
    """A picture for each pair of values of two axes. Raises UserError for what cannot be varied so."""
    if across[0] == down[0]:
        raise UserError("Both sides of the grid vary the same.", do="Choose two different things.")
    for axis, values in (across, down):
        if not values:
            raise UserError(f"{AXES[axis].name} has no values.", do="Give at least one.")
    across, down = _with_seeds(*across), _with_seeds(*down)
    count = len(across[1]) * len(down[1])
    if count > MOST_PICTURES:
        raise UserError(f"That would be {count} pictures.", do=f"Take at most {MOST_PICTURES}.")
    recipes = []
    order = sorted((across, down), key=lambda side: list(AXES).index(side[0]))  # an adapter before its strength
    for row in down[1]:
        for column in across[1]:
            changed = recipe
            for axis, values in order:
                value = column if axis == across[0] else row
                changed = AXES[axis].change(changed, value, values[0])
            recipes.append(changed)
    return Request(
        recipes=tuple(recipes),
        kind="grid",
        about=f"{AXES[down[0]].name} by {AXES[across[0]].name.lower()}",
        rows=tuple(_label(*down[:1], value) for value in down[1]),
        columns=tuple(_label(*across[:1], value) for value in across[1]),
    )


def _with_seeds(axis: str, values: Sequence[str]) -> tuple[str, Sequence[str]]:
    """An axis with a random number for each seed of -1, the same for all cells of its row or column."""
    if axis != "seed":
        return axis, values
    return axis, [str(secrets.randbelow(2**32)) if value.strip() == "-1" else value for value in values]


def _label(axis: str, value: str) -> str:
    if axis == "adapter":
        return short_name(value)
    return value if axis == "prompt" else f"{AXES[axis].name} {value}"


def short_name(adapter: str) -> str:
    """An adapter's name for a label: a checkpoint by its run's words and its step."""
    words = adapter.split("/")
    if words[0] == "runs" and len(words) >= 4:
        return f"{'-'.join(words[1].split('-')[2:]) or words[1]}, step {words[3].lstrip('0')}"
    return adapter


def _number(text: str, *, low: float, high: float, whole: bool = False) -> float:
    try:
        value = int(text) if whole else finite(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        kind = "whole number" if whole else "number"
        raise UserError(f'"{text}" is no value for this grid.', do=f"Give a {kind} from {low:g} to {high:g}.")
    return value
