"""Blend: adapters of any methods summed, converted, exported, checked. The workshop works; this tab looks at it."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.export import TARGETS
from reparam_diffusion.gallery.blend import BLENDS
from reparam_diffusion.gallery.blend.forms import Form as ResultForm
from reparam_diffusion.jobs import workshop
from ui import blend_acts as acts
from ui.door import QUIET, guarded
from ui.form import Form
from ui.fragments import link_to, serve
from ui.generate_form import adapter_choices
from ui.models import by_name, draw_models

Updates = dict[Any, Any]
"""What a handler changes, by control. Any: gradio's components and updates."""
OFTEN, SELDOM = 1.0, 6.0  # seconds
FIRST_ROWS = 2
"""Places for adapters at first; another one comes with each that is filled."""
NOTHING = '<p class="quiet empty">Choose adapters and what to do with them. What it loses, and where, is told here.</p>'
KINDS = [
    ("Exact", "exact"), ("LoRA", "lora"), ("LoKr", "lokr"), ("LoHa", "loha"), ("AdaLoRA", "adalora"), ("OFT", "oft"),
    ("Whole differences", "diff"),
]  # fmt: skip


@dataclass(frozen=True)
class BlendTab:
    """The tab's controls: fields by name, the groups that a work shows, adapters, and what became of it."""

    fields: dict[str, gr.components.Component]
    groups: dict[str, gr.Column]
    rows: list[list[gr.components.Component]]
    row_groups: list[gr.Row]
    options: dict[str, gr.Row]
    press: gr.Button
    cancel: gr.Button
    result: gr.HTML
    folder: gr.Textbox
    shown: gr.State
    timer: gr.Timer


def build_blend_tab(workspace: Path) -> BlendTab:
    """Draw the tab and connect it."""
    fields: dict[str, gr.components.Component] = {}
    groups: dict[str, gr.Column] = {}
    with gr.Row(equal_height=False, elem_classes="workshop"):
        with gr.Column(scale=3, min_width=320, elem_classes="card"):
            gr.HTML("<h2>What to do</h2>", padding=False)
            works = [(title, name) for name, title in acts.WORKS.items()]
            fields["work"] = gr.Dropdown(works, value="blend", label="Work", elem_id="work")
            rows, row_groups = _draw_rows(workspace, groups)
            options = _draw_method(fields, groups)
            _draw_result(workspace, fields, groups)
            with gr.Row():
                press = gr.Button(
                    acts.BUTTONS["blend"], variant="primary", size="lg", elem_id="work-start", min_width=140
                )
                cancel = gr.Button("Cancel", visible=False, size="lg", elem_id="work-cancel", min_width=80)
        with gr.Column(scale=3, min_width=320, elem_classes="card"):
            gr.HTML("<h2>Result</h2>", padding=False)
            result = gr.HTML(NOTHING, padding=False, elem_id="work-result")
    folder = gr.Textbox(visible="hidden", elem_id="work-folder")
    tab = BlendTab(
        fields, groups, rows, row_groups, options, press, cancel, result, folder, gr.State(""), gr.Timer(SELDOM)
    )
    _connect(workspace, tab)
    return tab


def _draw_rows(
    workspace: Path, groups: dict[str, gr.Column]
) -> tuple[list[list[gr.components.Component]], list[gr.Row]]:
    """The adapters: name, strengths, blocks."""
    rows: list[list[gr.components.Component]] = []
    lines: list[gr.Row] = []
    with gr.Column() as groups["rows"]:
        for number in range(1, acts.ROWS["blend"] + 1):
            with gr.Row(elem_classes="source", visible=number <= FIRST_ROWS) as line:
                name = gr.Dropdown(
                    adapter_choices(workspace),
                    value="",
                    label=f"Adapter {number}",
                    allow_custom_value=True,  # what was added to the gallery since may be chosen too
                    scale=4,
                    min_width=180,
                )
                strength = gr.Number(1.0, label="Strength", step=0.1, scale=1, min_width=80)
                text = gr.Textbox("", label="Text", placeholder="same", max_lines=1, scale=1, min_width=80)
                blocks = gr.Textbox("", label="Blocks", placeholder="mid=0.5", max_lines=1, scale=2, min_width=90)
            rows.append([name, strength, text, blocks])
            lines.append(line)
    return rows, lines


def _draw_method(fields: dict[str, gr.components.Component], groups: dict[str, gr.Column]) -> dict[str, gr.Row]:
    """How to blend; each method's own options, made from its model."""
    options: dict[str, gr.Row] = {}
    form = Form()
    with gr.Column() as groups["method"]:
        methods = [(method.title, name) for name, method in BLENDS.items()]
        fields["method"] = gr.Dropdown(methods, value="sum", label="Method", info=_about("sum"), elem_id="blend-method")
        for name, method in BLENDS.items():
            with gr.Row(visible=name == "sum", elem_classes="options") as options[name]:
                form.add(method.options(), name)
    fields.update(form.controls)
    return options


def _about(method: str) -> str:
    chosen = BLENDS[method]
    return f"{chosen.summary} {chosen.paper}".strip()


def _for_whom(target: str) -> str:
    told = TARGETS[target].partition(":")[2].strip()
    return f"{told[0].upper()}{told[1:]}"


def _draw_result(workspace: Path, fields: dict[str, gr.components.Component], groups: dict[str, gr.Column]) -> None:
    """What the result is to be: its form, its name, its numbers; and what single works need."""
    form = Form()
    with gr.Column() as groups["form"]:
        fields["kind"] = gr.Dropdown(
            KINDS, value="exact", label="Result", info=ResultForm.model_fields["kind"].description
        )
        with gr.Accordion("Size of the result", open=False), gr.Row(elem_classes="options"):
            form.add(ResultForm(), "form", ["rank", "energy", "megabytes", "factor", "block_size"])
    fields.update({place.removeprefix("form."): control for place, control in form.controls.items()})
    with gr.Column(visible=False) as groups["target"]:
        targets = [(about.partition(":")[0], name) for name, about in TARGETS.items()]
        fields["target"] = gr.Dropdown(targets, value="a1111", label="For", info=_for_whom("a1111"))
    with gr.Column(visible=False) as groups["repair"]:
        fields["repair"] = gr.Checkbox(False, label="Also write a mended copy, without what is broken")
    with gr.Column(visible=False) as groups["angle"]:
        about = "Other programs scale an OFT's change; this turns its rotation less or further and keeps every size."
        fields["angle"] = gr.Checkbox(False, label="OFT: let the strength be the angle", info=about)
    with gr.Column(visible=False) as groups["strip"]:
        fields["strip"] = gr.Checkbox(False, label="Leave out paths, captions and everything private")
    with gr.Column(visible=False) as groups["tuned"]:
        fields["tuned"] = gr.Textbox(label="Fine-tuned model", info="A folder or a .safetensors file.", max_lines=1)
    with gr.Column(visible=False) as groups["checkpoint"]:
        fields["checkpoint"] = gr.Checkbox(True, label="One .safetensors file in the original names, not a folder")
    with gr.Column() as groups["name"]:
        fields["name"] = gr.Textbox(label="Name of the result", placeholder="from its adapters", max_lines=1)
    with gr.Accordion("More", open=False):
        with gr.Column() as groups["model"]:
            fields["model"] = draw_models(workspace, by_name, "starter")
        with gr.Column() as groups["precision"]:
            fields["precision"] = gr.Dropdown(["fp16", "bf16", "fp32"], value="fp16", label="Number format of the file")
        with gr.Column() as groups["picture"]:
            about = "Drawn with the exact change and with the file, from the same seeds."
            fields["picture"] = gr.Textbox(label="Prompt for a comparison", info=about, max_lines=1)


# --- connecting ------------------------------------------------------------------------------------------------------
def _connect(workspace: Path, tab: BlendTab) -> None:
    work, method = tab.fields["work"], tab.fields["method"]

    def choose_work(name: str) -> Updates:
        shown = acts.SHOWN[name]
        updates: Updates = {group: gr.update(visible=key in shown) for key, group in tab.groups.items()}
        updates |= {
            row: gr.update(visible=n < min(acts.ROWS[name], FIRST_ROWS)) for n, row in enumerate(tab.row_groups)
        }
        is_weighed = name in acts.WEIGHED
        updates |= {control: gr.update(visible=is_weighed) for row in tab.rows for control in row[1:]}
        return {**updates, tab.press: gr.update(value=acts.BUTTONS[name])}

    def choose_method(name: str) -> Updates:
        updates: Updates = {row: gr.update(visible=key == name) for key, row in tab.options.items()}
        return {**updates, method: gr.update(info=_about(name))}

    def make_room(values: Mapping[Any, Any]) -> Updates:
        filled = [n for n, row in enumerate(tab.rows) if values[row[0]]]
        most = min(acts.ROWS[values[work]], max(FIRST_ROWS, max(filled, default=0) + 2))
        return {line: gr.update(visible=n < most) for n, line in enumerate(tab.row_groups)}

    target = tab.fields["target"]
    target.input(guarded(lambda name: gr.update(info=_for_whom(name)), workspace), target, target, **QUIET)
    controls = [control for row in tab.rows for control in row]
    outputs = [*tab.groups.values(), *tab.row_groups, *controls, tab.press]
    work.input(guarded(choose_work, workspace), work, outputs, **QUIET)
    method.input(guarded(choose_method, workspace), method, [*tab.options.values(), method], **QUIET)
    gr.on([row[0].input for row in tab.rows], guarded(make_room, workspace), {work, *controls}, tab.row_groups, **QUIET)

    changing = [tab.result, tab.cancel, tab.folder, tab.shown, tab.timer]
    inputs = {*tab.fields.values(), *controls}

    def start(values: Mapping[Any, Any]) -> Updates:
        shown = {name: values[control] for name, control in tab.fields.items()}
        rows = [acts.row_of(values[a], values[b], values[c], values[d]) for a, b, c, d in tab.rows]
        now = datetime.datetime.now()
        folder = workshop.submit(workspace, acts.arguments_of(workspace, shown, rows, now=now), now=now)
        return {**look(workspace, tab, folder.name, ""), tab.folder: folder.name}

    def see(name: str | None, shown: str) -> Updates:
        return look(workspace, tab, name, shown)

    def stop(name: str | None, shown: str) -> Updates:
        workshop.cancel(called(workspace, name))
        return look(workspace, tab, name, shown)

    def choices() -> list[Any]:
        return [gr.update(choices=adapter_choices(workspace)) for _ in tab.rows]

    tab.press.click(guarded(start, workspace), inputs, changing, **QUIET)
    tab.cancel.click(guarded(stop, workspace), [tab.folder, tab.shown], changing, **QUIET)
    tab.timer.tick(guarded(see, workspace), [tab.folder, tab.shown], changing, **QUIET)
    names = [row[0] for row in tab.rows]
    for name in names:
        name.focus(guarded(choices, workspace), None, names, **QUIET)


# --- what became of it -----------------------------------------------------------------------------------------------
def called(workspace: Path, name: str | None) -> Path:
    """A work's folder by its name. Raises UserError when there is none."""
    home = (workspace / "workshop").resolve()
    folder = (home / (name or "")).resolve()
    if folder.parent != home or not (folder / "request.json").is_file():
        raise UserError("This work is gone.", do="Start it again.")
    return folder


def look(workspace: Path, tab: BlendTab, name: str | None, shown: str) -> Updates:
    """How the work goes, when it differs from what the browser shows."""
    if not name:
        return {tab.shown: gr.skip()}
    folder = called(workspace, name)
    work = workshop.state_of(folder)
    html = result_of(workspace, folder, work)
    if html == shown:
        return {tab.shown: gr.skip()}
    return {
        tab.result: html,
        tab.shown: html,
        tab.cancel: gr.update(visible=work.is_live),
        tab.timer: gr.Timer(OFTEN if work.is_live else SELDOM),
    }


def result_of(workspace: Path, folder: Path, work: workshop.Work) -> str:
    """A work as HTML: how far, what it said, its picture and its file."""
    if work.is_live:
        share = 100 * work.done / work.total if work.total else 0
        told = f"{work.done} of {work.total} layers" if work.total else "Starting"
        return (
            f'<div class="drawing"><p class="line"><span class="chip running">Working</span> {told}</p>'
            f'<div class="bar" role="progressbar" aria-label="Progress of the work" aria-valuemin="0" '
            f'aria-valuemax="100" aria-valuenow="{share:.0f}"><span style="width:{share:.1f}%"></span></div></div>'
        )
    if work.state != "finished":
        kind = "mild" if work.state == "cancelled" else "bad"
        return f'<p class="callout {kind}" role="alert">{escape(work.said)}</p>'
    return f'<pre class="said" tabindex="0">{escape(_short(work.said, workspace))}</pre>{_made(workspace, work.said)}'


def _short(said: str, workspace: Path) -> str:
    """Paths as they lie in the workspace."""
    return said.replace(f"{workspace}/", "").strip()


def _made(workspace: Path, said: str) -> str:
    """The files that the command named, to look at or to take along, if they lie where the page may serve them."""
    shown = ""
    for line in said.splitlines():
        path = Path(line.rpartition(": ")[2].strip())
        if not path.is_absolute() or not path.exists():
            continue
        if path.suffix == ".png" and _lies_in(path, workspace / "images"):
            serve(workspace / "images")
            shown += f'<img class="made" src="{link_to(path)}" alt="What the work drew">'
        elif _lies_in(path, acts.exports_of(workspace)) or _lies_in(path, workspace / "adapters"):
            shown += _link(path)
    return shown


def _lies_in(path: Path, home: Path) -> bool:
    return path.resolve().is_relative_to(home.resolve())


def _link(path: Path) -> str:
    if path.is_dir():  # a PEFT folder goes along as one file
        path = Path(shutil.make_archive(str(path), "zip", path))
    serve(path.parent)
    name = escape(path.name)
    return f'<p class="result"><a class="take" href="{link_to(path)}" download="{name}">Download {name}</a></p>'
