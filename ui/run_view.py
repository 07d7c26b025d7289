"""One run as it goes: where it stands, its loss, its pictures, and what can be asked of it.

A timer looks at the run's folder; nothing here lasts longer than reading what is new in it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import runs, worker
from reparam_diffusion.jobs.fold import RunState
from ui import fragments
from ui.door import guarded
from ui.plot import loss_plot

OFTEN, SELDOM = 1.0, 4.0  # seconds between two looks at a live run, and at one that has ended
NO_RUN = '<p class="quiet empty">No run yet. Start one under “Train”.</p>'

Updates = dict[gr.components.Component, Any]
"""What a handler changes, by control. Any: gradio's updates."""

_followers: dict[Path, runs.Follower] = {}
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class RunView:
    """The controls of the tab. `shown` remembers what the browser has, so that only changes are sent."""

    choice: gr.Dropdown
    progress: gr.HTML
    stop: gr.Button
    pause: gr.Button
    resume: gr.Button
    result: gr.HTML
    pairs: gr.HTML
    loss: gr.HTML
    log: gr.HTML
    timer: gr.Timer
    shown: gr.State

    def changing(self) -> list[gr.components.Component]:
        """Everything that a look may change."""
        return [*vars(self).values()]


def build_run_view(workspace: Path) -> RunView:
    """Draw the tab and connect its buttons and its timer."""
    with gr.Row(elem_classes="run-head"):
        choice = gr.Dropdown([], label="Run", elem_id="run", scale=3, min_width=260)
        with gr.Row(scale=2, elem_classes="asks"):
            pause = gr.Button("Pause", visible=False, min_width=90, elem_id="pause")
            stop = gr.Button("Stop", visible=False, min_width=90, elem_id="stop")
            resume = gr.Button("Resume", visible=False, variant="primary", min_width=120, elem_id="resume")
    progress = gr.HTML(NO_RUN, elem_id="progress", padding=False)
    result = gr.HTML("", elem_id="result", padding=False)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300, elem_classes="card"):
            gr.HTML("<h2>Before and after</h2>", padding=False)
            pairs = gr.HTML("", elem_id="pairs", padding=False)
        with gr.Column(scale=2, min_width=300, elem_classes="card"):
            gr.HTML("<h2>Loss</h2>", padding=False)
            loss = gr.HTML("", elem_id="loss", elem_classes="loss", padding=False)
    log = gr.HTML("", elem_id="log", padding=False)
    view = RunView(
        choice, progress, stop, pause, resume, result, pairs, loss, log, gr.Timer(OFTEN), gr.State({})
    )  # fmt: skip
    _connect(workspace, view)
    return view


def _connect(workspace: Path, view: RunView) -> None:
    seen = [view.choice, view.shown]

    def see(name: str | None, shown: Mapping[str, Any]) -> Updates:
        return look(workspace, view, name, shown)

    def ask_and_see(request: Any, name: str | None, shown: Mapping[str, Any]) -> Updates:
        folder = run_called(workspace, name)
        if request == "resume":
            resume_run(folder)
        else:
            runs.ask(folder, request)
        return look(workspace, view, name, shown)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    for event in (view.timer.tick, view.choice.input):
        event(guarded(see, workspace), seen, view.changing(), **quiet)
    view.choice.change(None, view.choice, None, js=REMEMBER_IN_ADDRESS)
    for button, request in ((view.stop, "stop"), (view.pause, "pause"), (view.resume, "resume")):

        def pressed(name: str | None, shown: Mapping[str, Any], request: str = request) -> Updates:
            return ask_and_see(request, name, shown)

        button.click(guarded(pressed, workspace), seen, view.changing(), **quiet)


REMEMBER_IN_ADDRESS = """(run) => {
  const address = new URL(window.location);
  if (run) address.searchParams.set("run", run);
  window.history.replaceState(null, "", address);
}"""


# --- plain functions of values ---------------------------------------------------------------------------------------
def run_called(workspace: Path, name: str | None) -> Path:
    """The folder of a run in this workspace. Raises UserError when there is none of that name."""
    for folder in runs.list_runs(workspace):
        if folder.name == name:
            return folder
    raise UserError(f'There is no run called "{name}".', do="Choose one from the list.")


def resume_run(folder: Path) -> None:
    """Go on from the last checkpoint, or from the start where there is none."""
    worker.launch(folder, resume=state_of(folder).checkpoint is not None)


def state_of(folder: Path) -> RunState:
    """The run's state; only what is new is read."""
    with _one_at_a_time:
        follower = _followers.setdefault(folder, runs.Follower(folder))
        return follower.look()


def run_to_open(workspace: Path, wanted: str | None) -> str | None:
    """Which run a fresh page shows: the one in its address, else the newest live one, else the newest."""
    names = [folder.name for folder in runs.list_runs(workspace)]
    if wanted in names:
        return wanted
    live = (folder.name for folder in runs.list_runs(workspace)[:10] if state_of(folder).is_live)
    return next(live, names[0] if names else None)


def label_of(name: str) -> str:
    """ "sks-toy-lora, 2026-11-24 03:52" for 20261124-035206-sks-toy-lora."""
    day, _, rest = name.partition("-")
    time, _, words = rest.partition("-")
    if not (day.isdigit() and time.isdigit() and len(day) == 8 and len(time) == 6 and words):
        return name
    return f"{words}, {day[:4]}-{day[4:6]}-{day[6:]} {time[:2]}:{time[2:4]}"


def look(workspace: Path, view: RunView, name: str | None, shown: Mapping[str, Any]) -> Updates:
    """What has changed since the browser was last told, and nothing else."""
    fresh = _contents(workspace, view, name)
    updates = {
        control: make() if callable(make) else make
        for control, (sign, make) in fresh.items()
        if shown.get(control.elem_id or "timer") != sign
    }
    if updates:
        updates[view.shown] = {control.elem_id or "timer": sign for control, (sign, _) in fresh.items()}
    else:
        updates[view.shown] = gr.skip()
    return updates


def _contents(workspace: Path, view: RunView, name: str | None) -> dict[gr.components.Component, tuple[Any, Any]]:
    """For each control a sign of what it shows, and the update (or how to make it). Any: values of many kinds."""
    names = [folder.name for folder in runs.list_runs(workspace)]
    choices = [(label_of(one), one) for one in names]
    listed = (tuple(names), name), gr.update(choices=choices, value=name)
    if name is None or name not in names:
        return {view.choice: listed, view.progress: (NO_RUN, gr.update(value=NO_RUN))}
    folder = run_called(workspace, name)
    state, request = state_of(folder), runs.asked(folder)
    progress = fragments.progress_of(state, request)
    result = fragments.result_of(folder, state)
    log = fragments.log_of(runs.log_file(folder)) if state.state in ("failed", "lost") else ""
    pictures = tuple((sample.step, sample.path) for sample in state.samples)
    pace = OFTEN if state.is_live else SELDOM
    resume = "Resume" if state.checkpoint else "Start again" if state.state != "created" else "Start"
    can_ask = state.is_live and not request

    def pairs() -> str:
        return fragments.pairs_of(folder, state.samples, is_live=state.is_live)

    return {
        view.choice: listed,
        view.progress: (progress, gr.update(value=progress)),
        view.result: (result, gr.update(value=result)),
        view.pairs: ((name, pictures, state.is_live), lambda: gr.update(value=pairs())),
        view.loss: (
            (name, state.step, len(state.losses), len(state.validations)),
            lambda: gr.update(value=loss_plot(state)),
        ),
        view.log: (log, gr.update(value=log)),
        view.stop: (can_ask, gr.update(visible=can_ask)),
        view.pause: (can_ask, gr.update(visible=can_ask)),
        view.resume: ((state.can_resume, resume), gr.update(visible=state.can_resume, value=resume)),
        view.timer: (pace, gr.Timer(pace)),
    }
