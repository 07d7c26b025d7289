"""The folded settings: every one of them, made from the settings models, and presets and files to fill them from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import ModelSettings, TrainConfig, read_settings, settle, to_toml
from reparam_diffusion.jobs import presets
from reparam_diffusion.training.cards import cards
from ui import starting
from ui.door import inform
from ui.form import Form
from ui.models import by_path, draw_models

SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Training": ("training", ()),
    "Pictures": (
        "data",
        (
            "resolution", "buckets", "repeats", "flip", "caption_template", "caption_dropout", "shuffle_tags",
            "keep_tags", "held_out", "masks", "unmasked_weight", "weight",
        ),
    ),
    "Trigger word": ("embedding", ()),
    "Keep the class": ("prior", ()),
    "Layers": ("targets", ()),
    "Previews and file": ("output", ()),
    "Many devices": ("launch", ()),
    "Base model": ("model", tuple(name for name in ModelSettings.model_fields if name != "path")),
}  # fmt: skip
"""Title -> group of settings, and which of them (all when empty)."""

SAVE_AS_FILE = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/toml" }));
  link.download = "settings.toml";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


@dataclass(frozen=True)
class Advanced:
    """The controls around the settings. `groups` are the methods' own columns; `tabs` by the group they hold."""

    panel: gr.Accordion
    tabs: gr.Tabs
    groups: dict[str, gr.Column]
    preset_name: gr.Textbox
    save_preset: gr.Button
    delete_preset: gr.Button
    settings_file: gr.UploadButton
    take_file: gr.Button
    file_text: gr.Textbox


def draw_advanced(form: Form, workspace: Path) -> Advanced:
    """Draw all settings, folded; the form takes their controls in."""
    start = starting.settled(workspace, presets.FIRST, "subject", "lora")
    with gr.Accordion("Advanced settings", open=False, elem_id="advanced") as panel:
        about = "Where the settings below come from. Choose the one made for your base model."
        with gr.Row(elem_classes="settings-head"):
            choices = presets.choices(workspace)
            form.keep("preset", gr.Dropdown(choices, value=presets.FIRST, label="Preset", info=about, min_width=220))
            form.keep("card", _card_control())
            form.keep("model.path", _model_control(workspace, start))
        groups: dict[str, gr.Column] = {}
        with gr.Tabs(elem_id="settings-tabs") as tabs:
            with gr.Tab("Method", id="adapter"):
                for name in METHODS:
                    own = starting.settled(workspace, presets.FIRST, "subject", name)
                    groups[name] = gr.Column(visible=name == "lora", elem_classes="settings")
                    with groups[name], gr.Row(elem_classes="grid"):
                        form.add(own.adapter, f"adapter.{name}")
            for title, (group, names) in SECTIONS.items():
                with gr.Tab(title, id=group), gr.Column(elem_classes="settings"):
                    with gr.Row(elem_classes="grid"):
                        form.add(getattr(start, group), group, names or None)
                    if group == "data":
                        form.add(start.data, "data", ["sets"])
        with gr.Row(elem_classes="settings-foot"):
            name = gr.Textbox(
                show_label=False,
                placeholder="Name of a preset of your own",
                max_lines=1,
                min_width=200,
                elem_id="preset-name",
            )
            save = gr.Button("Save as preset", min_width=120)
            delete = gr.Button("Delete this preset", min_width=140)
            load = gr.UploadButton("Open a settings file", file_types=[".toml"], min_width=150)
            take = gr.Button("Download these settings", min_width=170)
            text = gr.Textbox(visible=False)
    return Advanced(panel, tabs, groups, name, save, delete, load, take, text)


def _card_control() -> gr.Dropdown:
    """Settings by the graphics card's memory, over the preset's."""
    choices = [("As it is", ""), *((f"{card} GB", str(card)) for card in cards())]
    about = "Settings with which Stable Diffusion XL fits its memory; smaller models fit as they are."
    return gr.Dropdown(choices, value="", label="Graphics card", info=about, min_width=140)


def _model_control(workspace: Path, start: TrainConfig) -> gr.Dropdown:
    field = type(start.model).model_fields["path"]
    return draw_models(workspace, by_path, start.model.path, info=field.description or "", min_width=220)


def saved(workspace: Path, settings: Mapping[str, Any], title: str) -> dict[str, Any]:
    """Keep what the form shows as a preset; the update of the list of presets. Any: gradio's updates."""
    name = presets.save(settle(starting.layer_of(settings)), workspace, title=title)
    inform(f"Saved. Choose “{title.strip()} (yours)” to start from it.")
    return gr.update(choices=presets.choices(workspace), value=name)


def deleted(workspace: Path, name: str) -> dict[str, Any]:
    """Move a preset to the bin; the update of the list of presets. Any: gradio's updates."""
    place = presets.remove(name, workspace)
    inform(f"Moved to {place.relative_to(workspace)}.")
    return gr.update(choices=presets.choices(workspace), value=presets.FIRST)


def as_file(settings: Mapping[str, Any]) -> str:
    """The settings that the form shows, complete, as TOML."""
    return to_toml(settle(starting.layer_of(settings)))


def from_file(file: str) -> dict[str, Any]:
    """What the form shows for a settings file. Raises UserError when it is none. Any: settings of all types."""
    return starting.shown_of(settle(read_settings(Path(file))))
