"""What a drawing looks like on the page: how far it is, its pictures, and the history. All HTML, all escaped."""

from __future__ import annotations

from functools import lru_cache
from html import escape
from pathlib import Path

from reparam_diffusion.gallery import images
from reparam_diffusion.jobs import studio
from reparam_diffusion.jobs.locks import UNKNOWN_HOLDER
from reparam_diffusion.jobs.studio import Request, RequestState
from reparam_diffusion.jobs.studio_grid import short_name
from ui import fragments

NOTHING_DRAWN = '<p class="quiet empty">Write a prompt and press “Draw”. The pictures appear here.</p>'
NO_HISTORY = '<p class="quiet">No pictures yet.</p>'
PICK = """element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-pick]");
  if (button) trigger("click", {pick: button.dataset.pick});
  if (button?.classList.contains("change")) document.querySelector("#start-picture").scrollIntoView({block: "center"});
});"""
"""A press on any button with data-pick is told to the page; one that changes another part shows that part."""
CHANGE = "change:"
"""How data-pick begins on a button that takes a picture to start from."""
MOST_HISTORY = 24

STATES = {
    "queued": "In line",
    "waiting": "Waiting",
    "drawing": "Drawing",
    "finished": "Done",
    "failed": "Failed",
    "cancelled": "Cancelled",
    "lost": "Lost",
}


# --- how far ---------------------------------------------------------------------------------------------------------
def progress_of(request: Request, state: RequestState, *, is_cancelling: bool, holder: Path | None) -> str:
    """One line, a bar while it goes on, and what deserves notice."""
    word = "Cancelling" if is_cancelling and state.is_live else STATES[state.state]
    share = min(1.0, state.done / state.total) if state.total else 0.0
    bar = (
        '<div class="bar" role="progressbar" aria-label="Progress of the drawing" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{share * 100:.0f}"><span style="width:{share * 100:.1f}%"></span></div>'
    )
    notes = "".join(f'<p class="callout mild">{escape(note)}</p>' for note in state.warnings[:5])
    if state.message:
        notes += f'<p class="callout bad" role="alert">{escape(state.message)}</p>'
    if state.state == "waiting":
        notes += f'<p class="callout mild">{escape(_who_holds(holder, state.waiting_for))}</p>'
    return (
        f'<div class="drawing {state.state}" role="status"><p class="line"><span class="chip">{word}</span> '
        f"<strong>{escape(_words(request, state))}</strong></p>{bar if state.is_live else ''}{notes}</div>"
    )


def _words(request: Request, state: RequestState) -> str:
    count, done = len(request.recipes), len(state.pictures)
    some = f"{count} picture{'' if count == 1 else 's'}"
    match state.state:
        case "queued":
            return "The studio is getting ready" if not state.phase else "In line"
        case "waiting":
            return f"{some} to draw"
        case "drawing" if state.phase != "drawing":
            return state.phase.capitalize()
        case "drawing":
            return f"Picture {min(done + 1, count)} of {count}"
        case "finished":
            return f"{some} in {fragments.plain_time(state.seconds)}"
    return f"{done} of {some} drawn"


def _who_holds(holder: Path | None, waiting_for: str) -> str:
    who = f"The run {holder.name} is training" if holder else "Another program is working"
    if holder is None and waiting_for not in ("", UNKNOWN_HOLDER):
        who = f"{waiting_for[0].upper()}{waiting_for[1:]} is working"
    return f"{who} on this device. Your pictures come when it is done. You can also go ahead; both will be slower then."


# --- the pictures ----------------------------------------------------------------------------------------------------
def figures_of(workspace: Path, request: Request, state: RequestState, chosen: str) -> str:
    """The pictures so far, early looks at those being drawn, and places for the rest."""
    fragments.serve(images.images_of(workspace))
    fragments.serve(studio.studio_of(workspace) / "looks")
    figures = [_figure(request, state, number, chosen) for number in range(len(request.recipes))]
    if request.kind != "grid":
        return f'<div class="figures {request.kind} n{min(len(figures), 4)}">{"".join(figures)}</div>'
    width = len(request.columns)
    cells = "<span></span>" + "".join(f"<b>{escape(name)}</b>" for name in request.columns)
    for n, name in enumerate(request.rows):
        cells += f"<b>{escape(name)}</b>" + "".join(figures[n * width : (n + 1) * width])
    table = f'<div class="sheet" style="--columns:{width}">{cells}</div>'
    if state.sheet is None:
        return table
    return f'{table}<p><a class="take" href="{fragments.link_to(state.sheet)}" target="_blank">Open the sheet</a></p>'


def _figure(request: Request, state: RequestState, number: int, chosen: str) -> str:
    recipe = request.recipes[number]
    label = request.labels[number] if request.labels else ""
    alt = f"Strength {label}: {recipe.prompt}" if label else f"{recipe.prompt}, seed {recipe.seed}"
    picture, early = state.pictures.get(number), state.looks.get(number)
    if picture is not None:
        link = fragments.link_to(picture)
        shown = f'<a href="{link}" target="_blank"><img src="{link}" alt="{escape(alt)}"></a>'
    elif early is not None and state.is_live:
        shown = f'<img class="early" src="{_early_link(early)}" alt="An early look: {escape(alt)}">'
    else:
        shown = f'<div class="blank">{"to come" if state.is_live else "not drawn"}</div>'
    caption = ""
    if label and picture is not None:
        pressed = "true" if label == chosen else "false"
        caption = (
            f'<button type="button" class="pick" data-pick="{escape(label)}" aria-pressed="{pressed}" '
            f'title="Take this strength">{escape(label)}</button>'
        )
    elif label:
        caption = f'<span class="pick">{escape(label)}</span>'
    elif request.kind == "pictures":
        caption = f"seed {recipe.seed}"
        caption += "" if picture is None else _change_button(picture)
    return f"<figure>{shown}" + (f"<figcaption>{caption}</figcaption></figure>" if caption else "</figure>")


def _change_button(picture: Path) -> str:
    """Starts from this picture."""
    name = f"{picture.parent.name}/{picture.name}"
    return f'<button type="button" class="change" data-pick="{CHANGE}{escape(name)}">Change this picture</button>'


def _early_link(file: Path) -> str:
    """The address of an early look, another one for each version of the file."""
    return f"{fragments.link_to(file)}?{file.stat().st_mtime_ns}"


def title_of(request: Request) -> str:
    """What the pictures are, over them."""
    if request.kind == "sweep":
        return f"{short_name(request.about)} from strength {request.labels[0]} to {request.labels[-1]}"
    return request.about if request.kind == "grid" else "Result"


# --- the history -----------------------------------------------------------------------------------------------------
def history_of(workspace: Path, files: list[Path]) -> str:
    """The last pictures as buttons; pressing one takes its settings."""
    if not files:
        return NO_HISTORY
    folder = images.images_of(workspace)
    buttons = ""
    for file in files:
        name = file.relative_to(folder).as_posix()
        alt = "A grid" if file.stem.endswith("-grid") else "A picture"
        buttons += (
            f'<button type="button" data-pick="{escape(name)}" title="Use its settings again">'
            f'<img src="{_small(file)}" alt="{alt} drawn {_when(file)}"></button>'
        )
    return f'<div class="history">{buttons}</div>'


def _when(file: Path) -> str:
    """ "on 2026-11-24 at 23:41" from the file's name and folder."""
    return f"on {file.parent.name} at {file.stem[:2]}:{file.stem[2:4]}"


@lru_cache(maxsize=256)
def _small(file: Path) -> str:
    """A thumbnail, made once: a drawn picture never changes."""
    return fragments.thumbnail(file)


def picked_picture(workspace: Path, name: str) -> Path | None:
    """A picture of the history by what its button says; None for anything that is not there."""
    folder = images.images_of(workspace).resolve()
    file = (folder / name).resolve()
    return file if file.is_relative_to(folder) and file.suffix == ".png" and file.is_file() else None
