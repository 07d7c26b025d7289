"""/generate for other programs: gradio_client calls it with a prompt and gets the files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData
from gradio.utils import get_upload_folder

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import images
from reparam_diffusion.gallery.recipe import make_recipe
from reparam_diffusion.jobs import studio
from reparam_diffusion.models.habits import DENOISE
from ui import fragments
from ui.door import guarded, warn

LOOK_AGAIN = 0.2  # seconds
PATIENCE = 600.0  # seconds
AT_ONCE = 4
"""How many callers are waited for at the same time, in places of their own beside the page's."""


def add_endpoint(workspace: Path) -> None:
    """Offer /generate."""

    def generate(  # noqa: PLR0917  (an endpoint's parameters are its arguments)
        prompt: str,
        adapters: list[Any] | None = None,  # Any: a name, or [name, strength, text encoder strength or null]
        negative: str | None = None,
        seed: int = 0,
        count: int = 1,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler: str = "",
        width: int | None = None,
        height: int | None = None,
        model: str = "starter",
        vae: str = "",
        prediction_type: str = "auto",
        image: dict[str, Any] | None = None,  # Any: gradio_client's handle_file
        mask: dict[str, Any] | None = None,
        denoise: float = DENOISE,
        ahead: bool = False,
        patience: float = PATIENCE,
    ) -> list[FileData]:
        """Draw pictures from seed, seed + 1, … and give their files; what is left out is the model's own.

        `image` is a picture to start from, `denoise` how much of it may change, `mask` is white where; both are files.
        With `ahead` a run that holds the device is not waited for. After `patience` seconds the request is cancelled.
        """
        values = {"prompt": prompt, "negative": negative, "seed": seed, "steps": steps, "guidance": guidance}
        values |= {"scheduler": scheduler, "width": width, "height": height, "model": model}
        values |= {"vae": vae, "prediction_type": prediction_type, "denoise": denoise}
        for name, file in (("image", image), ("mask", mask)):
            if file is not None:
                values[name] = images.keep_file(_sent(file), workspace, is_mask=name == "mask")
        recipe = make_recipe({**values, "adapters": [_use(one) for one in adapters or []]}, note=warn)
        if not 1 <= count <= studio.MOST_PICTURES:
            raise UserError(f"{count} pictures cannot be drawn.", do=f"Ask for 1 to {studio.MOST_PICTURES}.")
        recipes = tuple(recipe.model_copy(update={"seed": recipe.seed + n}) for n in range(count))
        folder = studio.submit(workspace, studio.Request(recipes=recipes))
        if ahead:
            studio.ask(folder, "ahead")
        return _awaited(folder, workspace, patience=patience)

    gr.api(
        guarded(generate, workspace, plain=True),
        api_name="generate",
        concurrency_limit=AT_ONCE,
        concurrency_id="generate",
    )


def _use(one: Any) -> dict[str, Any]:  # Any: as another program gives them; make_recipe checks
    """An adapter's name alone, or with one or two strengths."""
    return dict(zip(("name", "strength", "te_strength"), one if isinstance(one, list) else [one], strict=False))


def _sent(file: Mapping[str, Any]) -> Path:  # Any: as another program gives them
    """A file that was sent here, and no other of this machine. Raises UserError."""
    path = Path(str(file.get("path"))).resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()):
        raise UserError("This is no file that was sent.", do="Send it with gradio_client's handle_file.")
    return path


def _awaited(folder: Path, workspace: Path, *, patience: float) -> list[FileData]:
    """The files, once all are there. Raises UserError when some are not, or not within `patience` seconds."""
    fragments.serve(images.images_of(workspace))
    reader, began = studio.Reader(), time.monotonic()
    while (state := reader.state_of(folder)).is_live:
        if not time.monotonic() - began < patience:  # so that what is no number ends it too
            studio.cancel(folder)
            why = "The device is at work for another." if state.state == "waiting" else "The request was cancelled."
            raise UserError(f"Not drawn within {patience:g} seconds.", why, "Give more patience, or say ahead=True.")
        time.sleep(LOOK_AGAIN)
    if state.state != "finished":
        raise UserError("Not all pictures were drawn.", state.message or f"The request was {state.state}.")
    return [FileData(path=str(state.pictures[n])) for n in sorted(state.pictures)]
