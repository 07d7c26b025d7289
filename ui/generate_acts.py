"""What happens on the Generate tab: plain functions from what the controls hold to what they show next."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import images, shelf
from reparam_diffusion.gallery.image_metadata import read_metadata
from reparam_diffusion.gallery.recipe import Recipe
from reparam_diffusion.jobs import studio
from reparam_diffusion.jobs.overview import Overview
from reparam_diffusion.models.glance import glance_at
from ui import generate_form as form
from ui import generate_view
from ui.door import warn
from ui.generate_form import AdapterRow, Controls, Updates, Values
from ui.generate_grid import GridControls
from ui.generate_start import start_with

MOST_NOTES = 6
"""How many notes on a restored image are shown."""
OFTEN, SELDOM = 0.5, 3.0  # seconds between two looks while something is drawn, and otherwise


@dataclass(frozen=True)
class GenerateTab:
    """The controls of the tab. `shown` remembers what the browser has, so that only changes are sent."""

    workspace: Path
    overview: Overview
    reader: studio.Reader
    controls: Controls
    grid: GridControls
    draw: gr.Button
    cancel: gr.Button
    title: gr.HTML
    progress: gr.HTML
    offers: gr.Row
    ahead: gr.Button
    pause: gr.Button
    figures: gr.HTML
    keep: gr.Button
    history: gr.HTML
    dropped: gr.File
    drawing: gr.Textbox
    chosen: gr.State
    shown: gr.State
    timer: gr.Timer

    def changing(self) -> list[gr.components.Component]:
        """Everything that `open_with` and the handlers may change."""
        own = [
            part
            for name, part in vars(self).items()
            if name not in ("workspace", "overview", "reader", "controls", "grid")
        ]
        return [*self.controls.changing(), *own]

    def inputs(self) -> set[gr.components.Component]:
        """Everything that the handlers read."""
        return {*self.controls.inputs(), *self.grid.inputs(), self.drawing, self.chosen, self.shown}

    def looked_at(self) -> list[gr.components.Component]:
        """What a look may change."""
        names = [row.name for row in self.controls.rows]
        own = (self.title, self.progress, self.offers, self.figures, self.keep, self.cancel, self.history)
        return [*own, self.shown, self.timer, *names]


def open_with(tab: GenerateTab, adapters: list[str], prompt: str = "") -> Updates:
    """Updates (among `tab.changing()`) that put these adapters of the shelf on, ready to draw."""
    uses = [form.use_of(name, tab.workspace) for name in adapters]
    words = " ".join(filter(None, (form.trigger_of(name, tab.workspace) for name in adapters)))
    text = prompt or (form.suggested_prompt(words, "starter", tab.workspace) if words else "")
    return {tab.controls.prompt: text, **form.show_uses(tab.controls, uses, tab.workspace)}


def chosen_adapter(tab: GenerateTab, row: AdapterRow, values: Values, *, is_last: bool) -> Updates:
    """A row for the adapter that was just chosen in it; an empty prompt is filled with the model's own way to ask."""
    name = values[row.name] or ""
    updates = form.show_use(row, form.use_of(name, tab.workspace) if name else None, tab.workspace)
    updates[tab.controls.add] = gr.update(visible=bool(name) and not is_last)
    updates[tab.controls.sweep] = gr.update(visible=any(values[one.name] for one in tab.controls.rows))
    words = form.trigger_of(name, tab.workspace)
    if words and not (values[tab.controls.prompt] or "").strip():
        updates[tab.controls.prompt] = form.suggested_prompt(words, values[tab.controls.model] or "", tab.workspace)
    return updates


def start_drawing(tab: GenerateTab, values: Values, make: Callable[[Values, Recipe], studio.Request]) -> Updates:
    """Ask the studio for what the controls say."""
    is_new = values[tab.controls.new_seed] or values[tab.controls.seed] is None
    seed = secrets.randbelow(2**32) if is_new else int(values[tab.controls.seed])
    recipe = form.read_recipe(tab.controls, values, tab.workspace, seed=seed)
    folder = studio.submit(tab.workspace, make(values, recipe))
    now = {**values, tab.drawing: folder.name, tab.chosen: ""}
    return {tab.controls.seed: seed, tab.drawing: folder.name, tab.chosen: "", **look(tab, now)}


def restore(tab: GenerateTab, file: Path) -> Updates:
    """Every control as an image says; what is not used of it is shown."""
    found = read_metadata(file)
    for note in found.notes[:MOST_NOTES]:
        warn(note)
    return _refilled(tab, found.recipe)


def _refilled(tab: GenerateTab, recipe: Recipe) -> Updates:
    """Every control as a recipe says, but for the adapters and the base model that are not here."""
    known = []
    for use in recipe.adapters:
        try:
            studio.adapter_file(use.name, tab.workspace)
            known.append(use)
        except UserError:
            warn(f"The adapter “{use.name}” is not in the gallery; it was left out.")
    if len(known) > form.MOST_ADAPTERS:
        more = len(known) - form.MOST_ADAPTERS
        warn(f"There are {form.MOST_ADAPTERS} adapter rows; the other {more} are in the prompt, as <lora:…> tags.")
    updates = form.show_recipe(tab.controls, recipe.model_copy(update={"adapters": tuple(known)}), tab.workspace)
    if not form.is_model_known(recipe.model, tab.workspace):
        warn(f"The base model “{recipe.model}” is not known here; the one that is chosen stays.")
        updates[tab.controls.model] = gr.skip()
    if recipe.vae and not form.is_vae_known(recipe.vae, tab.workspace):
        warn(f"The VAE “{recipe.vae}” is not known here; the model's own is taken.")
        updates[tab.controls.vae] = ""
    return updates


def change_picture(tab: GenerateTab, file: Path, model: str | None) -> Updates:
    """A picture to start from, and its size."""
    seen = glance_at(form.model_path(model or "", tab.workspace))
    updates, (width, height) = start_with(tab.controls.start, file, seen, tab.workspace)
    return {**updates, tab.controls.width: width, tab.controls.height: height}


def open_drawing(tab: GenerateTab, wanted: str | None) -> Updates:
    """A fresh page: the drawing that it shows, and the form as it was asked for."""
    values: Values = {tab.drawing: drawing_to_open(tab.workspace, wanted), tab.chosen: "", tab.shown: {}}
    updates, request = {tab.drawing: values[tab.drawing], **look(tab, values)}, request_shown(tab, values)
    if request is None:
        return updates
    filled = _refilled(tab, request.recipes[0])
    del filled[tab.controls.new_seed]  # that was not asked for, and is as in any fresh page
    if request.kind == "pictures":
        filled[tab.controls.count] = min(8, len(request.recipes))
    for row in tab.controls.rows:  # a look brings their choices, the form what is chosen
        filled[row.name] = {**updates.get(row.name, gr.update()), "value": filled[row.name]}
    return {**updates, **filled}


def keep_preferred(workspace: Path, name: str, strength: float) -> None:
    """Note an adapter's preferred strength beside it."""
    shelf.edit(shelf.find(name, workspace).stem, workspace, {"preferred weight": strength})


def holder_of(tab: GenerateTab) -> Path | None:
    """The run of this workspace that is training now."""
    return next((folder for folder, state in tab.overview.look() if state.state == "running"), None)


def drawing_to_open(workspace: Path, wanted: str | None) -> str:
    """Which drawing a fresh page shows: the one in its address, else the newest that goes on, else none."""
    if studio.find_request(workspace, wanted) is not None:
        return wanted or ""
    live = (one for one in studio.todo(workspace)[::-1] if studio.state_of(one).is_live)
    found = next(live, None)
    return found.name if found else ""


def request_shown(tab: GenerateTab, values: Values) -> studio.Request | None:
    """What this browser follows; None also for one that another version wrote."""
    folder = studio.find_request(tab.workspace, values[tab.drawing])
    try:
        return studio.read_request(folder) if folder else None
    except UserError:
        return None


# --- looking ---------------------------------------------------------------------------------------------------------
def look(tab: GenerateTab, values: Values) -> Updates:
    """What has changed since the browser was last told, and nothing else."""
    shown: Mapping[str, Any] = values[tab.shown]  # Any: signs of many kinds
    fresh = {**_drawing_now(tab, values), **_workspace_now(tab)}
    updates: Updates = {}
    for name, (sign, make) in fresh.items():
        if shown.get(name) != sign:
            updates |= make()
    signs = {name: sign for name, (sign, _) in fresh.items()}
    updates[tab.shown] = {**shown, **signs} if updates else gr.skip()
    return updates


Sign = dict[str, tuple[Any, Callable[[], Updates]]]
"""By a name: a sign of what is to be seen, and how to make the updates that show it. Any: signs of many kinds."""


def _workspace_now(tab: GenerateTab) -> Sign:
    """The history and the choices of adapters."""
    files = images.history(tab.workspace, most=generate_view.MOST_HISTORY)
    choices = form.adapter_choices(tab.workspace)
    return {
        "history": (
            tuple(file.name for file in files),
            lambda: {tab.history: generate_view.history_of(tab.workspace, files)},
        ),
        "adapters": (
            shelf.folder_sign(shelf.shelf_of(tab.workspace)),
            lambda: {row.name: gr.update(choices=choices) for row in tab.controls.rows},
        ),
    }


def _drawing_now(tab: GenerateTab, values: Values) -> Sign:
    """The request that this browser follows."""
    folder, request = studio.find_request(tab.workspace, values[tab.drawing]), request_shown(tab, values)
    if folder is None or request is None:
        return {"timer": (SELDOM, lambda: {tab.timer: gr.Timer(SELDOM)})}
    state, chosen = tab.reader.state_of(folder), str(values[tab.chosen] or "")
    is_cancelling = studio.is_asked(folder, "cancel")
    holder = holder_of(tab) if state.state == "waiting" else None
    progress = generate_view.progress_of(request, state, is_cancelling=is_cancelling, holder=holder)
    looks = tuple((number, file.stat().st_mtime_ns) for number, file in state.looks.items())
    pictures = (folder.name, state.is_live, tuple(state.pictures), looks, chosen, state.sheet)
    pace = OFTEN if state.is_live else SELDOM
    can_cancel = state.is_live and not is_cancelling
    can_wait = state.state == "waiting" and not studio.is_asked(folder, "ahead")
    kept = f"Keep {chosen} as preferred" if request.kind == "sweep" and chosen else ""

    def figures() -> Updates:
        title = generate_view.title_of(request)
        return {
            tab.title: f"<h2>{escape(title)}</h2>",
            tab.figures: generate_view.figures_of(tab.workspace, request, state, chosen),
        }

    return {
        "progress": (progress, lambda: {tab.progress: progress}),
        "figures": (pictures, figures),
        "cancel": (can_cancel, lambda: {tab.cancel: gr.update(visible=can_cancel)}),
        "offers": (can_wait, lambda: {tab.offers: gr.update(visible=can_wait)}),
        "keep": (kept, lambda: {tab.keep: gr.update(visible=bool(kept), value=kept)}),
        "timer": (pace, lambda: {tab.timer: gr.Timer(pace)}),
    }
