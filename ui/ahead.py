"""What to know before Start: size and time on each method's card, what the run will cost, what the pictures lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import TrainConfig, settle
from reparam_diffusion.data.check import look_over, note_unused_masks
from reparam_diffusion.data.folder_layout import expand_folders
from reparam_diffusion.data.sets import count_further, sources_of
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import estimates, presets, queue, runs
from reparam_diffusion.jobs.datasets import PictureSet, with_words
from reparam_diffusion.models.outline import check_vae, outline
from reparam_diffusion.training.estimate import COUNTED, Cost
from reparam_diffusion.training.prepare import captions_of
from ui import starting
from ui.fragments import plain_size, plain_time

SUPPOSED = 8
"""How many pictures are reckoned with before any are chosen."""
LOOK_AGAIN = 4.0  # seconds, while something is being found out


@dataclass(frozen=True)
class Ahead:
    """What is known before Start: a choice for each method, and what the chosen run needs in HTML."""

    cards: list[tuple[str, str]]
    told: str
    is_complete: bool


def look_ahead(workspace: Path, chosen: PictureSet | None, settings: Mapping[str, Any]) -> Ahead:
    """What can be told now; what is not known is being found out when this returns. Any: settings of all types."""
    try:
        mine = starting.resolve_start(settle(starting.layer_of(settings)), workspace)
        mine = runs.with_start(mine, workspace)
        outline(mine.model.path)
        data, layout = expand_folders(mine.data)
        mine = mine.model_copy(update={"data": data})
        check_vae(mine.model.vae)
        count_further(mine.data)
    except UserError as error:  # it is shown at its control, too, when Start is pressed
        told = f'<p class="cost" role="status">No estimate: {escape(str(error))}</p>' if chosen else ""
        return Ahead(cards({}), told, is_complete=True)
    others = {
        name: starting.settled(workspace, settings["preset"], mine.data.kind, name, card=settings["card"])
        for name in METHODS
        if name != mine.adapter.method
    }
    configs = {mine.adapter.method: mine, **{name: _like(other, mine) for name, other in others.items()}}
    pictures = len(chosen.pictures) if chosen else SUPPOSED
    sides = [(one.width, one.height) for one in chosen.pictures] if chosen else None
    costs = {
        name: estimates.cost(one, pictures=pictures, workspace=workspace, sides=sides) for name, one in configs.items()
    }
    if chosen is None:
        return Ahead(cards(costs), "", is_complete=True)
    is_measuring = estimates.find_out([mine])
    is_wanted = estimates.find_out(list(configs.values()))
    about = [*layout, *presets.notes_on(settings["preset"], mine, card=settings["card"])]
    told = told_of(workspace, chosen, mine, costs[mine.adapter.method], about, is_measuring=is_measuring)
    return Ahead(cards(costs), told, is_complete=not is_wanted)


def _like(config: TrainConfig, mine: TrainConfig) -> TrainConfig:
    """Another method's default run on the same base model and device."""
    return config.model_copy(
        update={"model": mine.model, "data": config.data.model_copy(update={"sets": mine.data.sets})}
    )


def cards(costs: Mapping[str, Cost]) -> list[tuple[str, str]]:
    """A plain-word card for each method: what it is good for, how large, how long."""
    rows = []
    for name, method in METHODS.items():
        words = f"{method.title}\n{method.summary}"
        if name in costs:
            cost = costs[name]
            time = f", about {plain_time(cost.seconds)}" if cost.seconds is not None else ""
            words += f"\n{plain_size(cost.file_bytes)}{time}"
        rows.append((words, name))
    return rows


def told_of(
    workspace: Path,
    chosen: PictureSet,
    config: TrainConfig,
    cost: Cost,
    about: Sequence[str] = (),
    *,
    is_measuring: bool,
) -> str:
    """The cost, what does not go together (`about`), and what the pictures and captions lack, in plain words."""
    notes = "".join(f"<li>{escape(note)}</li>" for note in [*about, *notes_of(chosen, config)])
    waiting = len(queue.waiting(workspace))
    line = f" {waiting} other{'s' if waiting > 1 else ''} will go first." if waiting else ""
    listed = f'<p class="callout bad" role="alert">{escape(cost.advice)}</p>' if cost.advice else ""
    listed += f'<ul class="callout mild">{notes}</ul>' if notes else ""
    return f'<p class="cost" role="status">{escape(cost_line(cost, is_measuring=is_measuring))}{line}</p>{listed}'


def cost_line(cost: Cost, *, is_measuring: bool) -> str:
    """ "About 2 min, of which 20 s class pictures. A file of 2.4 MB, about 0.9 GB of memory (estimated)." """
    seconds = cost.seconds
    unknown = "The time is being measured" if is_measuring else "How long it takes is not known here yet"
    words = f"About {plain_time(seconds)}" if seconds is not None else unknown
    classes = next((part.seconds for part in cost.parts if part.name == "class pictures"), None)
    if cost.class_pictures:
        took = f" in {plain_time(classes)}" if classes is not None else ""
        words += f"; keeping the class as it was means drawing {cost.class_pictures} class pictures{took}"
    words += f". A file of {plain_size(cost.file_bytes)}"
    if cost.peak_bytes is not None:
        where = "GPU memory" if cost.device == "cuda" else "memory"
        words += f", {plain_size(cost.peak_bytes)} of {where} ({COUNTED})"
    return f"{words}."


def notes_of(chosen: PictureSet, config: TrainConfig) -> list[str]:
    """What a person should read about the pictures before Start. Refused files stand beside the pictures already."""
    model = outline(config.model.path)
    chosen = with_words(chosen, trigger=config.data.trigger, class_word=config.data.class_word)  # as Start does
    captions = captions_of(model, sources_of(config.data)[0], chosen.pictures)
    notes = look_over(
        chosen.pictures,
        [],
        captions,
        trigger=config.data.trigger,
        resolution=config.data.resolution or model.size,
        expected=f"{config.data.class_word} {model.habits.caption} {model.habits.class_prompt}",
    )
    if note := note_unused_masks(chosen.pictures, config.data.masks):
        notes.append(note)
    if not config.data.trigger:
        notes.insert(0, "There is no trigger word yet: write one in step 2.")
    return notes


def timer() -> gr.Timer:
    """Looks soon after the page has opened, and again while something is being found out."""
    return gr.Timer(LOOK_AGAIN)
