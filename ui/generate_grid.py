"""The grid of any two things: two axes and their values, folded below the drawing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.gallery.recipe import Recipe
from reparam_diffusion.jobs import runs, studio, studio_grid
from reparam_diffusion.jobs.studio_grid import AXES
from ui.door import QUIET, guarded
from ui.generate_form import Updates, Values, adapter_choices


@dataclass(frozen=True)
class GridControls:
    """What goes across, what goes down, and the button."""

    across: gr.Dropdown
    across_values: gr.Dropdown
    down: gr.Dropdown
    down_values: gr.Dropdown
    go: gr.Button

    def inputs(self) -> set[gr.components.Component]:
        """What handlers read."""
        return {self.across, self.across_values, self.down, self.down_values}


def draw_grid() -> GridControls:
    """The controls, filled in with strengths across and seeds down."""
    across, across_values = _draw_side("Across", "strength")
    down, down_values = _draw_side("Down", "seed")
    return GridControls(across, across_values, down, down_values, gr.Button("Draw the grid", elem_id="draw-grid"))


def _draw_side(label: str, axis: str) -> tuple[gr.Dropdown, gr.Dropdown]:
    with gr.Row():
        what = gr.Dropdown([(one.name, key) for key, one in AXES.items()], value=axis, label=label, min_width=140)
        values = gr.Dropdown(
            list(AXES[axis].example),
            value=list(AXES[axis].example),
            multiselect=True,
            allow_custom_value=True,
            label=f"{label}: values",
            info=f"{AXES[axis].hint} Press Enter after each.",
            min_width=220,
            scale=2,
        )
    return what, values


def connect(grid: GridControls, workspace: Path) -> None:
    """Another axis brings its own values."""
    for axis, values in ((grid.across, grid.across_values), (grid.down, grid.down_values)):

        def other(name: str, values: gr.Dropdown = values) -> Updates:
            return {values: values_for(name, workspace)}

        axis.input(guarded(other, workspace), axis, [values], **QUIET)


def values_for(axis: str, workspace: Path) -> Any:  # Any: gradio's update
    """What can stand on an axis, and what stands there at first."""
    known = AXES[axis]
    choices = adapters_and_checkpoints(workspace) if axis == "adapter" else [(one, one) for one in known.example]
    chosen = [value for _, value in choices[:2]] if axis == "adapter" else list(known.example)
    return gr.update(choices=choices, value=chosen, info=f"{known.hint} Press Enter after each.")


def adapters_and_checkpoints(workspace: Path) -> list[tuple[str, str]]:
    """(label, name) of everything on the shelf and of the checkpoints of the last runs, newest runs first."""
    found = adapter_choices(workspace)[1:]
    for run in runs.list_runs(workspace)[:20]:
        steps = (file.parent for file in run.glob("checkpoints/*/adapter.safetensors"))
        for folder in sorted((one for one in steps if one.name.isdecimal()), key=lambda one: int(one.name)):
            name = f"runs/{run.name}/checkpoints/{folder.name}/adapter.safetensors"
            found.append((studio_grid.short_name(name), name))
    return found


def read_grid(grid: GridControls, values: Values, recipe: Recipe) -> studio.Request:
    """The grid that the controls say. Raises UserError for what cannot be varied so."""
    return studio_grid.grid(
        recipe,
        across=(values[grid.across], tuple(values[grid.across_values] or ())),
        down=(values[grid.down], tuple(values[grid.down_values] or ())),
    )
