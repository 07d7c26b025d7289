"""The gallery: every adapter as a card; beside the cards the chosen one, to try, take along, note down or delete."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.gallery import shelf, waste
from reparam_diffusion.gallery.importing import import_files
from ui import gallery_cards as draw
from ui.door import QUIET, guarded
from ui.gallery_api import add_gallery_api
from ui.gallery_look import AT_ONCE, CHOOSE, SOON, GalleryTab, Updates, Values, look

ORDERS = [("Newest first", "newest"), ("Oldest first", "oldest"), ("By name", "name"), ("Largest first", "largest")]
VIEWS = [("Adapters", "shelf"), ("Bin", "bin")]
IMPORTS = """<p class="quiet">Adapters from elsewhere: .safetensors files, with the .json and the pictures that belong
to them, or PEFT folders as .zip. They stay as they are.</p>"""
PRESS = """const cards = () => [...element.querySelectorAll("[data-key]")];
let focused = null;
element.addEventListener("focusin", (event) => { focused = event.target.closest("[data-key]")?.dataset.key; });
element.addEventListener("focusout", (event) => { if (event.relatedTarget) focused = null; });
watch("value", () => {
  const lost = document.activeElement === document.body || element.contains(document.activeElement);
  if (focused && lost) cards().find((one) => one.dataset.key === focused)?.focus({ preventScroll: true });
});
element.addEventListener("click", (event) => {
  const card = event.target.closest("[data-key]");
  if (!card) return;
  for (const one of cards()) one.setAttribute("aria-pressed", one === card);
  trigger("click", { key: card.dataset.key });
});"""
"""A press chooses a card; new cards coming in leave the focus on the card that had it."""
SHOW_ON_PHONES = """() => {
  if (window.innerWidth < 700) document.getElementById("chosen").scrollIntoView({ block: "start" });
}"""


def build_gallery_tab(workspace: Path) -> GalleryTab:
    """Draw the tab and connect it."""
    asking = _draw_asking()
    with gr.Row(elem_classes="gallery", equal_height=False):
        with gr.Column(scale=3, min_width=320):
            cards = _draw_cards()
        with gr.Column(scale=2, min_width=300, elem_classes="card", elem_id="chosen"):
            chosen = _draw_chosen()
    tab = GalleryTab(
        **asking,
        **cards,
        **chosen,
        selected=gr.State(""),
        limit=gr.State(AT_ONCE),
        shown=gr.State({}),
        noted=gr.State({}),
        timer=gr.Timer(SOON),
    )
    _connect_list(workspace, tab)
    _connect_chosen(workspace, tab)
    add_gallery_api(workspace)
    return tab


def _draw_asking() -> dict[str, Any]:
    """What is looked for, and the place to drop files. Any: gradio's controls of many kinds."""
    drawn: dict[str, Any] = {}
    with gr.Column(elem_classes="card finder"):
        with gr.Row(elem_classes="asking"):
            drawn["search"] = gr.Textbox(label="Search", placeholder="name, tag …", max_lines=1, min_width=120)
            drawn["base"] = gr.Dropdown([("Any", "")], value="", label="Base model", min_width=120)
            drawn["method"] = gr.Dropdown([("Any", "")], value="", label="Method", min_width=120)
            drawn["order"] = gr.Dropdown(ORDERS, value="newest", label="Order", min_width=120)
        drawn["files"] = gr.File(
            file_count="multiple", label="Import adapters", show_label=False, height=60, elem_id="shelf-drop"
        )
        gr.HTML(IMPORTS, padding=False)
        drawn["imported"] = gr.HTML("", elem_id="imported", padding=False)
    return drawn


def _draw_cards() -> dict[str, Any]:
    """The shelf or the bin. Any: gradio's controls of many kinds."""
    drawn: dict[str, Any] = {}
    with gr.Row(elem_classes="shelf-head"):
        drawn["view"] = gr.Radio(VIEWS, value="shelf", show_label=False, label="Show", elem_id="shelf-view")
        drawn["count"] = gr.HTML("", elem_id="shelf-count", padding=False)
        drawn["empty"] = gr.Button("Empty the bin", visible=False, size="sm", min_width=120)
        drawn["empty_sure"] = gr.Button("Yes, delete all", variant="stop", visible=False, size="sm", min_width=120)
    drawn["cards"] = gr.HTML("", elem_id="shelf", padding=False, js_on_load=PRESS)
    drawn["more"] = gr.Button("Show more", visible=False)
    return drawn


def _draw_chosen() -> dict[str, Any]:
    """The chosen adapter. Any: gradio's controls of many kinds."""
    drawn: dict[str, Any] = {"head": gr.HTML(CHOOSE, elem_id="chosen-head", padding=False)}
    with gr.Row(elem_classes="acts"):
        drawn["try_it"] = gr.Button("Try it", variant="primary", visible=False, min_width=100, elem_id="try-it")
        drawn["go_on"] = gr.Button("Train on from this", visible=False, min_width=100)
        drawn["to_bin"] = gr.Button("Move to bin", visible=False, min_width=100)
        drawn["restore"] = gr.Button("Restore", variant="primary", visible=False, min_width=100)
        drawn["erase"] = gr.Button("Delete for good", visible=False, min_width=100)
        drawn["erase_sure"] = gr.Button("Yes, delete it", variant="stop", visible=False, min_width=100)
    with gr.Accordion("Name, notes and tags", open=False, visible=False, elem_id="noting") as drawn["editor"]:
        drawn["fields"] = _draw_fields()
        drawn["save"] = gr.Button("Save", variant="primary", size="sm")
    drawn["rest"] = gr.HTML("", elem_id="chosen-rest", padding=False)
    return drawn


def _draw_fields() -> dict[str, gr.components.Component]:
    """What a person may note, by sidecar key."""
    return {
        "name": gr.Textbox(label="Name", info="Shown here; the file keeps its own, for prompts.", max_lines=1),
        "activation text": gr.Textbox(label="Trigger words", max_lines=2),
        "preferred weight": gr.Number(label="Preferred strength", step=0.05),
        "negative text": gr.Textbox(label="Words to avoid", max_lines=2),
        "tags": gr.Textbox(label="Tags", placeholder="toy, brown", max_lines=1),
        "description": gr.Textbox(label="About", lines=2),
        "notes": gr.Textbox(label="Notes", lines=3),
    }


# --- what happens when something is pressed --------------------------------------------------------------------------
def _connect_list(workspace: Path, tab: GalleryTab) -> None:
    def see(values: Values) -> Updates:
        return look(workspace, tab, values)

    def see_from_the_top(values: Values) -> Updates:
        return look(workspace, tab, values, news={tab.limit: AT_ONCE})

    def see_other(values: Values) -> Updates:
        return look(workspace, tab, values, news={tab.limit: AT_ONCE, tab.selected: "", tab.imported: ""})

    def see_more(values: Values) -> Updates:
        return look(workspace, tab, values, news={tab.limit: values[tab.limit] + AT_ONCE})

    def choose(values: Values, event: gr.EventData) -> Updates:
        return look(workspace, tab, values, news={tab.selected: str(event.key)})

    def take_files(values: Values) -> Updates:
        told = import_files([Path(name) for name in values[tab.files] or []], workspace)
        taken = [one.file for one in told if one.file is not None]
        news: Updates = {tab.files: None, tab.imported: draw.imports_of(told), tab.limit: AT_ONCE}
        if taken:
            news |= {tab.selected: shelf.stem_of(taken[0]), tab.view: "shelf"}
        return look(workspace, tab, {**values, tab.view: "shelf"} if taken else values, news=news)

    def empty(values: Values) -> Updates:
        waste.empty(workspace)
        return look(workspace, tab, values, news={tab.selected: ""})

    asked, changing = tab.asked(), tab.changing()
    tab.timer.tick(guarded(see, workspace), asked, changing, **QUIET)
    tab.search.input(guarded(see_from_the_top, workspace), asked, changing, trigger_mode="always_last", **QUIET)
    for choice in (tab.order, tab.base, tab.method):
        choice.input(guarded(see_from_the_top, workspace), asked, changing, **QUIET)
    tab.view.input(guarded(see_other, workspace), asked, changing, **QUIET)
    tab.more.click(guarded(see_more, workspace), asked, changing, **QUIET)
    tab.cards.click(guarded(choose, workspace), asked, changing, **QUIET).then(None, js=SHOW_ON_PHONES)
    tab.files.upload(
        guarded(take_files, workspace), {*asked, tab.files}, changing, api_visibility="private", show_progress="minimal"
    )
    tab.empty_sure.click(guarded(empty, workspace), asked, changing, **QUIET)
    _ask_first(tab.empty, tab.empty_sure)


def _connect_chosen(workspace: Path, tab: GalleryTab) -> None:
    def to_bin(values: Values) -> Updates:
        waste.put(values[tab.selected], workspace, now=datetime.datetime.now())
        return look(workspace, tab, values, news={tab.selected: ""})

    def restore(values: Values) -> Updates:
        waste.restore(values[tab.selected], workspace)
        return look(workspace, tab, values, news={tab.selected: ""})

    def erase(values: Values) -> Updates:
        waste.empty(workspace, [values[tab.selected]])
        return look(workspace, tab, values, news={tab.selected: ""})

    def save(values: Values) -> Updates:
        before = values[tab.noted]
        changes = {key: values[field] for key, field in tab.fields.items() if values[field] != before.get(key)}
        if changes:
            shelf.edit(values[tab.selected], workspace, changes)
            gr.Info("Saved.", duration=3)
        return look(workspace, tab, values, news={tab.noted: before | changes})

    asked, changing = tab.asked(), tab.changing()
    for button, act in ((tab.to_bin, to_bin), (tab.restore, restore), (tab.erase_sure, erase), (tab.save, save)):
        button.click(guarded(act, workspace), asked, changing, **QUIET)
    _ask_first(tab.erase, tab.erase_sure)


def _ask_first(button: gr.Button, sure: gr.Button) -> None:
    """What cannot be undone takes a second press, of another button."""
    button.click(lambda: (gr.update(visible=False), gr.update(visible=True)), None, [button, sure], **QUIET)
