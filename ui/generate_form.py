"""The controls that say what to draw, and the way between them and a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import notes, shelf
from reparam_diffusion.gallery.recipe import Recipe, Use, make_recipe, write_tag
from reparam_diffusion.models.glance import Glance, glance_at
from reparam_diffusion.models.schedulers import SCHEDULERS
from ui.door import warn
from ui.generate_start import StartControls, read_start, show_start
from ui.models import by_name, draw_models

MOST_ADAPTERS = 8
MOST_OFFERED = 500  # adapters in a list of choices; each of them is sent to each page twenty times
LOW, HIGH = -2.0, 2.0

Updates = dict[gr.components.Component, Any]
"""What a handler changes, by control. Any: gradio's updates."""
Values = Mapping[gr.components.Component, Any]
"""What gradio hands to a handler. Any: values of many kinds."""

INSERT = """(prompt, words) => {
  const box = document.querySelector("#prompt textarea");
  const phrase = words.replace(/^\\+ /, "");
  if (!prompt) return phrase;
  const at = box && box.selectionEnd ? box.selectionEnd : prompt.length;
  const before = prompt.slice(0, at).trimEnd(), after = prompt.slice(at).trimStart();
  return before + (after ? " " + phrase + (/^[,.]/.test(after) ? "" : " ") + after : ", " + phrase);
}"""
"""Puts the words of a button where the cursor stands in the prompt, or at its end."""


@dataclass(frozen=True)
class AdapterRow:
    """One adapter: which, whether it is on, its two strengths, and a button with its trigger words."""

    box: gr.Column
    on: gr.Checkbox
    name: gr.Dropdown
    more: gr.Column
    strength: gr.Slider
    linked: gr.Checkbox
    te: gr.Slider
    words: gr.Button

    def changing(self) -> list[gr.components.Component]:
        """What the choice of an adapter changes."""
        return [self.on, self.name, self.more, self.strength, self.linked, self.te, self.words]


@dataclass(frozen=True)
class Controls:
    """Everything that makes a recipe."""

    prompt: gr.Textbox
    rows: list[AdapterRow]
    add: gr.Button
    sweep: gr.Button
    negative: gr.Textbox
    new_seed: gr.Checkbox
    seed: gr.Number
    count: gr.Slider
    steps: gr.Number
    guidance: gr.Number
    scheduler: gr.Dropdown
    width: gr.Number
    height: gr.Number
    clip_skip: gr.Number
    model: gr.Dropdown
    vae: gr.Textbox
    prediction_type: gr.Dropdown
    start: StartControls

    def plain(self) -> list[gr.components.Component]:
        """The controls outside the adapters' rows."""
        return [part for part in vars(self).values() if part not in (self.rows, self.add, self.sweep, self.start)]

    def inputs(self) -> set[gr.components.Component]:
        """What handlers read."""
        rows = {part for row in self.rows for part in (row.on, row.name, row.strength, row.linked, row.te)}
        return {*self.plain(), *rows, *self.start.inputs()}

    def changing(self) -> list[gr.components.Component]:
        """What a restore may change."""
        rows = (part for row in self.rows for part in vars(row).values())
        return [*self.plain(), self.add, self.sweep, *rows, *self.start.changing()]


# --- drawing the controls --------------------------------------------------------------------------------------------
def draw_prompt() -> gr.Textbox:
    """What to draw, in words."""
    return gr.Textbox(
        label="Prompt",
        placeholder="a 3d icon of a red apple on a light blue background",
        lines=3,
        max_lines=8,
        elem_id="prompt",
    )


def draw_rows(workspace: Path) -> tuple[list[AdapterRow], gr.Button, gr.Button]:
    """The adapters: one row to see at first, more on demand; and the buttons below them."""
    rows = [_draw_row(number, adapter_choices(workspace)) for number in range(1, MOST_ADAPTERS + 1)]
    with gr.Row(elem_classes="below-adapters"):
        add = gr.Button("Add another adapter", size="sm", visible=False, min_width=140, elem_id="add-adapter")
        sweep = gr.Button("Sweep the strength", size="sm", visible=False, min_width=140, elem_id="sweep")
    return rows, add, sweep


def _draw_row(number: int, choices: list[tuple[str, str]]) -> AdapterRow:
    with gr.Column(visible=number == 1, elem_classes="adapter") as box:
        name = gr.Dropdown(choices, value="", label=f"Adapter {number}", allow_custom_value=True, min_width=160)
        with gr.Column(visible=False, elem_classes="adapter-more") as more:
            strength = gr.Slider(LOW, HIGH, value=1.0, step=0.05, label=f"Strength {number}")
            te = gr.Slider(LOW, HIGH, value=1.0, step=0.05, label=f"Text encoder strength {number}", visible=False)
            with gr.Row(elem_classes="switches"):
                on = gr.Checkbox(True, label="On", min_width=60, elem_classes="switch")
                linked = gr.Checkbox(True, label="Same for the text encoder", min_width=150, elem_classes="switch")
                words = gr.Button("", size="sm", visible=False, min_width=80, elem_classes="words")
    return AdapterRow(box, on, name, more, strength, linked, te, words)


def draw_more(workspace: Path) -> dict[str, gr.components.Component]:
    """The folded settings."""
    seen = glance_at("starter")
    names = [("The model's own", ""), *((name, name) for name in SCHEDULERS)]
    about = "Or the path of a folder or a .safetensors file, or a hub id."
    controls: dict[str, gr.components.Component] = {
        "model": draw_models(workspace, by_name, "starter", info=about),
        "negative": gr.Textbox(seen.habits.negative, label="Negative prompt", info="What should not be there."),
    }
    with gr.Row(elem_classes="twos"):
        controls |= {
            "vae": gr.Textbox("", label="VAE", info="A folder or a .safetensors file; empty takes the model's own."),
            "prediction_type": gr.Dropdown(PREDICTIONS, value="auto", label="What the model predicts"),
            "count": gr.Slider(1, 8, value=1, step=1, label="Pictures"),
            "scheduler": gr.Dropdown(names, value="", label="Scheduler"),
            "new_seed": gr.Checkbox(True, label="A new seed each time", info="Off: the same seed, the same picture."),
            "seed": gr.Number(0, precision=0, minimum=0, label="Seed"),
            "steps": gr.Number(seen.habits.steps, precision=0, label="Steps", info="More are slower and finer."),
            "guidance": gr.Number(seen.habits.guidance, step=0.5, label="Guidance", info="How strictly to obey."),
            "width": _side("Width", seen),
            "height": _side("Height", seen),
            "clip_skip": gr.Number(0, precision=0, minimum=0, label="Clip skip", info="Last text layers left out."),
        }
    return controls


PREDICTIONS = [("What its files say", "auto"), ("Noise (epsilon)", "epsilon"), ("v", "v_prediction")]


def _side(label: str, seen: Glance) -> gr.Number:
    about = f"In steps of {seen.size_step} pixels."
    return gr.Number(seen.size, precision=0, step=seen.size_step, label=label, info=about)


def adapter_choices(workspace: Path) -> list[tuple[str, str]]:
    """(name, file's stem) of the newest on the shelf; any other is chosen by writing its name."""
    return list(_choices(workspace, shelf.folder_sign(shelf.shelf_of(workspace))))


@lru_cache(maxsize=8)
def _choices(workspace: Path, sign: int) -> tuple[tuple[str, str], ...]:
    """Read once for each state of the shelf: every page asks again with each tick."""
    return ("None", ""), *((one.name, one.stem) for one in shelf.list_adapters(workspace, most=MOST_OFFERED))


def is_model_known(model: str, workspace: Path) -> bool:
    """Whether a base model can be tried: it is offered here, or it says where it is, as hub ids and paths do."""
    return "/" in model or "\\" in model or model in {value for _, value in by_name(workspace)}


def is_vae_known(vae: str, workspace: Path) -> bool:
    """Whether a VAE lies in the workspace's models, or where its path says."""
    places = (workspace / "models" / vae, workspace / "models" / f"{vae}.safetensors", Path(vae).expanduser())
    return any(place.exists() for place in places)


def model_path(model: str, workspace: Path) -> str | Path:
    """Where a model's small files may lie."""
    own = (workspace / "models" / model, workspace / "models" / f"{model}.safetensors")
    return next((place for place in own if place.exists()), model) if model else model


# --- values -> recipe ------------------------------------------------------------------------------------------------
def read_recipe(controls: Controls, values: Values, workspace: Path, *, seed: int) -> Recipe:
    """The recipe that the controls say, with this seed. Raises UserError for a mistake in them."""
    adapters = [
        {
            "name": values[row.name],
            "strength": values[row.strength],
            "te_strength": None if values[row.linked] else values[row.te],
        }
        for row in controls.rows
        if values[row.name] and values[row.on]
    ]
    names = ("prompt", "negative", "steps", "guidance", "width", "height", "model", "prediction_type")
    return make_recipe(
        {name: values[getattr(controls, name)] for name in names}
        | {"scheduler": values[controls.scheduler] or "", "clip_skip": values[controls.clip_skip] or 0}
        | {"vae": (values[controls.vae] or "").strip(), **read_start(controls.start, values, workspace)}
        | {"adapters": adapters, "seed": seed},
        note=warn,
    )


# --- recipe -> controls ----------------------------------------------------------------------------------------------
def show_recipe(controls: Controls, recipe: Recipe, workspace: Path) -> Updates:
    """Every control as this recipe has it; the seed stays fixed, and one picture is drawn."""
    seen = glance_at(model_path(recipe.model, workspace))
    updates: Updates = {
        controls.prompt: " ".join([recipe.prompt, *map(write_tag, recipe.adapters[MOST_ADAPTERS:])]),
        controls.negative: seen.habits.negative if recipe.negative is None else recipe.negative,
        controls.new_seed: False,
        controls.seed: recipe.seed,
        controls.count: 1,
        controls.steps: recipe.steps or seen.habits.steps,
        controls.guidance: seen.habits.guidance if recipe.guidance is None else recipe.guidance,
        controls.scheduler: recipe.scheduler if recipe.scheduler in SCHEDULERS else "",
        controls.width: recipe.width or seen.size,
        controls.height: recipe.height or seen.size,
        controls.clip_skip: recipe.clip_skip,
        controls.model: recipe.model,
        controls.vae: recipe.vae,
        controls.prediction_type: recipe.prediction_type,
    }
    return updates | show_uses(controls, recipe.adapters, workspace) | show_start(controls.start, recipe, workspace)


def show_uses(controls: Controls, uses: Sequence[Use], workspace: Path) -> Updates:
    """These adapters in the rows, and the other rows empty."""
    uses = uses[:MOST_ADAPTERS]
    updates: Updates = {
        controls.add: gr.update(visible=0 < len(uses) < MOST_ADAPTERS),
        controls.sweep: gr.update(visible=bool(uses)),
    }
    for number, row in enumerate(controls.rows):
        use = uses[number] if number < len(uses) else None
        updates |= show_use(row, use, workspace) | {row.box: gr.update(visible=number < max(1, len(uses)))}
    return updates


def show_use(row: AdapterRow, use: Use | None, workspace: Path) -> Updates:
    """One row with an adapter, or empty."""
    if use is None:
        return {row.name: "", row.more: gr.update(visible=False), row.on: True}
    linked = use.te_strength is None
    te = use.strength if use.te_strength is None else use.te_strength
    words = trigger_of(use.name, workspace)
    return {
        row.name: use.name,
        row.on: True,
        row.more: gr.update(visible=True),
        row.strength: _slid(use.strength),
        row.linked: linked,
        row.te: gr.update(**_slid(te), visible=not linked),
        row.words: gr.update(value=f"+ {words}", visible=bool(words)),
    }


def _slid(value: float) -> dict[str, Any]:  # Any: gradio's update
    """A slider's value, and room for it where another program's picture went further."""
    return gr.update(value=value, minimum=min(LOW, value), maximum=max(HIGH, value))


def use_of(name: str, workspace: Path) -> Use:
    """An adapter at its preferred strength, as far as the slider goes."""
    return Use(name=name, strength=min(HIGH, max(LOW, notes.strength_of(_facts(name, workspace)))))


def trigger_of(name: str, workspace: Path) -> str:
    """The words that call an adapter; "" where its notes have none."""
    words = _facts(name, workspace).get("activation text")
    return words.strip() if isinstance(words, str) else ""


def _facts(name: str, workspace: Path) -> Mapping[str, object]:
    """What a person noted about an adapter on the shelf."""
    try:
        return shelf.shelved_at(shelf.at(name, workspace)).facts
    except UserError:  # a checkpoint of a run, or an adapter that is gone
        return {}


def suggested_prompt(words: str, model: str, workspace: Path) -> str:
    """The model's own way to ask for something called by these words."""
    habits = glance_at(model_path(model, workspace)).habits
    template = habits.preview[0] if habits.preview else "{trigger}"
    ground = habits.backgrounds[4] if len(habits.backgrounds) > 4 else "plain"
    filled = template.replace("{trigger} {class}", words).replace("{trigger}", words).replace("{background}", ground)
    return " ".join(filled.replace("{class}", "").split())
