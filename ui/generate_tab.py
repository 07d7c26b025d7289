"""Generate: a prompt, adapters and one button. The studio draws; this tab asks it and looks at its folders.

A timer looks at the request's folder, so a reload loses nothing and several browsers do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.recipe import Recipe
from reparam_diffusion.jobs import runs, studio, studio_grid
from reparam_diffusion.jobs.overview import Overview
from reparam_diffusion.models.glance import glance_at
from ui import generate_form as form
from ui import generate_grid, generate_view
from ui.door import QUIET, guarded, inform
from ui.generate_acts import (
    SELDOM,
    GenerateTab,
    change_picture,
    chosen_adapter,
    holder_of,
    keep_preferred,
    look,
    open_drawing,
    open_with,
    request_shown,
    restore,
    start_drawing,
)
from ui.generate_api import add_endpoint
from ui.generate_form import AdapterRow, Controls, Updates, Values
from ui.generate_start import draw_start, size_to_draw

__all__ = ["GenerateTab", "build_generate_tab", "open_with"]

REMEMBER_IN_ADDRESS = """(drawing) => {
  const address = new URL(window.location);
  if (drawing) {
    address.searchParams.set("drawing", drawing);
    address.searchParams.delete("run");  // what was asked for last is what a reload shows
  }
  window.history.replaceState(null, "", address);
}"""


def build_generate_tab(workspace: Path) -> GenerateTab:
    """Draw the tab and connect it."""
    with gr.Row(equal_height=False, elem_classes="generate"):
        with gr.Column(scale=2, min_width=320):
            with gr.Column(elem_classes="card"):
                gr.HTML("<h2>What to draw</h2>", padding=False)
                prompt = form.draw_prompt()
                rows, add, sweep = form.draw_rows(workspace)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", size="lg", elem_id="draw", scale=3, min_width=140)
                    cancel = gr.Button("Cancel", visible=False, size="lg", elem_id="cancel-drawing", min_width=80)
            start = draw_start(workspace)
            with gr.Accordion("More settings", open=False, elem_classes="fold", elem_id="more-settings"):
                more = form.draw_more(workspace)
            with gr.Accordion("Compare in a grid", open=False, elem_classes="fold", elem_id="compare"):
                grid = generate_grid.draw_grid()
        with gr.Column(scale=3, min_width=320):
            with gr.Column(elem_classes="card result-card"):
                title = gr.HTML("<h2>Result</h2>", padding=False, elem_id="drawing-title")
                progress = gr.HTML("", padding=False, elem_id="drawing-progress")
                with gr.Row(visible=False, elem_classes="offers") as offers:
                    ahead = gr.Button("Go ahead anyway", size="sm", min_width=120, elem_id="ahead")
                    pause = gr.Button("Pause the run", size="sm", min_width=120, elem_id="pause-run")
                figures = gr.HTML(
                    generate_view.NOTHING_DRAWN, padding=False, elem_id="figures", js_on_load=generate_view.PICK
                )
                keep = gr.Button("", visible=False, elem_id="keep")
            with gr.Column(elem_classes="card"):
                gr.HTML("<h2>Last pictures</h2>", padding=False)
                history = gr.HTML("", padding=False, elem_id="history", js_on_load=generate_view.PICK)
                dropped = gr.File(
                    label="A picture whose settings to use",
                    show_label=False,
                    file_types=[".png", ".jpg", ".jpeg", ".webp"],
                    height=92,
                    elem_id="drop-picture",
                )
                about = "Press one, or drop a picture here, to use its settings again."
                gr.HTML(f'<p class="quiet">{about}</p>', padding=False)
    controls = Controls(prompt=prompt, rows=rows, add=add, sweep=sweep, start=start, **more)
    tab = GenerateTab(
        workspace, Overview(workspace), studio.Reader(), controls, grid, draw, cancel, title, progress,
        offers, ahead, pause, figures, keep, history, dropped, gr.Textbox(visible="hidden", elem_id="drawing-name"),
        gr.State(""), gr.State({}), gr.Timer(SELDOM),
    )  # fmt: skip
    _connect_adapters(tab)
    _connect_drawing(tab)
    _connect_restoring(tab)
    _connect_start(tab)
    generate_grid.connect(tab.grid, workspace)
    add_endpoint(workspace)
    return tab


# --- connecting ------------------------------------------------------------------------------------------------------
def _connect_adapters(tab: GenerateTab) -> None:
    controls, workspace = tab.controls, tab.workspace
    names = {row.name for row in controls.rows}
    for number, row in enumerate(controls.rows):

        def choose(values: Values, row: AdapterRow = row, number: int = number) -> Updates:
            return chosen_adapter(tab, row, values, is_last=number + 1 == form.MOST_ADAPTERS)

        row.name.input(
            guarded(choose, workspace),
            {*names, controls.prompt, controls.model},
            [controls.prompt, controls.add, controls.sweep, *row.changing()],
            **QUIET,
        )
        row.linked.input(
            guarded(lambda linked, strength: gr.update(visible=not linked, value=strength), workspace),
            [row.linked, row.strength],
            row.te,
            **QUIET,
        )
        row.words.click(None, [controls.prompt, row.words], controls.prompt, js=form.INSERT)

    def add(values: Values) -> Updates:
        used = [bool(values[row.name]) for row in controls.rows]
        free = used.index(False) if False in used else len(used) - 1
        return {controls.rows[free].box: gr.update(visible=True), controls.add: gr.update(visible=False)}

    boxes = [row.box for row in controls.rows]
    controls.add.click(guarded(add, workspace), names, [*boxes, controls.add], **QUIET)

    def other_model(model: str | None, negative: str | None, image: str) -> Updates:
        seen = glance_at(form.model_path(model or "", workspace))
        width, height = size_to_draw(image, seen, workspace)

        def side(pixels: int | None) -> Any:  # Any: gradio's update, which serves one control only
            return gr.update(value=pixels, step=seen.size_step, info=f"In steps of {seen.size_step} pixels.")

        return {
            controls.steps: seen.habits.steps,
            controls.guidance: seen.habits.guidance,
            controls.negative: negative or seen.habits.negative,
            controls.width: side(width),
            controls.height: side(height),
        }

    outputs = [controls.steps, controls.guidance, controls.negative, controls.width, controls.height]
    inputs = [controls.model, controls.negative, controls.start.image]
    controls.model.input(guarded(other_model, workspace), inputs, outputs, **QUIET)


def _connect_drawing(tab: GenerateTab) -> None:
    """The buttons that ask the studio, and the timer that looks at it."""
    workspace = tab.workspace

    def start(make: Callable[[Values, Recipe], studio.Request]) -> Callable[[Values], Updates]:
        def pressed(values: Values) -> Updates:
            return start_drawing(tab, values, make)

        return guarded(pressed, workspace)

    def several(values: Values, recipe: Recipe) -> studio.Request:
        count = int(values[tab.controls.count] or 1)
        return studio.Request(
            recipes=tuple(recipe.model_copy(update={"seed": (recipe.seed + n) % 2**63}) for n in range(count))
        )

    makers = (
        (tab.draw.click, several),
        (tab.controls.prompt.submit, several),
        (tab.controls.sweep.click, lambda values, recipe: studio_grid.sweep(recipe)),
        (tab.grid.go.click, lambda values, recipe: generate_grid.read_grid(tab.grid, values, recipe)),
    )
    for event, make in makers:
        event(start(make), tab.inputs(), tab.changing(), **QUIET).success(
            None, tab.drawing, None, js=REMEMBER_IN_ADDRESS
        )

    def asked(act: Callable[[Path], None]) -> Callable[[Values], Updates]:
        def pressed(values: Values) -> Updates:
            folder = studio.find_request(workspace, values[tab.drawing])
            if folder is not None:
                act(folder)
            return look(tab, values)

        return guarded(pressed, workspace)

    def pause_run(folder: Path) -> None:
        holder = holder_of(tab)
        if holder is None:
            raise UserError("No run of this workspace is training.", do="Wait, or go ahead.")
        runs.ask(holder, "pause")

    seen, changes = {tab.drawing, tab.chosen, tab.shown}, tab.looked_at()
    tab.cancel.click(asked(studio.cancel), seen, changes, **QUIET)
    tab.ahead.click(asked(lambda folder: studio.ask(folder, "ahead")), seen, changes, **QUIET)
    tab.pause.click(asked(pause_run), seen, changes, **QUIET)

    def see(values: Values) -> Updates:
        return look(tab, values)

    tab.timer.tick(guarded(see, workspace), seen, changes, concurrency_limit=None, **QUIET)

    def opened(request: gr.Request) -> Updates:
        return open_drawing(tab, dict(request.query_params).get("drawing"))

    page = Context.root_block
    assert page is not None, "the tab is built inside a page"
    page.load(guarded(opened, workspace), None, tab.changing(), **QUIET)


def _connect_restoring(tab: GenerateTab) -> None:
    """A picture of a sweep gives its strength; one of the history, or one dropped here, all its settings."""
    workspace, rows = tab.workspace, tab.controls.rows

    def choose(values: Values, event: gr.EventData) -> Updates:
        label = str(event.pick)
        if label.startswith(generate_view.CHANGE):
            file = picked(label.removeprefix(generate_view.CHANGE))
            return change_picture(tab, file, values[tab.controls.model])
        strength = next((one for one in studio_grid.SWEEP if f"{one:g}" == label), None)
        request = request_shown(tab, values)
        if strength is None or request is None:
            return {tab.chosen: gr.skip()}
        taken = {row.strength: strength for row in rows if values[row.name] == request.about}
        return {tab.chosen: label, **taken, **look(tab, {**values, tab.chosen: label})}

    def keep(values: Values) -> Updates:
        request = request_shown(tab, values)
        if request is None or not values[tab.chosen]:
            raise UserError("No strength is chosen.", do="Press one under the pictures.")
        keep_preferred(workspace, request.about, float(values[tab.chosen]))
        inform(f"{studio_grid.short_name(request.about)} now starts at strength {values[tab.chosen]}.")
        return {tab.keep: gr.update(visible=False)}

    seen, model = {tab.drawing, tab.chosen, tab.shown}, tab.controls.model
    names, sliders = {row.name for row in rows}, [row.strength for row in rows]
    outputs = [tab.chosen, *sliders, *tab.looked_at(), *tab.controls.start.changing()]
    outputs += [tab.controls.width, tab.controls.height]
    tab.figures.click(guarded(choose, workspace), {*seen, *names, model}, outputs, **QUIET)
    tab.keep.click(guarded(keep, workspace), seen, tab.keep, **QUIET)

    def picked(name: str) -> Path:
        file = generate_view.picked_picture(workspace, name)
        if file is None:
            raise UserError("This picture is gone.", "It was deleted or moved.", "Choose another one.")
        return file

    def again(event: gr.EventData) -> Updates:
        return restore(tab, picked(str(event.pick)))

    def take(file: str | None) -> Updates:
        return {tab.dropped: None, **(restore(tab, Path(file)) if file else {})}

    outputs = [tab.dropped, *tab.controls.changing()]
    tab.history.click(guarded(again, workspace), None, outputs, **QUIET)
    tab.dropped.upload(guarded(take, workspace), tab.dropped, outputs, **QUIET)


def _connect_start(tab: GenerateTab) -> None:
    """A picture that is dropped to be started from brings its size."""
    start, controls = tab.controls.start, tab.controls

    def took(file: str | None, model: str | None) -> Updates:
        return change_picture(tab, Path(file), model) if file else {start.dropped: gr.skip()}

    outputs = [*start.changing(), controls.width, controls.height]
    start.dropped.upload(guarded(took, tab.workspace), [start.dropped, controls.model], outputs, **QUIET)
