"""Three steps to a run: pictures, what they show, a method. Everything else is folded away and filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import drafts, presets
from reparam_diffusion.training.cards import card_layer, cards
from ui import advanced, ahead, starting
from ui.advanced import Advanced, draw_advanced
from ui.door import QUIET, guarded
from ui.form import Form, by_place
from ui.pictures import (
    Captions,
    Pictures,
    chosen_of,
    connect_describing,
    connect_pictures,
    describing_now,
    draw_captions,
    draw_pictures,
    drop_start_from,
    show_draft,
)

START_FROM = "training.start_from"
KINDS = [("One subject", "subject"), ("A style", "style")]
Updates = dict[Any, Any]
"""What a handler changes, by control. Any: gradio's components and updates."""


@dataclass(frozen=True)
class TrainTab:
    """The controls that handlers read and change.

    `shown` are the defaults on show, `marked` is a mistake (place and value), `kept` survives a reload.
    """

    form: Form
    pictures: Pictures
    captions: Captions
    start: gr.Button
    trouble: gr.HTML
    told: gr.HTML
    advanced: Advanced
    shown: gr.State
    marked: gr.State
    kept: gr.BrowserState

    def changing(self) -> list[Any]:
        """Everything that filling the form may change. Any: gradio's components."""
        return [
            *self.form.controls.values(),
            *self.advanced.groups.values(),
            *_draft_controls(self),
            *(self.captions.told, self.captions.timer),
            *(self.shown, self.marked, self.trouble, self.kept),
        ]


def build_train_tab(workspace: Path) -> TrainTab:
    """Draw the three steps and connect them."""
    form = Form()
    with gr.Row(elem_classes="steps", equal_height=True):
        with gr.Column(elem_classes="card", min_width=300):
            gr.HTML("<h2><span>1</span> Your pictures</h2>", padding=False)
            pictures = draw_pictures()
        with gr.Column(elem_classes="card", min_width=300):
            gr.HTML("<h2><span>2</span> What they show</h2>", padding=False)
            _draw_words(form)
        with gr.Column(elem_classes="card", min_width=300):
            gr.HTML("<h2><span>3</span> How to learn it</h2>", padding=False)
            form.keep("method", gr.Radio(ahead.cards({}), value="lora", label="Method", elem_id="method"))
    start = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
    with gr.Row(visible=False, elem_id="continues") as continues:
        base = gr.HTML("", padding=False, elem_classes="quiet")
        stop_continuing = gr.Button("Train from scratch", size="sm", min_width=140, scale=0)
    trouble = gr.HTML("", elem_id="trouble", padding=False)
    told = gr.HTML("", elem_id="ahead", padding=False)
    captions = draw_captions()
    settings = draw_advanced(form, workspace)
    first = gr.State(starting.defaults(workspace, presets.FIRST, "subject", "lora"))
    kept = gr.BrowserState({}, storage_key="reparam-train", secret="reparam-train")
    tab = TrainTab(form, pictures, captions, start, trouble, told, settings, first, gr.State(None), kept)
    connect_pictures(workspace, pictures, captions, form.controls)
    connect_describing(workspace, pictures, captions)
    _connect_choices(workspace, tab)
    _connect_settings(workspace, tab)
    _connect_memory(workspace, tab)
    _connect_start_from(workspace, tab, continues, base, stop_continuing)
    _connect_ahead(workspace, tab)
    _connect_marks(workspace, tab)
    return tab


def _draw_words(form: Form) -> None:
    """Step 2: the words that a person gives."""
    form.keep("data.kind", gr.Radio(KINDS, value="subject", label="The pictures show", elem_id="kind"))
    about = "A made-up word that will call it, such as sks."
    form.keep("data.trigger", gr.Textbox(label="Trigger word", info=about, placeholder="sks", max_lines=1))
    about = "A plain word, such as toy, dog or woman. May stay empty for a style."
    form.keep("data.class_word", gr.Textbox(label="What it is", info=about, placeholder="toy", max_lines=1))


def _connect_choices(workspace: Path, tab: TrainTab) -> None:
    """Another kind, method or preset brings its own defaults; what a person changed stays."""
    form = tab.form
    controls = {*form.controls.values(), tab.shown}

    def refresh(values: Mapping[Any, Any]) -> Updates:
        now = form.read(values)
        after = starting.defaults(workspace, now["preset"], now["data.kind"], now["method"], card=now["card"])
        return {
            **form.refreshed(now, values[tab.shown], after),
            **show_method(tab, now["method"]),
            tab.shown: {**values[tab.shown], **after},
        }

    def choose_card(values: Mapping[Any, Any]) -> Updates:
        updates = refresh(values)
        chosen = by_place(card_layer(values[form.controls["card"]]))
        return {**updates, **form.filled(chosen)}  # also what a person has changed: it would not fit otherwise

    def choose_preset(values: Mapping[Any, Any]) -> Updates:
        name = values[form.controls["preset"]]
        if not name.startswith(presets.MINE):
            return refresh(values)
        mine = starting.settled(workspace, name, "subject", "lora", card=values[form.controls["card"]])
        shown = {
            place: v for place, v in starting.shown_of(mine).items() if place not in ("data.trigger", "data.class_word")
        }
        return {**fill(workspace, tab, shown), tab.shown: {**values[tab.shown], **shown}}

    outputs = [*form.controls.values(), *tab.advanced.groups.values(), tab.shown]
    for place in ("data.kind", "method"):
        form.controls[place].input(guarded(refresh, workspace), controls, outputs, **QUIET)
    form.controls["preset"].input(guarded(choose_preset, workspace), controls, outputs, **QUIET)
    form.controls["card"].input(guarded(choose_card, workspace), controls, outputs, **QUIET)
    # An example sets the kind without a person's input.
    for button, _ in tab.pictures.examples:
        button.click(None).then(guarded(refresh, workspace), controls, outputs, **QUIET)


def show_method(tab: TrainTab, method: str) -> Updates:
    """Only the chosen method's own settings are to be seen."""
    return {group: gr.update(visible=name == method) for name, group in tab.advanced.groups.items()}


def fill(workspace: Path, tab: TrainTab, shown: Mapping[str, Any]) -> Updates:
    """Make the form show these values, whatever it showed. Any: settings of all types."""
    return {**tab.form.filled(shown), **(show_method(tab, shown["method"]) if "method" in shown else {})}


def _connect_settings(workspace: Path, tab: TrainTab) -> None:
    """Presets of one's own, and settings as files."""
    form, settings = tab.form, tab.advanced
    controls = {*form.controls.values(), settings.preset_name}

    def save(values: Mapping[Any, Any]) -> Any:
        return advanced.saved(workspace, form.settings(form.read(values)), values[settings.preset_name])

    def open_file(file: str, shown: Mapping[str, Any]) -> Updates:
        values = advanced.from_file(file)
        gr.Info("The settings of the file are in the form.")
        return {**fill(workspace, tab, values), tab.shown: {**shown, **values}}

    def download(values: Mapping[Any, Any]) -> str:
        return advanced.as_file(form.settings(form.read(values)))

    def delete(name: str) -> Any:
        return advanced.deleted(workspace, name)

    preset = form.controls["preset"]
    settings.delete_preset.click(guarded(delete, workspace), preset, preset, **QUIET)
    settings.save_preset.click(guarded(save, workspace), controls, form.controls["preset"], **QUIET)
    outputs = [*form.controls.values(), *settings.groups.values(), tab.shown]
    settings.settings_file.upload(guarded(open_file, workspace), [settings.settings_file, tab.shown], outputs, **QUIET)
    settings.take_file.click(guarded(download, workspace), controls, settings.file_text, **QUIET).then(
        None, settings.file_text, None, js=advanced.SAVE_AS_FILE
    )


def _connect_memory(workspace: Path, tab: TrainTab) -> None:
    """What was typed and chosen is kept in the browser, and the pictures in their draft."""
    form = tab.form
    inputs = {*form.controls.values(), tab.pictures.draft}

    def keep(values: Mapping[Any, Any]) -> dict[str, Any]:
        return {"values": form.read(values), "draft": values[tab.pictures.draft]}

    changes = [control.input for control in form.controls.values()]
    changes += [tab.pictures.draft.change, form.controls[START_FROM].change]
    gr.on(changes, guarded(keep, workspace), inputs, tab.kept, trigger_mode="always_last", **QUIET)


def _connect_start_from(workspace: Path, tab: TrainTab, row: gr.Row, text: gr.HTML, stop: gr.Button) -> None:
    """The adapter that a run continues from is shown at Start, and goes with the subject that it was trained on."""
    control = tab.form.controls[START_FROM]
    assert isinstance(control, gr.Textbox)

    def show(name: str) -> list[Any]:
        words = f"Continues training from <strong>{escape(name.strip())}</strong>."
        return [gr.update(visible=bool(name.strip())), f'<p class="quiet" role="status">{words}</p>']

    control.change(guarded(show, workspace), control, [row, text], **QUIET)
    stop.click(lambda: "", None, control, **QUIET)
    subject = [tab.form.controls[place].input for place in ("data.trigger", "data.class_word", "data.kind")]
    gr.on(subject, guarded(drop_start_from, workspace), control, control, **QUIET)


def _connect_marks(workspace: Path, tab: TrainTab) -> None:
    """A control that was marked wrong is so until its value is another one."""
    form = tab.form

    def unmark(values: Mapping[Any, Any]) -> Updates:
        marked = values[tab.marked]
        if not marked or values[form.controls[marked[0]]] == marked[1]:
            return {tab.marked: gr.skip()}
        return {**form.unmarked(marked[0]), tab.marked: None, tab.trouble: ""}

    outputs = [*form.controls.values(), tab.marked, tab.trouble]
    changes = [control.input for control in form.controls.values()]
    gr.on(changes, guarded(unmark, workspace), {tab.marked, *form.controls.values()}, outputs, **QUIET)


def _connect_ahead(workspace: Path, tab: TrainTab) -> None:
    """What a run will cost and what its pictures lack is told anew with every change, and while it is found out."""
    form, timer = tab.form, ahead.timer()
    inputs = {*form.controls.values(), tab.pictures.draft}
    outputs = [form.controls["method"], tab.told, timer]

    def look(values: Mapping[Any, Any]) -> Updates:
        try:
            settings = form.settings(form.read(values))
        except UserError:  # told at its control when Start is pressed
            return {tab.told: ""}
        known = ahead.look_ahead(workspace, drafts.read(values[tab.pictures.draft], workspace), settings)
        return {
            form.controls["method"]: gr.update(choices=known.cards),
            tab.told: known.told,
            timer: gr.Timer(active=not known.is_complete),
        }

    changes = [control.input for control in form.controls.values()]
    changes += [
        tab.pictures.draft.change,
        tab.captions.rows.change,
        tab.pictures.strip.change,
        timer.tick,
        tab.kept.change,
    ]
    gr.on(changes, guarded(look, workspace), inputs, outputs, trigger_mode="always_last", **QUIET)


def restored(workspace: Path, tab: TrainTab, kept: Any) -> Updates:
    """The form as this browser left it. Any: what a browser stored, of whatever version."""
    if not isinstance(kept, dict) or not isinstance(kept.get("values"), dict):
        return {}
    values = {place: value for place, value in kept["values"].items() if place in tab.form.controls}
    if values.get("method") not in METHODS:
        return {}
    names = {name for _, name in presets.choices(workspace)}
    if values.get("preset") not in names:
        values["preset"] = presets.FIRST
    if values.get("card") not in {str(card) for card in cards()}:
        values["card"] = ""
    kind = values.get("data.kind") if values.get("data.kind") in ("subject", "style") else "subject"
    after = starting.defaults(workspace, values["preset"], str(kind), values["method"], card=values["card"])
    draft = show_draft(workspace, kept.get("draft"))
    told, timer = describing_now(workspace, draft[0])
    return {
        tab.captions.told: told,
        tab.captions.timer: timer,
        **fill(workspace, tab, values),
        tab.shown: {**starting.defaults(workspace, presets.FIRST, "subject", "lora"), **after},
        **dict(zip(_draft_controls(tab), draft, strict=True)),
    }


def train_again(workspace: Path, tab: TrainTab, run: Path) -> Updates:
    """The form with a run's settings and pictures."""
    draft, shown = starting.again(workspace, run)
    return {
        **fill(workspace, tab, shown),
        **dict(zip(_draft_controls(tab), show_draft(workspace, draft), strict=True)),
        tab.kept: {"values": shown, "draft": draft},
    }


def train_on(workspace: Path, tab: TrainTab, stem: str, draft: str | None) -> Updates:
    """The form with what trains on from an adapter of the gallery; the pictures stay."""
    shown = starting.on_from(workspace, stem)
    return {**fill(workspace, tab, shown), tab.kept: {"values": shown, "draft": draft}}


def _draft_controls(tab: TrainTab) -> list[Any]:
    return [tab.pictures.draft, tab.pictures.strip, tab.pictures.clear, tab.captions.panel, tab.captions.rows]


def start(workspace: Path, tab: TrainTab, values: Mapping[Any, Any]) -> tuple[Path | None, Updates]:
    """Start a run from what the form shows; a mistake is told at the button and at its control."""
    form = tab.form
    updates: Updates = {tab.trouble: "", tab.marked: None}
    if values[tab.marked]:
        updates |= form.unmarked(values[tab.marked][0])
    method = values[form.controls["method"]]
    try:
        settings = form.settings(form.read(values))
        run = starting.start_run(workspace, chosen_of(workspace, values[tab.pictures.draft]), settings)
    except UserError as error:
        place = starting.at_control(error.place, method)
        message = form.name_setting(str(error), error.place, place)
        updates[tab.trouble] = f'<p class="callout bad" role="alert"><strong>{escape(message)}</strong></p>'
        if place in form.controls:
            mark = form.marked(place, message)
            updates |= {**mark, tab.marked: [place, values[form.controls[place]]]}
            if place in form.fields or place == "model.path":
                group = place.partition(".")[0]
                updates |= {tab.advanced.panel: gr.update(open=True), tab.advanced.tabs: gr.Tabs(selected=group)}
        return None, updates
    return run, updates
