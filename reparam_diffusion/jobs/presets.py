"""Settings to start from: the bundled presets for a base model, and those a person saved in workspace/presets/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import PRESETS, TrainConfig, find_preset, preset_names, read_settings, settle, to_toml
from reparam_diffusion.errors import UserError, unknown_name
from reparam_diffusion.files import write_whole
from reparam_diffusion.gallery.shelf import make_slug
from reparam_diffusion.models.outline import outline
from reparam_diffusion.models.precision import pick_device
from reparam_diffusion.training.cards import card_layer

FIRST = "starter"
MINE = "mine/"
"""How the names of a person's own presets begin."""
PRIVATE = {"data": ("images", "trigger", "class_word"), "output": ("name",)}
"""What belongs to one run and not to a preset."""

Layer = dict[str, Any]
"""Partial settings. Any: settings as TOML gives them."""


def choices(workspace: Path) -> list[tuple[str, str]]:
    """(title, name) of what there is; presets of one base model, such as sd15-lora, are one choice. Own ones last."""
    found = {FIRST: "For the starter model"}
    for file in sorted(PRESETS.glob("*.toml")):
        name, _, method = file.stem.rpartition("-")
        title = str(find_preset(file.stem).get("title") or file.stem)
        if name and method in METHODS:
            found[name] = title.replace(METHODS[method].title, "").strip()
        elif name not in METHODS and file.stem != "style":  # lora-subject and style are the starter model's
            found[file.stem] = title
    for file in sorted(_home(workspace).glob("*.toml")):
        found[f"{MINE}{file.stem}"] = f"{_title(file)} (yours)"
    return [(title, name) for name, title in found.items()]


def notes_on(name: str, config: TrainConfig, *, card: str = "") -> list[str]:
    """What a person should know of a preset and a card that are for something else than this run has."""
    notes = []
    made_for = "" if name.startswith(MINE) or name.endswith(".toml") else name.partition("-")[0]
    fitting = _fitting(config.model.path)
    if made_for and fitting and fitting != (made_for if made_for in ("sd15", "sdxl") else "starter"):
        titles = {
            "starter": "the bundled starter model",
            "sd15": "Stable Diffusion 1.5 and 2.x",
            "sdxl": "Stable Diffusion XL",
        }
        notes.append(
            f"These settings are not made for the base model: choose those for {titles[fitting]}, or another model."
        )
    if card and pick_device(config.model.device).type == "cpu":
        notes.append("torch sees no graphics card here: this would run on the processor (see README, Graphics cards).")
    return notes


def _fitting(model: str) -> str:
    """Which presets are for a base model; "" where it cannot be read: the run fetches it, or tells why."""
    try:
        family = "starter" if model == "starter" else outline(model).family
    except UserError:
        return ""
    return {"starter": "starter", "sd1": "sd15", "sd2": "sd15", "sdxl": "sdxl"}[family]


def layers(name: str, workspace: Path, *, kind: str, method: str, card: str = "") -> list[Layer]:
    """What a run's settings start from, as layers to settle; a graphics card's come last.

    A person's own preset brings its own method and kind.
    """
    if name.startswith(MINE):
        return [read_settings(_file(name, workspace)), card_layer(card)]
    own = "style" if kind == "style" else f"{method}-subject"
    names = (own, "quick") if name == FIRST else (f"{name}-{method}", name)
    there = preset_names()  # names come from browsers and other programs: none leads out of the folder
    known = next((one for one in names if one in there), None)
    if known is None:
        raise unknown_name("preset", name, [*there, *(value for _, value in choices(workspace))], place="preset")
    return [find_preset(known), {"adapter": {"method": method}, "data": {"kind": kind}}, card_layer(card)]


def save(config: TrainConfig, workspace: Path, *, title: str) -> str:
    """Keep settings under a title; gives the preset's name. The same title replaces what it named."""
    if not title.strip():
        raise UserError("The preset has no name.", do="Write one first.")
    blank = settle({})
    changes: dict[str, Any] = {"title": title.strip(), "about": ""}
    for group, names in PRIVATE.items():
        empty = {name: getattr(getattr(blank, group), name) for name in names}
        changes[group] = getattr(config, group).model_copy(update=empty)
    slug = make_slug(title, otherwise="preset")
    write_whole(_home(workspace) / f"{slug}.toml", to_toml(config.model_copy(update=changes)))
    return f"{MINE}{slug}"


def remove(name: str, workspace: Path) -> Path:
    """Move one of a person's own presets to the bin; says where. Raises UserError for a bundled one."""
    if not name.startswith(MINE):
        raise UserError("This preset comes with the program.", do="Only your own can be deleted.")
    file = _file(name, workspace)
    target, number = workspace / "bin" / "presets" / file.name, 1
    target.parent.mkdir(parents=True, exist_ok=True)
    while target.exists():
        number += 1
        target = target.with_name(f"{file.stem}-{number}.toml")
    file.replace(target)
    return target


def _home(workspace: Path) -> Path:
    return workspace / "presets"


def _file(name: str, workspace: Path) -> Path:
    """A person's own preset; names come from browsers, so the slug alone counts."""
    file = _home(workspace) / f"{make_slug(name.removeprefix(MINE), otherwise='preset')}.toml"
    if not file.is_file() or name != f"{MINE}{file.stem}":
        own = [f"{MINE}{one.stem}" for one in _home(workspace).glob("*.toml")]
        raise unknown_name("preset", name, own, do="Choose another one.", place="preset")
    return file


def _title(file: Path) -> str:
    try:
        return str(read_settings(file).get("title") or file.stem)
    except UserError:
        return f"{file.stem} (damaged)"
