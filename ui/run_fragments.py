"""What a run looks like: its place in the list, how far it is, its pictures over the steps, its ranks, its file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from reparam_diffusion.events import Sampled
from reparam_diffusion.jobs.fold import RunState
from ui.fragments import age_of, link_to, plain_size, plain_time, serve

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
PHASES = {
    "": "getting ready",
    "starting": "starting and loading the model",
    "first step": "taking the first step",
    "preview pictures": "drawing the base model's pictures",
    "latents": "reading the pictures",
    "captions": "reading the captions",
    "class pictures": "drawing class pictures",
    "waiting for the device": "waiting for the device",
}

SCRUB = """
const show = () => {
  const slider = element.querySelector("input[type=range]");
  if (!slider) return;
  const steps = JSON.parse(slider.dataset.steps);
  const at = element.scrubbed === undefined ? steps.length - 1 : Math.max(0, steps.indexOf(element.scrubbed));
  slider.value = at;
  element.querySelector("output").textContent = "step " + steps[at];
  element.querySelectorAll("[data-step]").forEach((one) => { one.hidden = Number(one.dataset.step) !== steps[at]; });
};
element.addEventListener("input", (event) => {
  const steps = JSON.parse(event.target.dataset.steps);
  element.scrubbed = steps[event.target.value];
  if (Number(event.target.value) === steps.length - 1) element.scrubbed = undefined;
  show();
});
watch("value", show);
show();
"""
"""The slider over the steps works in the browser alone; at its right end it follows new pictures."""

STAY_OPEN = """
const opened = new Set();
element.addEventListener("toggle", (event) => {
  const name = event.target.dataset.name;
  if (name && event.target.open) opened.add(name); else opened.delete(name);
}, true);
watch("value", () => element.querySelectorAll("details[data-name]").forEach((one) => {
  if (opened.has(one.dataset.name)) one.open = true;
}));
"""
"""What a person has unfolded stays so when the page tells something new."""

TICK = """
setInterval(() => {
  const clock = element.querySelector("[data-since]");
  if (!clock) return;
  const seconds = Math.max(0, Math.round(Date.now() / 1000 - Number(clock.dataset.since)));
  clock.textContent = seconds < 2 ? "" : "last step " + seconds + " s ago";
}, 1000);
"""

CHOOSE = """
element.addEventListener("click", (event) => {
  const act = event.target.closest("button[data-act]");
  if (act) trigger("edit", { run: act.dataset.run, act: act.dataset.act });
  const item = event.target.closest("button.run-item");
  if (item) trigger("select", { run: item.dataset.run });
});
"""


# --- the list --------------------------------------------------------------------------------------------------------
def sign_of(folder: Path, state: RunState) -> tuple[str, str, int, int, int]:
    """What a run's item shows, in short."""
    return folder.name, state.state, _percent(state), state.place, len(state.samples)


def _percent(state: RunState) -> int:
    return int(100 * state.step / state.steps) if state.steps else 0


def list_of(rows: Sequence[tuple[Path, RunState]], chosen: str | None, *, most: int) -> str:
    """The newest runs with their states; those that wait can be moved and taken out."""
    if not rows:
        return '<p class="quiet empty">No run yet. Start one under “Train”.</p>'
    waiting = sum(state.place > 0 for _, state in rows)
    items = "".join(_item(folder, state, folder.name == chosen, waiting) for folder, state in rows[:most])
    clear = '<button type="button" class="small" data-run="" data-act="clear">Empty the queue</button>'
    more = '<button type="button" class="small" data-run="" data-act="more">Show older runs</button>'
    return f'<ul class="run-list">{items}</ul>' + (more if len(rows) > most else "") + (clear if waiting > 1 else "")


def _item(folder: Path, state: RunState, is_chosen: bool, waiting: int) -> str:
    words, when = label_of(folder.name)
    percent = _percent(state)
    is_partly = state.state in ("running", "paused", "lost", "stopped") and percent
    note = f"{percent} %, {when}" if is_partly else when
    current = ' aria-current="true"' if is_chosen else ""
    item = (
        f'<button type="button" class="run-item" data-run="{escape(folder.name)}"{current}>{_picture(folder, state)}'
        f'<span class="words"><b>{escape(words)}</b><span class="quiet">{escape(note)}</span></span>'
        f'<span class="chip {state.state}">{STATES[state.state]}</span></button>'
    )
    return f"<li>{item}{_queue_buttons(folder.name, state.place, waiting) if state.place else ''}</li>"


def _picture(folder: Path, state: RunState) -> str:
    drawn = [sample for sample in state.samples if sample.step] or state.samples
    if not drawn:
        return '<span class="no-picture" aria-hidden="true"></span>'
    serve(folder / "samples")
    file = folder / drawn[-1].path
    return f'<img src="{link_to(file)}?{age_of(file)}" alt="Newest preview" width="40" height="40" loading="lazy">'


def _queue_buttons(name: str, place: int, waiting: int) -> str:
    acts = [("up", "↑", "Sooner", place > 1), ("down", "↓", "Later", place < waiting), ("out", "×", "Take out", True)]
    buttons = "".join(
        f'<button type="button" data-run="{escape(name)}" data-act="{act}" aria-label="{words}: {escape(name)}" '
        f'title="{words}"{"" if possible else " disabled"}>{sign}</button>'
        for act, sign, words, possible in acts
    )
    return f'<span class="queue-buttons">{buttons}</span>'


def label_of(name: str) -> tuple[str, str]:
    """ "sks-toy-lora" and "24 Nov, 03:52" for 20261124-035206-sks-toy-lora."""
    day, _, rest = name.partition("-")
    time, _, words = rest.partition("-")
    if not (day.isdigit() and time.isdigit() and len(day) == 8 and len(time) == 6 and words):
        return name, ""
    months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
    month = months[(int(day[4:6]) - 1) % 12]
    return words, f"{int(day[6:])} {month}, {time[:2]}:{time[2:4]}"


# --- one run ---------------------------------------------------------------------------------------------------------
def progress_of(name: str, state: RunState, request: str) -> str:
    """How far a run is: name, state, step, phase, time left, and a bar."""
    word = STATES[state.state]
    if request and state.is_live:
        word = "Pausing" if request == "pause" else "Stopping"
    done, total = (state.step, state.steps) if state.step else (state.phase_done, state.phase_total)
    share = min(1.0, done / total) if total else 0.0
    step = f"Step {state.step} of {state.steps}" if state.steps else _phase_words(state)
    since = f'<span class="quiet" data-since="{state.last_step_at:.0f}"></span>' if _is_stepping(state) else ""
    words, when = label_of(name)
    return (
        f'<div class="progress {state.state}"><h2>{escape(words)} <span class="quiet">{escape(when)}</span></h2>'
        f'<p class="line"><span class="chip {state.state}">{word}</span> '
        f'<strong>{escape(step)}</strong> <span class="quiet">{escape(" · ".join(_notes(state)))}</span> {since}</p>'
        f'<div class="bar" role="progressbar" aria-label="Progress of the run" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share * 100:.0f}"><span style="width:{share * 100:.1f}%"></span></div>'
        f"{_callout(state)}{_facts(state)}{_assurance(state)}</div>"
    )


def _is_stepping(state: RunState) -> bool:
    return state.state == "running" and state.phase == "training" and state.step > 0


def _notes(state: RunState) -> list[str]:
    notes = []
    if state.place:
        notes.append("next in the queue" if state.place == 1 else f"number {state.place} in the queue")
    if state.waiting_for:
        notes.append(f"the device is in use by {state.waiting_for}")
    elif state.place:
        pass
    elif state.state == "running":
        if state.steps and state.phase != "training":
            notes.append(_phase_words(state))
        elif state.step and state.step == state.steps:
            notes.append("drawing the last pictures and writing the file")
        elif state.seconds_left is not None:
            notes.append(f"about {plain_time(state.seconds_left)} left")
    elif state.step and state.seconds >= 1:
        notes.append(f"{plain_time(state.seconds)} of training")
    if state.seconds_per_step and _is_stepping(state):
        notes.append(f"{state.seconds_per_step:.2g} s a step")
    return notes


def _phase_words(state: RunState) -> str:
    if state.state == "created":
        return "Not started yet"
    if state.place:
        return "Waits for its turn"
    words = PHASES.get(state.phase, state.phase)
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
    """How large it all is."""
    started = state.started
    if started is None:
        return f'<p class="quiet">{escape(state.where)}</p>' if state.where else ""
    told = (
        f"{started.pictures} pictures, {started.parameters:,} numbers in {started.sites} layers, "
        f"a file of {plain_size(started.file_bytes)}, on {started.device} in {started.precision}{_where(state)}."
    )
    told += f" {'; '.join(started.sets)}." if started.sets else ""
    return f'<p class="quiet">{escape(told)}</p>'


def _where(state: RunState) -> str:
    return f", {state.where}" if state.where else ""


def _assurance(state: RunState) -> str:
    if not state.is_live:
        return ""
    return '<p class="quiet">You can close this page: the training goes on and is here when you come back.</p>'


# --- pictures --------------------------------------------------------------------------------------------------------
def pairs_of(folder: Path, samples: Sequence[Sampled], *, is_live: bool) -> str:
    """For each prompt the base model's picture beside the adapter's, with a slider over the steps; then all of them."""
    if not samples:
        return "<p class=\"quiet empty\">Pictures appear here: first the base model's, then the adapter's.</p>"
    serve(folder / "samples")
    prompts = list(dict.fromkeys((sample.prompt, sample.seed) for sample in samples))
    steps = sorted({sample.step for sample in samples} - {0})
    known = {(sample.prompt, sample.seed, sample.step): sample for sample in samples}
    rows = ""
    for prompt, seed in prompts:
        base = _figure(folder, known.get((prompt, seed, 0)), "Base model", is_live)
        later = "".join(_later(folder, known.get((prompt, seed, step)), step, steps, is_live) for step in steps)
        later = later or _figure(folder, None, "With the adapter", is_live)
        rows += (
            f'<div class="pair"><div class="two">{base}<div>{later}</div></div>'
            f'<p class="quiet">“{escape(prompt)}”, seed {seed}</p></div>'
        )
    wall = _wall(folder, known, prompts, [0, *steps]) if len(steps) > 1 else ""
    return f'{_slider(steps)}<div class="pairs">{rows}</div>{wall}'


def _slider(steps: Sequence[int]) -> str:
    if len(steps) < 2:
        return ""
    return (
        f'<label class="scrub"><span>Over the training</span> <input type="range" min="0" max="{len(steps) - 1}" '
        f'value="{len(steps) - 1}" data-steps="{list(steps)}" aria-label="Step of the pictures">'
        f"<output>step {steps[-1]}</output></label>"
    )


def _later(folder: Path, sample: Sampled | None, step: int, steps: Sequence[int], is_live: bool) -> str:
    hidden = "" if step == steps[-1] else " hidden"
    figure = _figure(folder, sample, "With the adapter", is_live)
    return f'<div data-step="{step}"{hidden}>{figure}</div>' if len(steps) > 1 else figure


def _figure(folder: Path, sample: Sampled | None, title: str, is_live: bool) -> str:
    if sample is None:
        absent = "still to come" if is_live else "none was drawn"
        return f'<figure><div class="blank">{absent}</div><figcaption>{title}</figcaption></figure>'
    step = f", step {sample.step}" if sample.step else ""
    return (
        f"<figure>{_linked(folder, sample, f'{title}{step}: {sample.prompt}')}"
        f"<figcaption>{title}{step}</figcaption></figure>"
    )


def _linked(folder: Path, sample: Sampled, alt: str) -> str:
    file = folder / sample.path
    address = f"{link_to(file)}?{age_of(file)}"
    return f'<a href="{address}" target="_blank"><img src="{address}" alt="{escape(alt)}" loading="lazy"></a>'


def _wall(
    folder: Path,
    known: dict[tuple[str, int, int], Sampled],
    prompts: Sequence[tuple[str, int]],
    steps: Sequence[int],
) -> str:
    """Every preview: a row a prompt, a column a step."""
    head = "".join(f'<th scope="col">{"base" if step == 0 else step}</th>' for step in steps)
    rows = ""
    for prompt, seed in prompts:
        cells = ""
        for step in steps:
            sample = known.get((prompt, seed, step))
            alt = f"Step {step}, all previews: {prompt}"
            cells += f"<td>{'' if sample is None else _linked(folder, sample, alt)}</td>"
        rows += f"<tr>{cells}</tr>"
    return (
        '<details data-name="wall"><summary>All previews, step by step</summary>'
        f'<div class="wall" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</details>"
    )


# --- the rest --------------------------------------------------------------------------------------------------------
def ranks_of(ranks: dict[str, int]) -> str:
    """Ranks by layer where they differ; nothing where they do not."""
    if not ranks or min(ranks.values()) == max(ranks.values()):
        return ""
    most = max(ranks.values())
    mean = sum(ranks.values()) / len(ranks)
    rows = "".join(
        f'<li><span class="layer">{escape(site)}</span><span class="rank-bar" style="--share:{rank / most:.3f}"></span>'
        f"<b>{rank}</b></li>"
        for site, rank in sorted(ranks.items(), key=lambda row: (-row[1], row[0]))
    )
    told = f"Ranks by layer: {min(ranks.values())} to {most}, {mean:.1f} on average"
    return f'<details data-name="ranks"><summary>{told}</summary><ul class="ranks" tabindex="0">{rows}</ul></details>'


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


def log_of(file: Path, *, is_open: bool, lines: int = 40) -> str:
    """The end of a run's log, folded unless it says why a run ended."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - 16_000))
            tail = log.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        tail = []
    if not tail:
        return ""
    unfolded = " open" if is_open else ""
    text = escape("\n".join(tail))
    return f'<details data-name="log"{unfolded}><summary>The end of the log</summary><pre>{text}</pre></details>'
