"""Starting from a picture: the folded part with the picture, a brush for the mask, and how much may change.

A picture goes to the workspace as soon as it is chosen; the browser holds its name there, and the paint. Gradio's
editor loses paint that comes from the server, so the mask of a restored picture is shown small beside it, and used
until something is painted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import images
from reparam_diffusion.gallery.recipe import Recipe
from reparam_diffusion.models.glance import Glance
from reparam_diffusion.models.habits import DENOISE
from reparam_diffusion.models.start import fitting_size
from ui import fragments
from ui.door import QUIET, guarded, warn

PAINT, COVERS = (15, 118, 110), 0.6
"""The brush's colour, and how much it hides; what is below it is drawn anew."""
BRUSH = (f"#{bytes(PAINT).hex()}", COVERS)
MOST_PIXELS = 1280  # of a side in the editor; a larger picture only makes the page slow
ABOUT = """<p class="quiet">Paint over what should be drawn anew; the rest stays as it is. Without paint, all of it may
change. The picture is scaled to the width and height under More settings and cropped around its middle.</p>"""

Updates = dict[Any, Any]
"""What a handler changes, by control. Any: gradio's controls and updates."""
Size = tuple[int | None, int | None]
"""Width and height in pixels; None is open."""
Values = Mapping[Any, Any]
"""What gradio hands to a handler. Any: values of many kinds."""


@dataclass(frozen=True)
class StartControls:
    """The folded part. `image` and `mask`, which nobody sees, are the paths of kept pictures in the workspace."""

    fold: gr.Accordion
    dropped: gr.File
    chosen: gr.Column
    editor: gr.ImageEditor
    kept: gr.Row
    look: gr.HTML
    denoise: gr.Slider
    image: gr.Textbox
    mask: gr.Textbox

    def inputs(self) -> set[gr.components.Component]:
        """What handlers read."""
        return {self.editor, self.denoise, self.image, self.mask}

    def changing(self) -> list[gr.blocks.Block]:
        """What a restore may change."""
        return list(vars(self).values())


def draw_start(workspace: Path) -> StartControls:
    """The controls: a place to drop a picture, and what appears once there is one."""
    with gr.Accordion("Start from a picture", open=False, elem_classes="fold", elem_id="start-picture") as fold:
        dropped = gr.File(label="A picture to start from", show_label=False, height=92, elem_id="drop-start")
        with gr.Column(visible=False) as chosen:
            editor = gr.ImageEditor(
                type="pil",
                image_mode="RGBA",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=_brush(512),
                height=340,
                label="Picture",
                show_label=False,
                elem_id="start-editor",
            )
            with gr.Row(visible=False) as kept:
                look = gr.HTML("", padding=False)
                whole = gr.Button("Change all of it", size="sm", min_width=120)
            gr.HTML(ABOUT, padding=False)
            denoise = gr.Slider(
                0.05, 1, value=DENOISE, step=0.05, label="How much may change",
                info="A little keeps the shapes; 1 keeps next to nothing.",
            )  # fmt: skip
            clear = gr.Button("Start without a picture", size="sm", elem_id="clear-start")
        names = [gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")]
    start = StartControls(fold, dropped, chosen, editor, kept, look, denoise, *names)
    for event in (clear.click, editor.clear):
        event(guarded(lambda: _nothing(start), workspace), None, start.changing(), **QUIET)
    whole.click(guarded(lambda: _masked(start, "", None, None), workspace), None, [kept, look, start.mask], **QUIET)
    return start


def _brush(side: int) -> gr.Brush:
    """A brush as wide as a sixteenth of a picture's longer side, in pixels."""
    return gr.Brush(default_size=max(4, side // 16), colors=[BRUSH], default_color=BRUSH, color_mode="fixed")


# --- the controls -> a recipe ----------------------------------------------------------------------------------------
def read_start(start: StartControls, values: Values, workspace: Path) -> dict[str, Any]:
    """What a recipe says of the picture to start from; what was painted is kept. Any: a recipe's values."""
    if not values[start.image]:
        return {}
    paint = _paint_of(values[start.editor])
    mask = values[start.mask] if paint is None else images.keep_source(paint, workspace)
    return {"image": values[start.image], "mask": mask, "denoise": values[start.denoise]}


def _paint_of(edited: Any) -> Image.Image | None:  # Any: what gradio's editor gives
    """White where anything was painted; None where nothing was."""
    for layer in (edited or {}).get("layers") or ():
        alpha: Image.Image = layer.getchannel("A")
        if alpha.getbbox():
            return alpha.point(lambda value: 255 if value else 0)
    return None


# --- a picture -> the controls ---------------------------------------------------------------------------------------
def show_start(start: StartControls, recipe: Recipe, workspace: Path) -> Updates:
    """Updates that show what a recipe starts from, or nothing."""
    if not recipe.image:
        return _nothing(start)
    try:
        picture, mask = images.open_sources(recipe, workspace)
    except UserError:
        warn("The picture that this one was started from is not here; it was left out.")
        return _nothing(start)
    assert picture is not None
    shown = _shown(start, recipe.image, picture)
    return {**shown, **_masked(start, recipe.mask, picture, mask), start.denoise: recipe.denoise}


def start_with(start: StartControls, file: Path, seen: Glance, workspace: Path) -> tuple[Updates, Size]:
    """Updates that show any picture to start from, and the size to draw at. Raises UserError for what is none."""
    name = images.keep_file(file, workspace)
    picture, _ = images.open_sources(Recipe(prompt="-", image=name), workspace)
    assert picture is not None
    return {**_shown(start, name, picture), **_masked(start, "", None, None)}, _size_for(picture, seen)


def size_to_draw(name: str, seen: Glance, workspace: Path) -> Size:
    """The size that a model draws at: its own, or the one that fits the kept picture it starts from."""
    if name:
        try:
            picture, _ = images.open_sources(Recipe(prompt="-", image=name), workspace)
        except UserError:  # drawing tells
            picture = None
        if picture is not None:
            return _size_for(picture, seen)
    return seen.size, seen.size


def _size_for(picture: Image.Image, seen: Glance) -> Size:
    """What fits a picture; open where the model's own size does not show yet."""
    if seen.size is None:
        return None, None
    return fitting_size(picture.size, side=seen.size, step=seen.size_step)


def _shown(start: StartControls, name: str, picture: Image.Image) -> Updates:
    """The part unfolded with a picture in it."""
    small = picture.copy()
    small.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    value = {"background": small, "layers": [], "composite": None}
    return {
        start.fold: gr.update(open=True),
        start.dropped: gr.update(value=None, visible=False),
        start.chosen: gr.update(visible=True),
        start.editor: gr.ImageEditor(value=value, brush=_brush(max(small.size))),
        start.image: name,
    }


def _masked(start: StartControls, name: str, picture: Image.Image | None, mask: Image.Image | None) -> Updates:
    """The mask that counts until something is painted, on a small picture."""
    look = ""
    if picture is not None and mask is not None:
        white = mask.convert("L").resize(picture.size).point(lambda value: round(value * COVERS))
        look = fragments.data_address(Image.composite(Image.new("RGB", picture.size, PAINT), picture, white))
        words = "Changed there again, until you paint."
        look = f'<p class="kept-mask"><img src="{look}" alt="What is drawn anew"> {words}</p>'
    return {start.mask: name, start.kept: gr.update(visible=bool(look)), start.look: look}


def _nothing(start: StartControls) -> Updates:
    """No picture, and a place to drop one; the part stays folded or not, as it is."""
    empty: Updates = {start.dropped: gr.update(value=None, visible=True), start.chosen: gr.update(visible=False)}
    return {**empty, start.editor: None, start.image: "", **_masked(start, "", None, None)}
