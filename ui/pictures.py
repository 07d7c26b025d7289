"""Step 1 and the captions: what was dropped or chosen becomes a draft; captions are edited beside each picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import captioner, datasets, drafts
from ui import fragments
from ui.door import QUIET, guarded

NOTHING_YET = '<p class="quiet">5 to 20 pictures are good. Captions may come along as text files of the same names.</p>'
TELL_CHANGES = """
element.addEventListener("change", (event) => {
  const text = event.target.closest("textarea[data-name]");
  if (text) trigger("edit", { name: text.dataset.name, text: text.value });
});
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-name]");
  if (button) trigger("delete", { name: button.dataset.name });
});
"""


@dataclass(frozen=True)
class Pictures:
    """The controls of step 1. `draft` names what was chosen; `shown` is the draft that the captions show."""

    files: gr.File
    draft: gr.State
    strip: gr.HTML
    examples: list[tuple[gr.Button, datasets.PictureSet]]


@dataclass(frozen=True)
class Captions:
    """The folded list of pictures with their captions."""

    panel: gr.Accordion
    rows: gr.HTML
    model: gr.Textbox
    describe: gr.Button
    told: gr.HTML
    timer: gr.Timer


def draw_pictures() -> Pictures:
    """A place to drop files, what was chosen, and the examples."""
    files = gr.File(file_count="multiple", label="Your pictures", show_label=False, height=132, elem_id="drop")
    strip = gr.HTML(NOTHING_YET, elem_id="strip", padding=False)
    gr.HTML('<p class="quiet">Or try an example:</p>', padding=False)
    with gr.Row(elem_classes="examples"):
        examples = [(_example_button(one), one) for one in datasets.example_sets()]
    return Pictures(files, gr.State(None), strip, examples)


def _example_button(example: datasets.PictureSet) -> gr.Button:
    icon = example.pictures[0].path
    return gr.Button(example.about.title, icon=icon, size="sm", min_width=80, elem_classes="example")


def draw_captions() -> Captions:
    """The captions, folded and empty until there are pictures."""
    with gr.Accordion("Captions", open=False, elem_id="captions-panel", visible=False) as panel:
        about = "What each picture shows. Name what should change freely later, such as the background."
        gr.HTML(f'<p class="quiet">{about}</p>', padding=False)
        rows = gr.HTML("", elem_id="captions", padding=False, js_on_load=TELL_CHANGES)
        with gr.Row(elem_classes="settings-foot"):
            model = gr.Textbox(
                show_label=False,
                placeholder="Folder of a BLIP or Florence-2 model",
                max_lines=1,
                min_width=200,
                elem_id="describer",
            )
            describe = gr.Button("Describe pictures without a caption", min_width=240)
        told = gr.HTML("", padding=False, elem_id="describing")
    return Captions(panel, rows, model, describe, told, gr.Timer(1.0, active=False))


def connect_pictures(
    workspace: Path, pictures: Pictures, captions: Captions, words: dict[str, gr.components.Component]
) -> None:
    """Dropped files and examples become drafts; captions and left-out pictures are written to the draft."""
    shown = [pictures.draft, pictures.strip, captions.panel, captions.rows]

    def take_files(names: list[str] | None, old: str | None) -> list[Any]:
        if not names:
            return show_draft(workspace, None)
        chosen = datasets.sort_files([Path(name) for name in names])
        return show_draft(workspace, drafts.keep(chosen, workspace))

    for event in (pictures.files.upload, pictures.files.delete, pictures.files.clear):
        event(guarded(take_files, workspace), [pictures.files, pictures.draft], shown, api_visibility="private")

    order = ("data.trigger", "data.class_word", "data.kind")
    for button, example in pictures.examples:

        def take_example(example: datasets.PictureSet = example) -> list[Any]:
            about = example.about
            said = [about.trigger, about.class_word, about.kind]
            return [None, *show_draft(workspace, drafts.keep(example, workspace)), *said]

        outputs = [pictures.files, *shown, *(words[place] for place in order)]
        button.click(guarded(take_example, workspace), None, outputs, **QUIET)

    def edit(draft: str | None, event: gr.EventData) -> Any:
        chosen = drafts.set_caption(draft or "", workspace, event.name, event.text)
        return fragments.strip_of(chosen)

    def leave_out(draft: str | None, event: gr.EventData) -> list[Any]:
        drafts.leave_out(draft or "", workspace, event.name)
        return show_draft(workspace, draft)[1:]

    # One after the other: leaving a caption's field for a press on × is both at once, and each shows what is left.
    in_turn = QUIET | {"concurrency_id": "captions", "concurrency_limit": 1}
    captions.rows.edit(guarded(edit, workspace), pictures.draft, pictures.strip, **in_turn)
    captions.rows.delete(guarded(leave_out, workspace), pictures.draft, shown[1:], **in_turn)


def connect_describing(workspace: Path, pictures: Pictures, captions: Captions) -> None:
    """A describer works in a process of its own; a timer shows what it has said until it ends."""
    shown = [pictures.strip, captions.rows, captions.told, captions.timer]

    def start(draft: str | None, model: str) -> list[Any]:
        captioner.start(workspace, draft or "", model)
        return ["Loading the model that describes pictures.", gr.Timer(active=True)]

    def see(draft: str | None, told: str) -> list[Any]:
        now, timer = describing_now(workspace, draft)
        if now == told:  # nothing new: what is being typed stays
            return [gr.skip(), gr.skip(), gr.skip(), timer]
        _, strip, _, rows = show_draft(workspace, draft)
        return [strip, rows, now, timer]

    captions.describe.click(
        guarded(start, workspace), [pictures.draft, captions.model], [captions.told, captions.timer], **QUIET
    )
    captions.timer.tick(guarded(see, workspace), [pictures.draft, captions.told], shown, **QUIET)


def describing_now(workspace: Path, draft: str | None) -> tuple[str, gr.Timer]:
    """What is told of a draft's describer, and a timer that ticks for as long as it lives."""
    progress = captioner.progress_of(workspace, draft or "")
    if progress is None:
        return "", gr.Timer(active=False)
    is_over = bool(progress.trouble) or (progress.done > 0 and progress.done == progress.total)
    is_alive = captioner.is_at_work(workspace, draft or "")
    if not is_over and not is_alive and not captioner.is_starting(workspace, draft or ""):
        progress = replace(progress, trouble="The describer ended without a word. Start it again.")
    return described(progress), gr.Timer(active=not (is_over or progress.trouble))


def described(progress: captioner.Progress) -> str:
    """How far the describer is, or what stopped it."""
    if progress.trouble:
        return f'<p class="callout bad" role="alert">{escape(progress.trouble)}</p>'
    if not progress.total:
        return '<p class="quiet" role="status">Loading the model that describes pictures.</p>'
    words = "Described" if progress.done == progress.total else "Describing"
    return f'<p class="quiet" role="status">{words} {progress.done} of {progress.total} pictures.</p>'


def show_draft(workspace: Path, draft: str | None) -> list[Any]:
    """The draft's name, its strip, the captions' panel and rows. Any: gradio's updates."""
    chosen = drafts.read(draft, workspace)
    if chosen is None:
        return [None, NOTHING_YET, gr.update(visible=False), ""]
    count = len(chosen.pictures)
    label = f"Captions of {count} picture{'' if count == 1 else 's'}"
    return [draft, fragments.strip_of(chosen), gr.update(visible=True, label=label), fragments.captions_of(chosen)]


def chosen_of(workspace: Path, draft: str | None) -> datasets.PictureSet | None:
    """The pictures of a draft; None when none were chosen. Raises UserError for a draft that is gone."""
    chosen = drafts.read(draft, workspace)
    if draft and chosen is None:
        raise UserError("These pictures are gone.", "They were not touched for a week.", "Choose them again.")
    return chosen
