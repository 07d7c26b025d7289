"""What the gallery's tab shows, and what of it a browser has not been told yet. A look at 2,000 adapters that have not
changed is a handful of stat calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import catalog, notes, shelf, waste
from reparam_diffusion.gallery.of_run import RUN
from reparam_diffusion.gallery.report import BASES, method_title, report_of
from reparam_diffusion.jobs.overview import overview_of
from ui import gallery_cards as draw
from ui.plot import loss_plot

AT_ONCE = 60  # cards
READING = 1.0  # seconds that one look may spend on headers nobody has read yet
SOON, SELDOM = 0.4, 3.0  # seconds between two looks: while there is more to read, and otherwise
EMPTY = '<p class="quiet empty">No adapters yet. Train one, or drop a file here.</p>'
NOTHING_FOUND = '<p class="quiet empty">Nothing matches. Try fewer words, or other filters.</p>'
EMPTY_BIN = '<p class="quiet empty">The bin is empty.</p>'
OF = "of"  # whose notes a browser was given
CHOOSE = '<p class="quiet empty">Choose an adapter to see what it is.</p>'

Values = Mapping[Any, Any]
"""What gradio hands to a handler, by control. Any: each control has its own type."""
Updates = dict[Any, Any]
"""What a handler changes, by control. Any: gradio's updates."""
Sign = tuple[object, ...]
"""Changes whenever that which it stands for does."""
Part = tuple[str, Sign, Callable[[], tuple[Updates, bool]]]
"""A part of the tab: its name, its sign, and how to make its updates; with them, whether they are all there is."""


@dataclass(frozen=True)
class GalleryTab:
    """The controls of the tab. `selected` is the chosen adapter's stem, or its key in the bin; `limit` how many cards
    are shown at most; `shown` signs of what the browser has; `noted` whose notes it was given, and which.
    """

    search: gr.Textbox
    base: gr.Dropdown
    method: gr.Dropdown
    order: gr.Dropdown
    view: gr.Radio
    files: gr.File
    imported: gr.HTML
    count: gr.HTML
    cards: gr.HTML
    more: gr.Button
    empty: gr.Button
    empty_sure: gr.Button
    head: gr.HTML
    rest: gr.HTML
    try_it: gr.Button
    go_on: gr.Button
    to_bin: gr.Button
    restore: gr.Button
    erase: gr.Button
    erase_sure: gr.Button
    editor: gr.Accordion
    fields: dict[str, gr.components.Component]
    save: gr.Button
    selected: gr.State
    limit: gr.State
    shown: gr.State
    noted: gr.State
    timer: gr.Timer

    def asked(self) -> set[Any]:
        """What a look must know. Any: gradio's controls."""
        return {
            *(self.search, self.base, self.method, self.order, self.view),
            *(self.selected, self.limit, self.shown, self.noted),
            *self.fields.values(),
        }

    def changing(self) -> list[Any]:
        """What a look may change. Any: gradio's controls."""
        own = [control for name, control in vars(self).items() if name != "fields"]
        return [control for control in own if control is not self.search] + [*self.fields.values()]


def look(workspace: Path, tab: GalleryTab, values: Values, *, news: Updates | None = None) -> Updates:
    """What has changed since the browser was last told, or since `news` came, and nothing else."""
    news = news or {}
    values = {**values, **{control: update for control, update in news.items() if isinstance(control, gr.State)}}
    shown: dict[str, Sign] = dict(values[tab.shown])
    updates: Updates = dict(news)
    for name, sign, make in (_list(workspace, tab, values), _details(workspace, tab, values)):
        if shown.get(name) == sign:
            continue
        fresh, is_whole = make()
        updates |= fresh
        shown[name] = sign if is_whole else ()
    updates[tab.shown] = shown if shown != values[tab.shown] else gr.skip()
    return updates


# --- the cards -------------------------------------------------------------------------------------------------------
def _list(workspace: Path, tab: GalleryTab, values: Values) -> Part:
    """The cards."""
    asked = tuple(values[one] for one in (tab.view, tab.search, tab.base, tab.method, tab.order, tab.limit))
    sign = (shelf.folder_sign(shelf.shelf_of(workspace)), shelf.folder_sign(waste.bin_of(workspace)), *asked)
    make = _bin_updates if values[tab.view] == "bin" else _shelf_updates
    return "list", sign, lambda: make(workspace, tab, values)


def _shelf_updates(workspace: Path, tab: GalleryTab, values: Values) -> tuple[Updates, bool]:
    entries = catalog.list_entries(workspace, seconds=READING)
    unread = sum(entry.header is None for entry in entries)
    found = catalog.keep(entries, base=values[tab.base] or "", method=values[tab.method] or "")
    found = catalog.sort(catalog.search(found, values[tab.search] or ""), values[tab.order])
    first = found[: values[tab.limit]]
    told = draw.plural(len(entries), "adapter") if len(found) == len(entries) else f"{len(found):,} of {len(entries):,}"
    told += f", {len(first)} shown" if len(first) < len(found) else ""
    told += f"; reading {draw.plural(unread, 'file')} more" if unread else ""
    html = draw.cards_of(first, workspace, values[tab.selected]) if found else NOTHING_FOUND if entries else EMPTY
    updates = {
        tab.cards: html,
        tab.count: f'<p class="count" role="status">{told}</p>' if entries else "",
        tab.more: gr.update(visible=len(first) < len(found)),
        tab.empty: gr.update(visible=False),
        tab.empty_sure: gr.update(visible=False),
        tab.base: _choice(catalog.found_bases(entries), BASES.get, values[tab.base]),
        tab.method: _choice(catalog.found_methods(entries), method_title, values[tab.method]),
        tab.timer: gr.Timer(SOON if unread else SELDOM),
    }
    return updates, not unread  # the next look reads on


def _bin_updates(workspace: Path, tab: GalleryTab, values: Values) -> tuple[Updates, bool]:
    binned = waste.list_bin(workspace)
    first = binned[: values[tab.limit]]
    updates = {
        tab.cards: draw.binned_of(first, workspace, values[tab.selected]) if binned else EMPTY_BIN,
        tab.count: f'<p class="count" role="status">{draw.plural(len(binned), "adapter")} in the bin</p>',
        tab.more: gr.update(visible=len(first) < len(binned)),
        tab.empty: gr.update(visible=bool(binned)),
        tab.empty_sure: gr.update(visible=False),
    }
    return updates, True


def _choice(found: Sequence[str], title: Callable[[str], str | None], chosen: str | None) -> Updates:
    """A filter's choices. What was chosen stays, so that nothing reappears unasked when the last of it goes."""
    names = dict.fromkeys([*found, *([chosen] if chosen else [])])
    return gr.update(choices=[("Any", ""), *((title(name) or name, name) for name in names)], value=chosen or "")


# --- the chosen one --------------------------------------------------------------------------------------------------
def _details(workspace: Path, tab: GalleryTab, values: Values) -> Part:
    """The details of what is chosen."""
    key = values[tab.selected]
    try:
        if key and values[tab.view] == "bin":
            binned = waste.binned(key, workspace)
            return "details", ("bin", key), lambda: (_bin_details(tab, binned), True)
        if key:
            file = shelf.at(key, workspace)
            ages = (shelf.folder_sign(shelf.companion(file, ending)) for ending in (".safetensors", ".json", ".png"))
            return "details", ("shelf", key, *ages), lambda: (_shelf_details(workspace, tab, values, file), True)
    except UserError:  # another browser was quicker
        return "details", ("gone", key), lambda: ({**_nothing(tab), tab.selected: ""}, True)
    return "details", ("none",), lambda: (_nothing(tab), True)


def _shelf_details(workspace: Path, tab: GalleryTab, values: Values, file: Path) -> Updates:
    entry = catalog.entry_at(file, workspace)
    try:
        report = report_of(file)
    except UserError:  # the entry says why
        report = None
    before, now = values[tab.noted], notes_of(entry.shelved)
    is_other = before.get(OF) != entry.stem
    # What a person is typing stays when somebody else's change comes in, and so what has been typed since this look
    # was asked for: a field that shows the right text already is left alone.
    fields = {
        f: now[key]
        for key, f in tab.fields.items()
        if values[f] != now[key] and (is_other or values[f] == before.get(key))
    }
    return {
        tab.head: draw.head_of(entry, report),
        tab.rest: _loss_of(workspace, entry.shelved) + (draw.rest_of(report) if report else ""),
        tab.noted: {OF: entry.stem, **now},
        **fields,
        **_buttons(tab, on_shelf=True),
    }


def _bin_details(tab: GalleryTab, binned: waste.Binned) -> Updates:
    return {tab.head: draw.binned_head_of(binned), tab.rest: "", **_buttons(tab, in_bin=True)}


def _nothing(tab: GalleryTab) -> Updates:
    return {tab.head: CHOOSE, tab.rest: "", **_buttons(tab)}


def _buttons(tab: GalleryTab, *, on_shelf: bool = False, in_bin: bool = False) -> Updates:
    """Which buttons belong to what is chosen."""
    shown = dict.fromkeys((tab.try_it, tab.go_on, tab.to_bin, tab.editor), on_shelf)
    shown |= {tab.restore: in_bin, tab.erase: in_bin, tab.erase_sure: False}
    return {control: gr.update(visible=visible) for control, visible in shown.items()}


def notes_of(shelved: shelf.Shelved) -> dict[str, Any]:
    """An adapter's notes as the fields show them. Any: texts, and one number."""
    facts = shelved.facts
    return {key: notes.as_text(facts.get(key)) for key in notes.LONGEST} | {
        "name": shelved.name,
        "preferred weight": notes.strength_of(facts),
        "tags": ", ".join(notes.split_tags(facts.get("tags"))),
    }


def _loss_of(workspace: Path, shelved: shelf.Shelved) -> str:
    """The loss of the run that made it, if that lies in this workspace."""
    run = shelved.facts.get(RUN)
    if not isinstance(run, str):
        return ""
    try:
        state = overview_of(workspace).state_of(overview_of(workspace).find(run))
    except UserError:
        return ""
    return f'<h3>Loss</h3><div class="loss">{loss_plot(state)}</div>'
