"""Step 1 and the captions: what was dropped or chosen becomes a draft; captions are edited beside each picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
  const back = event.target.closest("button[data-back]");
  if (back) trigger("undo", { name: back.dataset.back });
});
"""


@dataclass(frozen=True)
class Pictures:
    """The controls of step 1. `draft` names what was chosen; `shown` is the draft that the captions show."""

    files: gr.File
    draft: gr.State
    strip: gr.HTML
    clear: gr.Button
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
    clear = gr.Button("Remove all", size="sm", visible=False, elem_id="remove-all")
    gr.HTML('<p class="quiet">Or try an example:</p>', padding=False)
    with gr.Row(elem_classes="examples"):
        examples = [(_example_button(one), one) for one in datasets.example_sets()]
    return Pictures(files, gr.State(None), strip, clear, examples)


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


IN_TURN: dict[str, Any] = {"concurrency_id": "captions", "concurrency_limit": 1}
"""For handlers that change or read a draft, one after the other: leaving a caption's field for a press on a button is
both at once. Any: gradio's own arguments."""


def connect_pictures(
    workspace: Path, pictures: Pictures, captions: Captions, controls: Mapping[str, gr.components.Component]
) -> None:
    """Files and examples become drafts; captions and left-out images are written to the draft."""
    shown = [pictures.draft, pictures.strip, pictures.clear, captions.panel, captions.rows]
    spoken, start_from = [controls["data.trigger"], controls["data.class_word"]], controls["training.start_from"]
    examples = [example for _, example in pictures.examples]
    quiet = QUIET | IN_TURN

    def take_files(names: list[str] | None, draft: str | None, base: str, *said: str) -> list[Any]:
        """The box is emptied: what it took is in the draft, which alone says what there is."""
        if not names:
            return [gr.skip()] * (2 + len(shown) + len(spoken))
        old = drafts.read_draft(draft, workspace)
        name = drafts.add_files([Path(name) for name in names], workspace, draft)
        start = gr.skip() if old is None else drop_start_from(base)
        return [None, *show_draft(workspace, name), start, *forget_words(old, examples, said)]

    pictures.files.upload(
        guarded(take_files, workspace),
        [pictures.files, pictures.draft, start_from, *spoken],
        [pictures.files, *shown, start_from, *spoken],
        api_visibility="private",
        **IN_TURN,
    )

    def clear(draft: str | None, base: str, *said: str) -> list[Any]:
        forgotten = forget_words(drafts.read_draft(draft, workspace), examples, said)
        return [*show_draft(workspace, None), drop_start_from(base), *forgotten]

    before, after = [pictures.draft, start_from, *spoken], [*shown, start_from, *spoken]
    pictures.clear.click(guarded(clear, workspace), before, after, **quiet)

    for button, example in pictures.examples:

        def take_example(base: str, example: datasets.PictureSet = example) -> list[Any]:
            about = example.about
            said = [about.trigger, about.class_word, about.kind]
            draft = drafts.keep(example, workspace, is_example=True)
            return [*show_draft(workspace, draft), drop_start_from(base), *said]

        outputs = [*after, controls["data.kind"]]
        button.click(guarded(take_example, workspace), start_from, outputs, **quiet)

    _connect_captions(workspace, pictures, captions, spoken)


def _connect_captions(
    workspace: Path, pictures: Pictures, captions: Captions, words: list[gr.components.Component]
) -> None:
    """What is typed, removed and put back is written to the draft; another trigger word is shown in the captions."""
    shown = [pictures.strip, pictures.clear, captions.panel, captions.rows]
    quiet = QUIET | IN_TURN

    def edit(draft: str | None, event: gr.EventData) -> Any:
        chosen = drafts.set_caption(draft or "", workspace, event.name, event.text)
        return fragments.strip_of(chosen)

    def leave_out(draft: str | None, event: gr.EventData) -> list[Any]:
        drafts.leave_out(draft or "", workspace, event.name)
        return show_draft(workspace, draft)[1:]

    def put_back(draft: str | None, event: gr.EventData) -> list[Any]:
        drafts.put_back(draft or "", workspace, event.name)
        return show_draft(workspace, draft)[1:]

    def rename(draft: str | None, trigger: str, class_word: str) -> Any:
        before = drafts.read(draft, workspace)
        if before is None or draft is None:
            return gr.skip()
        after = drafts.set_words(draft, workspace, trigger=trigger.strip(), class_word=class_word.strip())
        return gr.skip() if after.pictures == before.pictures else fragments.captions_of(after)

    captions.rows.edit(guarded(edit, workspace), pictures.draft, pictures.strip, **quiet)
    captions.rows.delete(guarded(leave_out, workspace), pictures.draft, shown, **quiet)
    captions.rows.undo(guarded(put_back, workspace), pictures.draft, shown, **quiet)
    for word in words:
        assert isinstance(word, gr.Textbox)
        word.blur(guarded(rename, workspace), [pictures.draft, *words], captions.rows, **quiet)


def drop_start_from(base: str) -> Any:
    """Nothing to continue from: the images or the subject are others now. Any: gradio's update."""
    if not base.strip():
        return gr.skip()
    gr.Info(f"Training no longer continues from {escape(base.strip())}: the images or the subject have changed.")
    return ""


def forget_words(old: drafts.Draft | None, examples: Sequence[datasets.PictureSet], said: Sequence[str]) -> list[Any]:
    """Updates of trigger and class word where an example goes: its words are not those of the next images.

    What the user has written in their place stays. Any: gradio's updates.
    """
    if old is None or not old.is_example:
        return [gr.skip() for _ in said]
    theirs = [{getattr(one.about, name) for one in examples} for name in ("trigger", "class_word")]
    return ["" if now in names else gr.skip() for now, names in zip(said, theirs, strict=True)]


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
        _, strip, _, _, rows = show_draft(workspace, draft)
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
    """The draft's name, its strip, "Remove all", the captions' panel and rows. Any: gradio's updates."""
    chosen = drafts.read(draft, workspace)
    hidden = gr.update(visible=False)
    if chosen is None:
        return [None, NOTHING_YET, hidden, hidden, ""]
    count = len(chosen.pictures)
    label = f"Captions of {count} picture{'' if count == 1 else 's'}"
    strip, rows = fragments.strip_of(chosen), fragments.captions_of(chosen)
    return [draft, strip, gr.update(visible=True), gr.update(visible=True, label=label), rows]


def chosen_of(workspace: Path, draft: str | None) -> datasets.PictureSet | None:
    """The pictures of a draft; None when none were chosen. Raises UserError for a draft that is gone."""
    chosen = drafts.read(draft, workspace)
    if draft and chosen is None:
        raise UserError("These pictures are gone.", "They were not touched for a week.", "Choose them again.")
    return chosen
