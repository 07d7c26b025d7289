"""Three steps to a run: pictures, what they show, a method. Everything else is folded away and filled in."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import PRESETS, TrainConfig, find_preset, settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import datasets, runs, worker
from ui import fragments
from ui.door import guarded
from ui.form import Form, nested

FIRST_PRESET = "starter"
KINDS = [("One subject", "subject"), ("A style", "style")]
COMMON = {
    "training": ("steps", "batch", "learning_rate", "seed"),
    "output": ("sample_every", "name"),
    "data": ("resolution", "flip"),
    "model": ("path", "device"),
}
NOTHING_YET = '<p class="quiet">5 to 20 pictures are good. Captions may come along as text files of the same names.</p>'


@dataclass(frozen=True)
class TrainTab:
    """The controls that handlers read and change."""

    form: Form
    files: gr.File
    chosen: gr.State
    strip: gr.HTML
    examples: list[tuple[gr.Button, datasets.PictureSet]]
    start: gr.Button
    groups: dict[str, gr.Column]
    shown: gr.State


def build_train_tab(workspace: Path) -> TrainTab:
    """Draw the three steps and connect them."""
    form = Form()
    with gr.Row(elem_classes="steps", equal_height=True):
        with gr.Column(elem_classes="card", min_width=300):
            gr.HTML("<h2><span>1</span> Your pictures</h2>", padding=False)
            files, strip, examples = _draw_pictures()
        with gr.Column(elem_classes="card", min_width=300):
            gr.HTML("<h2><span>2</span> What they show</h2>", padding=False)
            _draw_words(form)
        with gr.Column(elem_classes="card", min_width=300):
            gr.HTML("<h2><span>3</span> How to learn it</h2>", padding=False)
            choices = [(f"{method.title}: {method.summary}", name) for name, method in METHODS.items()]
            form.keep("method", gr.Radio(choices, value="lora", label="Method", elem_id="method"))
    start = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
    groups = _draw_advanced(form)
    shown = gr.State(defaults(FIRST_PRESET, "subject", "lora"))
    tab = TrainTab(form, files, gr.State(None), strip, examples, start, groups, shown)
    _connect_pictures(workspace, tab)
    _connect_choices(workspace, tab)
    return tab


def _draw_pictures() -> tuple[gr.File, gr.HTML, list[tuple[gr.Button, datasets.PictureSet]]]:
    """Step 1: a place to drop files, what was chosen, and the examples."""
    files = gr.File(file_count="multiple", label="Your pictures", show_label=False, height=132, elem_id="drop")
    strip = gr.HTML(NOTHING_YET, elem_id="strip", padding=False)
    gr.HTML('<p class="quiet">Or try an example:</p>', padding=False)
    with gr.Row(elem_classes="examples"):
        examples = [(_example_button(one), one) for one in datasets.example_sets()]
    return files, strip, examples


def _example_button(example: datasets.PictureSet) -> gr.Button:
    return gr.Button(example.about.title, icon=example.pictures[0], size="sm", min_width=80, elem_classes="example")


def _draw_words(form: Form) -> None:
    """Step 2: the words that a person gives."""
    form.keep("data.kind", gr.Radio(KINDS, value="subject", label="The pictures show"))
    about = "A made-up word that will call it, such as sks."
    form.keep("data.trigger", gr.Textbox(label="Trigger word", info=about, placeholder="sks", max_lines=1))
    about = "A plain word, such as toy, dog or woman. May stay empty for a style."
    form.keep("data.class_word", gr.Textbox(label="What it is", info=about, placeholder="toy", max_lines=1))


def _draw_advanced(form: Form) -> dict[str, gr.Column]:
    """The folded settings: each method's, of which one group shows, and a few of the training. Gives the groups."""
    groups: dict[str, gr.Column] = {}
    with gr.Accordion("Advanced settings", open=False, elem_id="advanced"):
        about = "Where the settings below come from. Choose the one made for your base model."
        with gr.Row(elem_classes="settings-head"):
            form.keep("preset", gr.Dropdown(presets_to_choose(), value=FIRST_PRESET, label="Preset", info=about))
        for name, method in METHODS.items():
            with gr.Column(visible=name == "lora", elem_classes="settings") as groups[name]:
                gr.HTML(f"<h3>{method.title}</h3>", padding=False)
                with gr.Row(elem_classes="grid"):
                    form.add(settled(FIRST_PRESET, "subject", name).adapter, f"adapter.{name}")
        with gr.Column(elem_classes="settings"):
            gr.HTML("<h3>Training</h3>", padding=False)
            with gr.Row(elem_classes="grid"):
                config = settled(FIRST_PRESET, "subject", "lora")
                for group, names in COMMON.items():
                    form.add(getattr(config, group), group, names)
    return groups


def _connect_pictures(workspace: Path, tab: TrainTab) -> None:
    """Dropped files and examples each say what was chosen."""

    def take_files(names: list[str] | None) -> tuple[datasets.PictureSet | None, str]:
        if not names:
            return None, NOTHING_YET
        found = datasets.sort_files([Path(name) for name in names])
        return found, fragments.strip_of(found)

    for event in (tab.files.upload, tab.files.delete, tab.files.clear):
        event(guarded(take_files, workspace), tab.files, [tab.chosen, tab.strip], api_visibility="private")

    words = [tab.form.controls[place] for place in ("data.trigger", "data.class_word", "data.kind")]
    outputs = [tab.files, tab.chosen, tab.strip, *words]
    for button, example in tab.examples:

        def take_example(example: datasets.PictureSet = example) -> tuple[object, ...]:
            about = example.about
            return None, example, fragments.strip_of(example), about.trigger, about.class_word, about.kind

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # Any: gradio's own arguments
        button.click(guarded(take_example, workspace), None, outputs, **quiet)


def _connect_choices(workspace: Path, tab: TrainTab) -> None:
    """Another kind, method or preset brings its own defaults; what a person changed stays."""
    controls = {*tab.form.controls.values(), tab.shown}

    def refresh(values: Mapping[gr.components.Component, Any]) -> dict[gr.components.Component, Any]:
        now = tab.form.read(values)
        after = defaults(now["preset"], now["data.kind"], now["method"])
        updates = tab.form.refreshed(now, values[tab.shown], after)
        visible = {group: gr.update(visible=name == now["method"]) for name, group in tab.groups.items()}
        return {**updates, **visible, tab.shown: {**values[tab.shown], **after}}

    for place in ("data.kind", "method", "preset"):
        tab.form.controls[place].change(
            guarded(refresh, workspace),
            controls,
            {*controls, *tab.groups.values()},
            api_visibility="private",
            show_progress="hidden",
        )


# --- what Start does: plain functions of values ----------------------------------------------------------------------
def presets_to_choose() -> list[tuple[str, str]]:
    """(title, name) of what settings may start from; presets of one base model, such as sd15-lora, are one choice."""
    found = {FIRST_PRESET: "For the starter model"}
    for file in sorted(PRESETS.glob("*.toml")):
        name, _, method = file.stem.rpartition("-")
        title = str(find_preset(file.stem).get("title") or file.stem)
        if name and method in METHODS:
            found[name] = title.replace(METHODS[method].title, "").strip()
        elif name not in METHODS and file.stem != "style":  # lora-subject and style are the starter model's
            found[file.stem] = title
    return [(title, name) for name, title in found.items()]


def layers_for(preset: str, kind: str, method: str) -> list[dict[str, Any]]:
    """What a run's settings start from, as layers to settle. Any: settings as TOML gives them."""
    own = "style" if kind == "style" else f"{method}-subject"
    names = (own, "quick") if preset == FIRST_PRESET else (f"{preset}-{method}", preset)
    known = next((find_preset(name) for name in names if (PRESETS / f"{name}.toml").is_file()), {})
    return [known, {"adapter": {"method": method}, "data": {"kind": kind}}]


def settled(preset: str, kind: str, method: str) -> TrainConfig:
    """The settings of a run before a person changes any."""
    return settle(*layers_for(preset, kind, method))


def defaults(preset: str, kind: str, method: str) -> dict[str, Any]:
    """What the folded controls show at first, by place. Any: each setting has its own type."""
    config = settled(preset, kind, method)
    shown = {
        f"{group}.{name}": getattr(getattr(config, group), name) for group, names in COMMON.items() for name in names
    }
    adapter = config.adapter.model_dump(exclude={"method"})
    return shown | {f"adapter.{method}.{name}": value for name, value in adapter.items()}


def start_run(workspace: Path, chosen: datasets.PictureSet | None, values: Mapping[str, Any]) -> Path:
    """Copy the pictures into the workspace, make the run, launch its worker. Raises UserError for what is missing."""
    if chosen is None:
        raise UserError("There are no pictures yet.", do="Drop some in step 1, or choose an example.")
    trigger, class_word = str(values["data.trigger"]).strip(), str(values["data.class_word"]).strip()
    if not trigger:
        raise UserError("The trigger word is missing.", do='Write a made-up word in step 2, such as "sks".')
    method, kind = values["method"], values["data.kind"]
    own = f"adapter.{method}."
    overrides = {place: v for place, v in values.items() if not place.startswith(("adapter.", "method", "preset"))}
    overrides |= {f"adapter.{place.removeprefix(own)}": v for place, v in values.items() if place.startswith(own)}
    overrides |= {"data.trigger": trigger, "data.class_word": class_word}
    layers = [*layers_for(values["preset"], kind, method), nested(overrides)]
    settle(*layers)  # a mistake in the settings is told before anything is copied
    folder = datasets.add_dataset(datasets.with_words(chosen, trigger=trigger, class_word=class_word), workspace)
    config = settle(*layers, {"data": {"images": str(folder)}})
    run = runs.create_run(config, workspace, now=datetime.datetime.now())
    worker.launch(run)
    return run
