"""The Runs tab: the list with the queue, and one run as it goes: where it stands, its loss, its pictures, what to ask.

A timer looks at the runs' folders; nothing here lasts longer than reading what is new in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import queue, runs
from reparam_diffusion.jobs.fold import RunState
from reparam_diffusion.jobs.overview import Overview, overview_of
from ui import run_fragments as pieces
from ui.door import QUIET, guarded
from ui.plot import loss_plot

OFTEN, SELDOM = 1.0, 4.0  # seconds between two looks while something goes on, and otherwise
AT_ONCE = 60
"""How many runs are listed at first, and how many more for each press."""
NO_RUN = '<p class="quiet empty">Choose a run, or start one under “Train”.</p>'

Updates = dict[gr.blocks.Block, Any]
"""What a handler changes, by control. Any: gradio's updates."""
Contents = dict[gr.blocks.Block, tuple[Any, Any]]
"""For each control a sign of what it shows, and the update (or how to make it). Any: values of many kinds."""


@dataclass(frozen=True)
class RunView:
    """The controls of the tab. `shown` remembers what the browser has, so that only changes are sent."""

    overview: Overview
    choice: gr.Textbox
    listed: gr.HTML
    progress: gr.HTML
    stop: gr.Button
    pause: gr.Button
    resume: gr.Button
    sample: gr.Button
    try_it: gr.Button
    again: gr.Button
    bin: gr.Button
    result: gr.HTML
    before_after: gr.Column
    pairs: gr.HTML
    curves: gr.Column
    loss: gr.HTML
    details: gr.HTML
    timer: gr.Timer
    shown: gr.State

    def changing(self) -> list[gr.blocks.Block]:
        """Everything that a look may change."""
        return [control for name, control in vars(self).items() if name != "overview"]


def build_run_view(workspace: Path) -> RunView:
    """Draw the tab and connect its buttons and its timer."""
    choice = gr.Textbox(visible="hidden", elem_id="run")
    with gr.Row(equal_height=False, elem_classes="runs"):
        with gr.Column(scale=2, min_width=280, elem_classes="card run-side"):
            gr.HTML("<h2>Runs</h2>", padding=False)
            listed = gr.HTML("", elem_id="run-list", padding=False, js_on_load=pieces.CHOOSE)
        with gr.Column(scale=5, min_width=320):
            progress = gr.HTML(NO_RUN, elem_id="progress", padding=False, js_on_load=pieces.TICK)
            with gr.Row(elem_classes="asks"):
                resume = _button("Resume", "resume", "primary")
                try_it = _button("Try it", "try-run", "primary")
                pause, stop = _button("Pause", "pause"), _button("Stop", "stop")
                sample = _button("Sample now", "sample")
                again = _button("Train again with these settings", "again")
                bin_ = _button("Move to bin", "bin-run")
            result = gr.HTML("", elem_id="result", padding=False)
            with gr.Column(elem_classes="card", visible=False, elem_id="before-after") as before_after:
                gr.HTML("<h2>Before and after</h2>", padding=False)
                pairs = gr.HTML("", elem_id="pairs", padding=False, js_on_load=pieces.SCRUB + pieces.STAY_OPEN)
            with gr.Column(elem_classes="card", visible=False, elem_id="curves") as curves:
                gr.HTML("<h2>Loss</h2>", padding=False)
                loss = gr.HTML("", elem_id="loss", elem_classes="loss", padding=False, js_on_load=pieces.STAY_OPEN)
            details = gr.HTML("", elem_id="details", padding=False, js_on_load=pieces.STAY_OPEN)
    view = RunView(
        overview_of(workspace), choice, listed, progress, stop, pause, resume, sample, try_it, again, bin_, result,
        before_after, pairs, curves, loss, details, gr.Timer(OFTEN), gr.State({}),
    )  # fmt: skip
    _connect(workspace, view)
    return view


def _button(text: str, name: str, variant: Any = "secondary") -> gr.Button:  # Any: gradio's own Literal
    return gr.Button(text, visible=False, min_width=80, size="md", elem_id=name, variant=variant)


def _connect(workspace: Path, view: RunView) -> None:
    seen = [view.choice, view.shown]
    quiet = {**QUIET, "concurrency_limit": None}

    def see(name: str | None, shown: Mapping[str, Any]) -> Updates:
        return look(view, name, shown)

    view.timer.tick(guarded(see, workspace), seen, view.changing(), **quiet)

    def choose(shown: Mapping[str, Any], event: gr.EventData) -> Updates:
        return chosen(view, event.run, shown)

    view.listed.select(guarded(choose, workspace), view.shown, view.changing(), **quiet)
    view.choice.change(None, view.choice, None, js=REMEMBER_IN_ADDRESS)

    def change_queue(name: str | None, shown: Mapping[str, Any], event: gr.EventData) -> Updates:
        if event.act == "more":
            return look(view, name, {**shown, "listed": shown.get("listed", AT_ONCE) + AT_ONCE})
        QUEUE_ACTS[event.act](workspace, event.run)
        return look(view, name, shown)

    view.listed.edit(guarded(change_queue, workspace), seen, view.changing(), **quiet)
    for button, act in (
        (view.stop, stop_run),
        (view.pause, pause_run),
        (view.resume, resume_run),
        (view.sample, sample),
    ):

        def pressed(name: str | None, shown: Mapping[str, Any], act: Callable[[Path], None] = act) -> Updates:
            act(view.overview.find(name))
            return look(view, name, shown)

        button.click(guarded(pressed, workspace), seen, view.changing(), **quiet)

    def bin_run(name: str | None) -> Updates:
        place = view.overview.bin(view.overview.find(name))
        gr.Info(f"Moved to {escape(str(place.relative_to(workspace)))}. Its adapter in the gallery stays.")
        return chosen(view, view.overview.newest(), {})

    view.bin.click(guarded(bin_run, workspace), view.choice, view.changing(), **quiet)


REMEMBER_IN_ADDRESS = """(run) => {
  if (!document.body.dataset.opened) return;  // nobody has chosen it, the page shows it by itself
  const address = new URL(window.location);
  if (run) address.searchParams.set("run", run); else address.searchParams.delete("run");
  window.history.replaceState(null, "", address);
}"""


# --- plain functions of values ---------------------------------------------------------------------------------------
QUEUE_ACTS: dict[str, Callable[[Path, str], object]] = {
    "up": lambda workspace, run: queue.move(workspace, run, -1),
    "down": lambda workspace, run: queue.move(workspace, run, 1),
    "out": queue.remove,
    "clear": lambda workspace, run: queue.clear(workspace),
}


def stop_run(folder: Path) -> None:
    """Ask for an end with an adapter; a run that waits leaves the queue."""
    queue.stop(folder)


def pause_run(folder: Path) -> None:
    """Ask for an end with a place to go on from; a run that waits leaves the queue."""
    queue.stop(folder, "pause")


def sample(folder: Path) -> None:
    """Ask for preview pictures now."""
    queue.ask_sample(folder)


def resume_run(folder: Path) -> None:
    """Go on from the last checkpoint, or from the start where there is none."""
    queue.submit(folder, resume=runs.state_of(folder).checkpoint is not None)


def chosen(view: RunView, name: str | None, shown: Mapping[str, Any]) -> Updates:
    """Another run is shown from now on. (A look never says which: it may be late.)"""
    return {**look(view, name, shown), view.choice: name}


def look(view: RunView, name: str | None, shown: Mapping[str, Any]) -> Updates:
    """What has changed since the browser was last told, and nothing else."""
    fresh = _contents(view, name, shown.get("listed", AT_ONCE))
    updates = {
        control: make() if callable(make) else make
        for control, (sign, make) in fresh.items()
        if shown.get(_key(control)) != sign
    }
    if updates:
        updates[view.shown] = {**shown, **{_key(control): sign for control, (sign, _) in fresh.items()}}
    else:
        updates[view.shown] = gr.skip()
    return updates


def _key(control: gr.blocks.Block) -> str:
    return control.elem_id or "timer"


def _contents(view: RunView, name: str | None, most: int) -> Contents:
    rows = view.overview.look()
    known = {folder.name: (folder, state) for folder, state in rows}
    listed = (name, most, len(rows), tuple(pieces.sign_of(folder, state) for folder, state in rows[:most]))
    pace = OFTEN if any(state.is_live for _, state in rows) else SELDOM
    common: Contents = {
        view.listed: (listed, lambda: gr.update(value=pieces.list_of(rows, name, most=most))),
        view.timer: (pace, gr.Timer(pace)),
    }
    if name is None or name not in known:
        hidden = [*_buttons(view), view.before_after, view.curves]
        buttons = {part: (False, gr.update(visible=False)) for part in hidden}
        empty = {part: ("", gr.update(value="")) for part in (view.result, view.pairs, view.loss, view.details)}
        return {**common, **buttons, **empty, view.progress: (NO_RUN, gr.update(value=NO_RUN))}
    return {**common, **_run_contents(view, *known[name])}


def _buttons(view: RunView) -> list[gr.Button]:
    return [view.stop, view.pause, view.resume, view.sample, view.try_it, view.again, view.bin]


def _run_contents(view: RunView, folder: Path, state: RunState) -> Contents:
    request = runs.asked(folder)
    progress = pieces.progress_of(folder.name, state, request)
    result = pieces.result_of(folder, state)
    log = pieces.log_of(runs.log_file(folder), is_open=state.state in ("failed", "lost"))
    details = pieces.ranks_of(state.ranks) + log
    pictures = (folder.name, tuple((sample.step, sample.path) for sample in state.samples), state.is_live)
    points = (folder.name, state.step, len(state.losses), len(state.validations))
    resume = "Resume" if state.checkpoint is not None else "Start again" if state.state != "created" else "Start"
    can_ask = state.is_live and not request
    is_stepping = can_ask and state.phase == "training"

    def pairs() -> Any:
        return gr.update(value=pieces.pairs_of(folder, state.samples, is_live=state.is_live))

    return {
        view.progress: (progress, gr.update(value=progress)),
        view.result: (result, gr.update(value=result)),
        view.before_after: (True, _shown(True)),
        view.curves: (True, _shown(True)),
        view.pairs: (pictures, pairs),
        view.loss: (points, lambda: gr.update(value=loss_plot(state))),
        view.details: (details, gr.update(value=details)),
        view.stop: ((can_ask, state.place), _shown(can_ask, "Take out of the queue" if state.place else "Stop")),
        view.pause: (can_ask and not state.place, _shown(can_ask and not state.place)),
        view.resume: ((state.can_resume, resume), _shown(state.can_resume, resume)),
        view.sample: (is_stepping, _shown(is_stepping)),
        view.try_it: (bool(result), _shown(bool(result))),
        view.again: (True, _shown(True)),
        view.bin: (not state.is_live, _shown(not state.is_live)),
    }


def _shown(is_shown: bool, text: str | None = None) -> Any:  # Any: gradio's update
    return gr.update(visible=is_shown) if text is None else gr.update(visible=is_shown, value=text)


def adapter_of(view: RunView, name: str | None) -> tuple[str, str]:
    """The gallery file's stem that a run made, and a prompt to try it with. Raises UserError before it is there."""
    folder = view.overview.find(name)
    state = view.overview.state_of(folder)
    file = folder / state.gallery if state.gallery else None
    if file is None or not file.resolve().is_file():
        raise UserError("This run has no adapter in the gallery.", do="Let it finish, or stop it.")
    prompts = [one.prompt for one in state.samples]
    return file.stem, prompts[-1] if prompts else ""
