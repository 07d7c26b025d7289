"""The page: its tabs, what happens when it opens, and when Start is pressed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from ui import run_view
from ui.door import guarded, open_log
from ui.generate_tab import build_generate_tab
from ui.run_view import RunView, build_run_view
from ui.train_tab import build_train_tab, start_run

HEAD = """<header class="masthead"><h1>Reparam Diffusion</h1>
<p>Teach Stable Diffusion a subject or a style from a handful of pictures.</p></header>"""


def build_page(workspace: Path) -> gr.Blocks:
    """The whole page over one workspace."""
    workspace = workspace.resolve()
    open_log(workspace)
    with gr.Blocks(title="Reparam Diffusion", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(HEAD, padding=False)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Train", id="train"):
                train = build_train_tab(workspace)
            with gr.Tab("Runs", id="runs"):
                view = build_run_view(workspace)
            with gr.Tab("Generate", id="generate"):
                build_generate_tab(workspace)

        def start(values: Mapping[gr.components.Component, Any]) -> dict[Any, Any]:  # Any: gradio's updates
            run = start_run(workspace, values[train.chosen], train.form.read(values))
            return {tabs: gr.Tabs(selected="runs"), **shown_anew(workspace, view, run.name)}

        train.start.click(
            guarded(start, workspace),
            {train.chosen, *train.form.controls.values()},
            [tabs, *view.changing()],
            api_visibility="private",
            show_progress="minimal",
        )

        def opened(request: gr.Request) -> dict[Any, Any]:  # Any: gradio's updates
            wanted = dict(request.query_params).get("run")
            name = run_view.run_to_open(workspace, wanted)
            updates: dict[Any, Any] = shown_anew(workspace, view, name)
            is_live = name is not None and run_view.state_of(run_view.run_called(workspace, name)).is_live
            if wanted == name or is_live:
                updates[tabs] = gr.Tabs(selected="runs" if name else "train")
            return updates

        page.load(
            guarded(opened, workspace), None, [tabs, *view.changing()], api_visibility="private", show_progress="hidden"
        )
    page.queue(default_concurrency_limit=8)
    return page


def shown_anew(workspace: Path, view: RunView, name: str | None) -> dict[Any, Any]:
    """Everything about a run, for a browser that shows nothing of it yet. Any: gradio's updates."""
    return {**run_view.look(workspace, view, name, {})}
