"""Training for other programs: named endpoints that gradio_client calls, with plain values in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import settle
from reparam_diffusion.errors import UserError, unknown_name
from reparam_diffusion.jobs import datasets, presets, queue, runs
from reparam_diffusion.jobs.fold import RunState
from reparam_diffusion.jobs.overview import Overview
from ui import run_view, starting
from ui.door import guarded
from ui.form import nested

Row = dict[str, Any]
"""A JSON object. Any: JSON's own values."""
ASKS = {
    "stop": run_view.stop_run,
    "pause": run_view.pause_run,
    "resume": run_view.resume_run,
    "sample": run_view.sample,
}


def add_runs_api(workspace: Path, overview: Overview) -> None:
    """Add the endpoints to the page that is being built."""

    def list_runs() -> list[Row]:
        """Every run, the newest first: name, state, step, steps, place in the queue."""
        return [row_of(folder, state) for folder, state in overview.look()]

    def run_details(name: str) -> Row:
        """One run: its row of the list, its loss, warnings, previews and the finished adapter's stem."""
        folder = overview.find(name)
        return details_of(folder, overview.state_of(folder))

    def run_ask(name: str, request: str) -> Row:
        """Ask a run to stop, pause, resume or sample (draw previews now)."""
        folder = overview.find(name)
        if request not in ASKS:
            raise unknown_name("request", request, ASKS)
        ASKS[request](folder)
        return row_of(folder, overview.state_of(folder))

    def queue_move(name: str, by: int) -> list[str]:
        """Let a waiting run wait `by` places later (earlier where negative); gives the queue."""
        queue.move(workspace, name, by)
        return list(runs.read_queue(workspace))

    def queue_clear() -> int:
        """Empty the queue; gives how many waited. The runs stay and can be resumed."""
        return queue.clear(workspace)

    for endpoint in (list_runs, run_details, run_ask, queue_move, queue_clear):
        gr.api(guarded(endpoint, workspace, plain=True), api_name=endpoint.__name__, api_description=endpoint.__doc__)
    _add_train(workspace, overview)


def _add_train(workspace: Path, overview: Overview) -> None:
    """`/train` takes uploads, which need a component that checks that they are uploads."""
    with gr.Row(visible=False):
        files = gr.File(file_count="multiple", label="Pictures and captions")
        trigger, class_word = gr.Textbox(label="Trigger word"), gr.Textbox(label="What it is")
        settings = gr.JSON({}, label='Settings by place, such as {"method": "lokr", "training.steps": 300}')
        started, press = gr.JSON(label="The run"), gr.Button("Train")

    def train(files: list[str] | None, trigger: str, class_word: str, settings: Row | None) -> Row:
        """Train on uploaded pictures: start now, or wait in the queue."""
        if not files:
            raise UserError("There are no pictures.", do="Send some with gradio_client's handle_file.")
        words = {"data.trigger": trigger, "data.class_word": class_word}
        run = train_on(workspace, [Path(file) for file in files], {**(settings or {}), **words})
        return row_of(run, overview.state_of(run))

    press.click(guarded(train, workspace), [files, trigger, class_word, settings], started, api_name="train")


# --- plain functions of values ---------------------------------------------------------------------------------------
def train_on(workspace: Path, files: list[Path], settings: Row) -> Path:
    """Make a run of files and settings by place ("method", "preset", "card" too), line it up; gives its folder."""
    given = dict(settings)
    method, preset = str(given.pop("method", "lora")), str(given.pop("preset", presets.FIRST))
    if method not in METHODS:
        raise unknown_name("method", method, METHODS, place="method")
    if "data.images" in given:
        raise UserError("data.images cannot be set here.", do="Send the pictures along.", place="data.images")
    kind, card = str(given.get("data.kind", "subject")), str(given.pop("card", ""))
    layers = presets.layers(preset, workspace, kind=kind, method=method, card=card)
    return starting.start_config(workspace, datasets.sort_files(files), settle(*layers, nested(given)))


def row_of(folder: Path, state: RunState) -> Row:
    """A run in short, as plain values."""
    return {
        "name": folder.name,
        "state": state.state,
        "step": state.step,
        "steps": state.steps,
        "place": state.place,
        "where": state.where,
        "waiting_for": state.waiting_for,
        "message": state.message,
    }


def details_of(folder: Path, state: RunState) -> Row:
    """A run at length, as plain values."""
    return {
        **row_of(folder, state),
        "losses": state.losses,
        "validations": [(row.step, row.loss) for row in state.validations],
        "warnings": state.warnings,
        "samples": [{"step": one.step, "prompt": one.prompt, "seed": one.seed} for one in state.samples],
        "seconds_left": state.seconds_left,
        "adapter": Path(state.gallery).stem if state.gallery else "",
    }
