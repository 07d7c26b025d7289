"""What the Train tab does, as plain functions of values: defaults, settings files, what to know before Start, Start."""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import TrainConfig, settle
from reparam_diffusion.data.folder_layout import expand_folders
from reparam_diffusion.data.masks import ALPHA, BESIDE, mask_files
from reparam_diffusion.data.sets import count_further
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.gallery import shelf
from reparam_diffusion.gallery.report import method_title
from reparam_diffusion.jobs import datasets, drafts, presets, queue, ray_jobs, runs
from reparam_diffusion.training.check import check_model_here, check_settings
from reparam_diffusion.workspace import require_workspace
from ui.form import flat, nested

HIDDEN = ("data.images", "schema_version", "title", "about")
"""Settings that no control shows."""


def settled(workspace: Path, preset: str, kind: str, method: str, *, card: str = "") -> TrainConfig:
    """The settings of a run before a person changes any."""
    return settle(*presets.layers(preset, workspace, kind=kind, method=method, card=card))


def defaults(workspace: Path, preset: str, kind: str, method: str, *, card: str = "") -> dict[str, Any]:
    """What the controls show at first, by place. Any: each setting has its own type."""
    shown = shown_of(settled(workspace, preset, kind, method, card=card))
    for place in ("data.trigger", "data.class_word", "data.kind", "output.name", "method"):
        shown.pop(place, None)
    return shown


def shown_of(config: TrainConfig) -> dict[str, Any]:
    """All settings as their controls show them; a method's own stand under its name. Any: as above."""
    method = config.adapter.method
    rows = {place: value for place, value in flat(config).items() if place not in HIDDEN}
    own = {place: rows.pop(place) for place in list(rows) if place.startswith("adapter.")}
    own.pop("adapter.method")
    return {
        **rows,
        **{f"adapter.{method}.{place.removeprefix('adapter.')}": value for place, value in own.items()},
        "method": method,
    }


def layer_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by place, as the form has them -> one layer to settle: only the chosen method's. Any: as above."""
    method = settings["method"]
    own = f"adapter.{method}."
    chosen = {place: value for place, value in settings.items() if not place.startswith("adapter.")}
    for name in ("method", "preset", "card"):
        chosen.pop(name, None)
    chosen |= {f"adapter.{place.removeprefix(own)}": v for place, v in settings.items() if place.startswith(own)}
    words = {place: str(chosen.get(place) or "").strip() for place in ("data.trigger", "data.class_word")}
    return nested({**chosen, **words, "adapter.method": method})


def at_control(place: str, method: str) -> str:
    """The place of the control that shows a setting."""
    whole = re.sub(r"\.\d+(\..*)?$", "", place)  # a list has one control
    return f"adapter.{method}.{whole.removeprefix('adapter.')}" if whole.startswith("adapter.") else whole


def start_run(workspace: Path, chosen: datasets.PictureSet | None, settings: Mapping[str, Any]) -> Path:
    """Start what the form shows. Raises UserError for what is missing, before anything is made."""
    if chosen is None:
        raise UserError("There are no pictures yet.", do="Drop some in step 1, or choose an example.")
    return start_config(workspace, chosen, settle(layer_of(settings)))


def start_config(workspace: Path, chosen: datasets.PictureSet, config: TrainConfig) -> Path:
    """Copy the pictures into the workspace, make the run, line it up; gives its folder."""
    trigger, class_word = config.data.trigger, config.data.class_word
    if not trigger:
        raise UserError(
            "The trigger word is missing.", do='Write a made-up word in step 2, such as "sks".', place="data.trigger"
        )
    config = resolve_start(config, workspace)
    config = config.model_copy(update={"data": expand_folders(config.data)[0]})
    require_workspace(workspace, "runs")
    count_further(config.data)  # a wrong folder is told before anything is made
    ray_jobs.check(config)
    check_settings(config)
    check_model_here(config)
    chosen = datasets.with_words(chosen, trigger=trigger, class_word=class_word)
    masks = config.data.masks
    if masks == BESIDE:
        mask_files(chosen.pictures, masks, place="data.masks")
    elif masks not in ("", ALPHA):
        chosen, masks = datasets.with_masks(chosen, masks), BESIDE
    folder = datasets.add_dataset(chosen, workspace)
    data = config.data.model_copy(update={"images": str(folder), "masks": masks})
    run = runs.create_run(config.model_copy(update={"data": data}), workspace, now=datetime.datetime.now())
    queue.submit(run)
    return run


def resolve_start(config: TrainConfig, workspace: Path) -> TrainConfig:
    """The settings with the file of the adapter to continue from, which the page knows by its name in the gallery.

    A path is taken only inside the workspace's adapters and runs, as "Train again" shows it. Raises UserError.
    """
    name = config.training.start_from.strip()
    if not name:
        return config
    place, homes = Path(name).resolve(), (shelf.shelf_of(workspace).resolve(), (workspace / "runs").resolve())
    if not (Path(name).is_absolute() and any(place.is_relative_to(home) for home in homes)):
        if "/" in name or "\\" in name or name.startswith("~"):
            raise UserError(
                f'"{name}" is not an adapter of the gallery.',
                "The page opens no file by its path.",
                "Import it into the gallery, and give its name there.",
                place="training.start_from",
            )
        try:
            place = shelf.find(name, workspace)
        except UserError as error:
            raise UserError(error.what, error.why, error.do, place="training.start_from") from None
    training = config.training.model_copy(update={"start_from": str(place)})
    return config.model_copy(update={"training": training})


def on_from(workspace: Path, stem: str) -> dict[str, Any]:
    """The settings that train on from an adapter of the gallery, as the form shows them: its own where its header has
    them, else its method and the layers that it has. Any: as above.
    """
    file = read_adapter(shelf.at(stem, workspace))
    header, method = file.metadata, file.metadata.get("reparam_method", file.method)
    try:
        shown = shown_of(settle(tomllib.loads(header["reparam_config"])))
    except (KeyError, tomllib.TOMLDecodeError, UserError):
        if method not in METHODS:
            raise UserError(
                f"{stem} cannot be trained on as it is.",
                f"It is {method_title(method)}, which is not trained here.",
                "Convert it to LoRA in Blend first.",
            ) from None
        text = {"targets.text_encoder": "attention+mlp"} if any(site.startswith("te") for site in file.sites) else {}
        shown = {"data.trigger": file.trigger, "targets.unet": "all", **text, "method": method}
    words = {}
    if file.words:
        words = {"embedding.vectors": file.words[0].count, "data.trigger": file.words[0].text}
    return {**shown, **words, "output.name": "", "training.start_from": stem, "preset": presets.FIRST}


def again(workspace: Path, run: Path) -> tuple[str | None, dict[str, Any]]:
    """A run's pictures as a new draft (None when they are gone), and its settings as the form shows them."""
    config = runs.read_config(run)
    shown = {**shown_of(config), "preset": presets.FIRST, "card": ""}
    images = config.data.images
    folder = Path(images) if isinstance(images, str) else None
    if folder is None or not folder.is_dir():
        return None, shown
    chosen = datasets.open_dataset(folder)
    return drafts.keep(chosen, workspace), shown
