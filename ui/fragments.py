"""Small pieces of HTML. Everything that comes from a person or a file is escaped here."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import gradio as gr
from PIL import Image, ImageOps

from reparam_diffusion.events import Sampled
from reparam_diffusion.jobs.datasets import PictureSet
from reparam_diffusion.jobs.fold import RunState

THUMBNAIL = 112  # pixels, twice what is shown
MOST_THUMBNAILS = 12
_served: set[Path] = set()

STATES = {
    "created": "Not started",
    "queued": "Waiting",
    "running": "Training",
    "paused": "Paused",
    "stopped": "Stopped",
    "failed": "Failed",
    "finished": "Finished",
    "lost": "Lost",
}


def serve(folder: Path) -> None:
    """Let the browser fetch the files of this folder, and of nothing around it."""
    folder = folder.resolve()
    if folder not in _served:
        gr.set_static_paths([folder])
        _served.add(folder)


def link_to(file: Path) -> str:
    """The address of a served file."""
    return f"gradio_api/file={quote(str(file.resolve()))}"


def plain_time(seconds: float) -> str:
    """ "12 s", "3 min", "2 h 5 min": no more than a person wants to know."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plain_size(count: int) -> str:
    """ "1.9 MB" for a number of bytes."""
    if count < 1e5:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def thumbnail(file: Path) -> str:
    """A small picture as a data address; empty where it cannot be drawn."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (THUMBNAIL * 2, THUMBNAIL * 2))  # a JPEG decodes straight to a small size
            upright = ImageOps.exif_transpose(image)
            small = ImageOps.fit(upright.convert("RGBA"), (THUMBNAIL, THUMBNAIL))
    except (OSError, ValueError, SyntaxError):
        return ""
    flat = Image.new("RGB", small.size, "white")
    flat.paste(small, mask=small.getchannel("A"))
    packed = io.BytesIO()
    flat.save(packed, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}"


def strip_of(chosen: PictureSet) -> str:
    """What was chosen: thumbnails, a count, and each refused file by name with the reason."""
    pictures, captions = chosen.pictures, len(chosen.captions)
    shown = "".join(
        f'<img src="{thumbnail(file)}" alt="{escape(file.name)}" width="56" height="56">'
        for file in pictures[:MOST_THUMBNAILS]
    )
    more = len(pictures) - MOST_THUMBNAILS
    shown += f'<span class="more">+{more}</span>' if more > 0 else ""
    count = f"{len(pictures)} picture{'' if len(pictures) == 1 else 's'} ready"
    count += f", {captions} with a caption" if captions else ""
    bad = "".join(f"<li><b>{escape(one.path.name)}</b> is left out. {escape(one.why)}</li>" for one in chosen.refused)
    return f'<div class="strip">{shown}</div><p class="count" role="status">{count}.</p>' + (
        f'<ul class="refused">{bad}</ul>' if bad else ""
    )


def progress_of(state: RunState, request: str) -> str:
    """How far a run is: state, step, phase, time left, and a bar."""
    word = STATES[state.state]
    if request and state.is_live:
        word = "Pausing" if request == "pause" else "Stopping"
    done, total = (state.step, state.steps) if state.step else (state.phase_done, state.phase_total)
    share = min(1.0, done / total) if total else 0.0
    step = f"Step {state.step} of {state.steps}" if state.steps else _phase_words(state)
    notes = []
    if state.state == "running":
        if state.steps and state.phase != "training":
            notes.append(_phase_words(state))
        elif state.step and state.step == state.steps:
            notes.append("drawing the last pictures and writing the file")
        elif state.seconds_left is not None:
            notes.append(f"about {plain_time(state.seconds_left)} left")
    elif state.step and state.seconds >= 1:
        notes.append(f"{plain_time(state.seconds)} of training")
    if state.seconds_per_step and state.state == "running" and state.phase == "training":
        notes.append(f"{state.seconds_per_step:.2g} s a step")
    return (
        f'<div class="progress {state.state}"><p class="line"><span class="chip">{word}</span> '
        f'<strong>{escape(step)}</strong> <span class="quiet">{escape(" · ".join(notes))}</span></p>'
        f'<div class="bar" role="progressbar" aria-label="Progress of the run" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share * 100:.0f}"><span style="width:{share * 100:.1f}%"></span></div>'
        f"{_callout(state)}{_facts(state)}</div>"
    )


def _phase_words(state: RunState) -> str:
    if state.state == "created":
        return "Not started yet"
    words = {
        "": "getting ready",
        "starting": "starting and loading the model",
        "first pictures": "drawing the base model's pictures",
        "latents": "reading the pictures",
        "captions": "reading the captions",
        "class pictures": "drawing class pictures",
    }.get(state.phase, state.phase)
    count = f" ({state.phase_done} of {state.phase_total})" if state.phase_total > 1 else ""
    return f"{words[0].upper()}{words[1:]}{count}"


def _callout(state: RunState) -> str:
    """What went wrong and what deserves notice."""
    said = ""
    if state.message:
        said += f'<p class="callout bad" role="alert">{escape(state.message)}</p>'
    if state.warnings:
        rows = "".join(f"<li>{escape(warning)}</li>" for warning in state.warnings[:20])
        said += f'<ul class="callout mild">{rows}</ul>'
    return said


def _facts(state: RunState) -> str:
    """How large it all is; for methods that move their ranks, where they went."""
    started = state.started
    if started is None:
        return ""
    told = (
        f"{started.pictures} pictures, {started.parameters:,} numbers in {started.sites} layers, "
        f"a file of {plain_size(started.file_bytes)}, on {started.device} in {started.precision}."
    )
    ranks = list(state.ranks.values())
    if ranks and min(ranks) != max(ranks):
        told += f" Ranks now go from {min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.1f} on average."
    return f'<p class="quiet">{escape(told)}</p>'


def pairs_of(folder: Path, samples: Sequence[Sampled], *, is_live: bool) -> str:
    """For each prompt the base model's picture and the newest one, from the same seed."""
    if not samples:
        return "<p class=\"quiet empty\">Pictures appear here: first the base model's, then the adapter's.</p>"
    serve(folder / "samples")
    rows = ""
    for prompt, seed in dict.fromkeys((sample.prompt, sample.seed) for sample in samples):
        own = [sample for sample in samples if (sample.prompt, sample.seed) == (prompt, seed)]
        base = next((sample for sample in own if sample.step == 0), None)
        last = own[-1] if own[-1].step else None
        absent = "still to come" if is_live else "none was drawn"
        figures = _figure(folder, base, "Base model", absent) + _figure(folder, last, "With the adapter", absent)
        rows += (
            f'<div class="pair"><div class="two">{figures}</div>'
            f'<p class="quiet">“{escape(prompt)}”, seed {seed}</p></div>'
        )
    return f'<div class="pairs">{rows}</div>'


def _figure(folder: Path, sample: Sampled | None, title: str, absent: str) -> str:
    if sample is None:
        return f'<figure><div class="blank">{absent}</div><figcaption>{title}</figcaption></figure>'
    step = f", step {sample.step}" if sample.step else ""
    file = folder / sample.path
    address = f"{link_to(file)}?{_age(file)}"
    return (
        f'<figure><a href="{address}" target="_blank"><img src="{address}" '
        f'alt="{escape(title)}{step}: {escape(sample.prompt)}"></a><figcaption>{title}{step}</figcaption></figure>'
    )


def _age(file: Path) -> int:
    """A number that changes with the file, so that a browser does not show an old picture of the same name."""
    try:
        return os.stat(file).st_mtime_ns // 10**6
    except OSError:
        return 0


def result_of(folder: Path, state: RunState) -> str:
    """The finished file to take along."""
    file = (folder / state.gallery).resolve() if state.gallery else None
    if file is None or not file.is_file() or state.state not in ("finished", "stopped", "paused"):
        return ""
    serve(file.parent)
    return (
        f'<p class="result"><a class="take" href="{link_to(file)}" download="{escape(file.name)}">'
        f'Download {escape(file.name)}</a> <span class="quiet">{plain_size(file.stat().st_size)}</span></p>'
    )


def log_of(file: Path, *, lines: int = 40) -> str:
    """The end of a run's log."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - 16_000))
            tail = log.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        tail = []
    if not tail:
        return ""
    return f"<details><summary>The end of the log</summary><pre>{escape(chr(10).join(tail))}</pre></details>"
