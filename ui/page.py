"""The page: its tabs, what happens when it opens, and when Start is pressed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.jobs import drafts, queue
from ui import run_view, train_tab
from ui.blend_tab import build_blend_tab
from ui.door import QUIET, guarded, open_log
from ui.gallery_look import GalleryTab
from ui.gallery_tab import build_gallery_tab
from ui.generate_tab import GenerateTab, build_generate_tab, open_with
from ui.pictures import IN_TURN
from ui.run_view import RunView, build_run_view
from ui.runs_api import add_runs_api
from ui.settings_tab import build_settings_tab
from ui.train_tab import TrainTab, build_train_tab

HEAD = """<header class="masthead"><h1>Reparam Diffusion</h1>
<p>Teach Stable Diffusion a subject or a style from a handful of pictures.</p></header>"""


def build_page(workspace: Path) -> gr.Blocks:
    """The whole page over one workspace."""
    workspace = workspace.resolve()
    open_log(workspace)
    drafts.tidy(workspace)
    queue.ensure_served(workspace)  # runs that waited when the machine went down
    with gr.Blocks(title="Reparam Diffusion", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(HEAD, padding=False)
        with gr.Tabs(elem_id="tabs") as tabs:
            with _tab("Train"):
                train = build_train_tab(workspace)
            with _tab("Runs"):
                view = build_run_view(workspace)
            with _tab("Generate"):
                generate = build_generate_tab(workspace)
            with _tab("Gallery"):
                gallery = build_gallery_tab(workspace)
            with _tab("Blend"):
                build_blend_tab(workspace)
            with _tab("Settings") as settings:
                build_settings_tab(workspace, settings)
        add_runs_api(workspace, view.overview)
        _connect_start(workspace, tabs, train, view)
        _connect_opening(workspace, page, tabs, train, view)
        _connect_trying(workspace, tabs, view, gallery, generate)
        _connect_training_on(workspace, tabs, gallery, train)
    page.queue(default_concurrency_limit=8)
    return page


TABS = ("train", "runs", "generate", "gallery", "blend", "settings")


REMEMBER_TAB = """() => setTimeout(() => {
  const now = document.querySelector('#tabs button[role="tab"][aria-selected="true"]');
  if (!now || !document.body.dataset.opened) return;  // the first tab is selected by itself while the page opens
  const address = new URL(window.location);
  address.searchParams.set("tab", now.textContent.trim().toLowerCase());
  window.history.replaceState(null, "", address);
}, 50)"""


def _tab(title: str) -> gr.Tab:
    """A tab that the address remembers, so that a reload comes back to it."""
    tab = gr.Tab(title, id=title.lower())
    tab.select(None, None, None, js=REMEMBER_TAB)
    return tab


def _connect_start(workspace: Path, tabs: gr.Tabs, train: TrainTab, view: RunView) -> None:
    """Start makes a run and shows it; "Train again" fills the form from one."""

    def start(values: Mapping[Any, Any]) -> dict[Any, Any]:  # Any: gradio's components and updates
        run, updates = train_tab.start(workspace, train, values)
        if run is None:
            return updates
        return {**updates, tabs: gr.Tabs(selected="runs"), **run_view.chosen(view, run.name, {})}

    inputs = {train.pictures.draft, train.marked, *train.form.controls.values()}
    outputs = [tabs, *train.changing(), train.advanced.panel, train.advanced.tabs, *view.changing()]
    # A caption that was being typed is written before the run gets it.
    shown = {"api_visibility": "private", "show_progress": "minimal"}
    train.start.click(guarded(start, workspace), inputs, outputs, **shown, **IN_TURN)

    def again(name: str | None) -> dict[Any, Any]:  # Any: as above
        run = view.overview.find(name)
        return {tabs: gr.Tabs(selected="train"), **train_tab.train_again(workspace, train, run)}

    view.again.click(guarded(again, workspace), view.choice, [tabs, *train.changing()], **QUIET)


def _connect_training_on(workspace: Path, tabs: gr.Tabs, gallery: GalleryTab, train: TrainTab) -> None:
    """ "Train on from this" fills the form so that a run begins with the adapter."""

    def go_on(stem: str, draft: str | None) -> dict[Any, Any]:  # Any: gradio's components and updates
        return {tabs: gr.Tabs(selected="train"), **train_tab.train_on(workspace, train, stem, draft)}

    inputs, outputs = [gallery.selected, train.pictures.draft], [tabs, *train.changing()]
    gallery.go_on.click(guarded(go_on, workspace), inputs, outputs, **QUIET)


def _connect_trying(workspace: Path, tabs: gr.Tabs, view: RunView, gallery: GalleryTab, generate: GenerateTab) -> None:
    """ "Try it" opens Generate with the adapter and a prompt that calls it."""

    def try_run(name: str | None) -> dict[Any, Any]:  # Any: as above
        stem, prompt = run_view.adapter_of(view, name)
        return {tabs: gr.Tabs(selected="generate"), **open_with(generate, [stem], prompt)}

    def try_adapter(stem: str) -> dict[Any, Any]:  # Any: as above
        return {tabs: gr.Tabs(selected="generate"), **open_with(generate, [stem])}

    outputs = [tabs, *generate.changing()]
    view.try_it.click(guarded(try_run, workspace), view.choice, outputs, **QUIET)
    gallery.try_it.click(guarded(try_adapter, workspace), gallery.selected, outputs, **QUIET)


def _connect_opening(workspace: Path, page: gr.Blocks, tabs: gr.Tabs, train: TrainTab, view: RunView) -> None:
    """A page that opens shows the form as this browser left it, and the run in its address or the live one."""

    def opened(kept: Any, request: gr.Request) -> dict[Any, Any]:  # Any: as above, and what a browser stored
        asked = dict(request.query_params)
        wanted = asked.get("run")
        name = view.overview.newest(wanted)
        updates: dict[Any, Any] = {**run_view.chosen(view, name, {})}
        is_live = name is not None and view.overview.state_of(view.overview.find(name)).is_live
        if asked.get("tab") in TABS:
            updates[tabs] = gr.Tabs(selected=asked["tab"])
        elif asked.get("drawing") and not wanted:
            updates[tabs] = gr.Tabs(selected="generate")
        elif name and (wanted == name or is_live):
            updates[tabs] = gr.Tabs(selected="runs")
        return {**updates, **train_tab.restored(workspace, train, kept)}

    outputs = [tabs, *train.changing(), *view.changing()]
    page.load(guarded(opened, workspace), train.kept, outputs, **QUIET).then(
        None, None, None, js="() => { document.body.dataset.opened = true; }"
    )
