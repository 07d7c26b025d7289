"""What the Blend tab asks the workshop: the command line's own arguments, made from what the form shows."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reparam_diffusion.data.captions import fill
from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import shelf
from reparam_diffusion.gallery.blend import BLENDS
from reparam_diffusion.gallery.shelf import make_slug
from reparam_diffusion.models.glance import glance_at
from reparam_diffusion.models.precision import pick_device
from reparam_diffusion.models.sample import finite

Values = Mapping[str, Any]
"""What the form shows, by name. Any: each control has its own type."""
Row = tuple[str, float | None, float | None, str]
"""An adapter, its strength, the text encoder's (None: the same), and block=factor pairs."""

WORKS = {
    "blend": "Blend several into one",
    "convert": "Change the method or size",
    "export": "Export for another program",
    "doctor": "Check a file",
    "compare": "Compare two",
    "bake": "Bake into a base model",
    "extract": "Extract from a model",
}
BUTTONS = {
    "blend": "Blend", "convert": "Convert", "export": "Export", "doctor": "Check", "compare": "Compare", "bake": "Bake",
    "extract": "Extract",
}  # fmt: skip
SHOWN: dict[str, frozenset[str]] = {
    "blend": frozenset({"rows", "method", "form", "model", "name", "picture", "precision"}),
    "convert": frozenset({"rows", "form", "angle", "model", "name", "picture", "precision"}),
    "export": frozenset({"rows", "target", "model", "precision", "strip"}),
    "doctor": frozenset({"rows", "model", "repair"}),
    "compare": frozenset({"rows", "model"}),
    "bake": frozenset({"rows", "model", "checkpoint", "name", "precision"}),
    "extract": frozenset({"tuned", "form", "model", "name", "precision"}),
}
"""Which controls a work needs."""
EXACT = ("exact", "diff")
QUICK_SIDE = 256  # pixels; larger pictures take minutes on a processor
ROWS = {"blend": 4, "bake": 4, "compare": 2, "convert": 1, "export": 1, "doctor": 1, "extract": 0}
"""How many adapters a work takes at the most."""


WEIGHED = ("blend", "convert", "bake")
"""Works in which the strengths count."""


def row_of(name: str | None, strength: float | None, text: str | None, blocks: str | None) -> Row:
    """One adapter of the form. Raises UserError for a text encoder's strength that is no number."""
    text = (text or "").strip()
    try:
        return name or "", strength, finite(text) if text else None, blocks or ""
    except ValueError:
        raise UserError(
            f'The text encoder\'s strength "{text}" is no number.', do="Write one such as 0.5, or leave it empty."
        ) from None


def arguments_of(workspace: Path, values: Values, rows: Sequence[Row], *, now: datetime.datetime) -> list[str]:
    """The command that does what the form says. Raises UserError for what is missing."""
    work = str(values["work"])
    chosen = [row for row in rows[: ROWS[work]] if row[0]]
    fewest = {"compare": 2, "extract": 0}.get(work, 1)
    if len(chosen) < fewest:
        count = "two adapters" if fewest == 2 else "an adapter"
        raise UserError(f"This needs {count}.", do="Choose from the gallery; files from elsewhere are dropped there.")
    for name, *_ in chosen:
        shelf.at(name, workspace)  # names come from browsers: only what lies in the gallery is opened
    made = MAKERS[work](workspace, values, chosen, now)
    place = [] if work == "extract" else ["--workspace", str(workspace)]  # it takes nothing from the gallery
    return [work, *made, *place]


def _blend(workspace: Path, values: Values, rows: Sequence[Row], now: datetime.datetime) -> list[str]:
    method = str(values["method"])
    options = [
        part
        for name in BLENDS[method].options.model_fields
        if (value := values.get(f"{method}.{name}")) is not None
        for part in ("--set", f"{name}={value}")
    ]
    sources = [_source(row) for row in rows]
    picture = _picture(workspace, values, rows)
    return [*sources, "--method", method, *options, *_form(values), *_common(values), *picture]


def _convert(workspace: Path, values: Values, rows: Sequence[Row], now: datetime.datetime) -> list[str]:
    angle = ["--angle"] if values["angle"] else []
    return [_source(rows[0]), *_form(values), *angle, *_common(values), *_picture(workspace, values, rows)]


def _export(workspace: Path, values: Values, rows: Sequence[Row], now: datetime.datetime) -> list[str]:
    target = str(values["target"])
    name = f"{make_slug(rows[0][0])}-{target}"
    out = exports_of(workspace) / f"{now:%Y%m%d-%H%M%S}" / (name if target == "peft" else f"{name}.safetensors")
    strip = ["--strip"] if values["strip"] else []
    numbers = ["--precision", str(values["precision"])]
    return [rows[0][0], "--to", target, "--out", str(out), *strip, *numbers, "--model", str(values["model"])]


def _doctor(workspace: Path, values: Values, rows: Sequence[Row], now: datetime.datetime) -> list[str]:
    out = exports_of(workspace) / f"{now:%Y%m%d-%H%M%S}" / f"{make_slug(rows[0][0])}-mended.safetensors"
    repair = ["--repair", str(out)] if values["repair"] else []
    return [rows[0][0], "--model", str(values["model"]), *repair]


def _compare(workspace: Path, values: Values, rows: Sequence[Row], now: datetime.datetime) -> list[str]:
    picture = workspace / "images" / f"{now:%Y-%m-%d}" / f"{now:%H%M%S}-compare.png"
    return [rows[0][0], rows[1][0], "--model", str(values["model"]), "--picture", str(picture)]


def _bake(workspace: Path, values: Values, rows: Sequence[Row], now: datetime.datetime) -> list[str]:
    name = make_slug(str(values["name"] or "-".join(row[0] for row in rows)), otherwise="baked")
    out = workspace / "models" / (f"{name}.safetensors" if values["checkpoint"] else name)
    numbers = ["--precision", str(values["precision"])]
    return [*[_source(row) for row in rows], "--out", str(out), "--model", str(values["model"]), *numbers]


def _extract(workspace: Path, values: Values, rows: Sequence[Row], now: datetime.datetime) -> list[str]:
    if not values["tuned"]:
        raise UserError("No fine-tuned model was given.", do="Write the path of its folder or .safetensors file.")
    slug = make_slug(str(values["name"]), otherwise="extracted")
    out = exports_of(workspace) / f"{now:%Y%m%d-%H%M%S}" / f"{slug}.safetensors"
    title = ["--title", str(values["name"])] if values["name"] else []
    numbers = ["--precision", str(values["precision"])]
    base = ["--base", str(values["model"])]
    return [str(values["tuned"]), *base, "--out", str(out), *_form(values, block=False), *numbers, *title]


MAKERS: dict[str, Callable[[Path, Values, Sequence[Row], datetime.datetime], list[str]]] = {
    "blend": _blend, "convert": _convert, "export": _export, "doctor": _doctor, "compare": _compare, "bake": _bake,
    "extract": _extract,
}  # fmt: skip


def exports_of(workspace: Path) -> Path:
    """Where files for other programs go."""
    return workspace / "exports"


def _source(row: Row) -> str:
    name, strength, text, blocks = row
    words = [name, f"{1.0 if strength is None else strength:g}"]
    if text is not None:
        words.append(f"{text:g}")
    if blocks.strip():
        words.append(blocks.replace(" ", ""))
    return ":".join(words)


def _form(values: Values, *, block: bool = True) -> list[str]:
    words = ["--as", str(values["kind"]), "--rank", str(int(values["rank"] or 0))]
    words += ["--energy", f"{values['energy'] or 0:g}", "--megabytes", f"{values['megabytes'] or 0:g}"]
    words += ["--factor", str(int(values["factor"] or 8))]
    return words + (["--block-size", str(int(values["block_size"] or 8))] if block else [])


def _common(values: Values) -> list[str]:
    title = ["--title", str(values["name"])] if values["name"] else []
    return ["--model", str(values["model"]), "--precision", str(values["precision"]), *title]


def _picture(workspace: Path, values: Values, rows: Sequence[Row]) -> list[str]:
    """What to draw with the exact change and with the file: what the form says, else for lossy forms what calls it."""
    if values["picture"]:
        return ["--picture", str(values["picture"])]
    if values["kind"] in EXACT:
        return []
    glance = glance_at(str(values["model"]))
    if pick_device("auto").type == "cpu" and (glance.size or 512) > QUICK_SIDE:
        return []  # minutes a picture: only when somebody asks for it
    facts = [shelf.shelved_at(shelf.at(name, workspace)).facts for name, *_ in rows]
    words = " ".join(dict.fromkeys(str(fact.get("activation text") or "").strip() for fact in facts)).strip()
    return ["--picture", fill(glance.habits.caption, trigger=words, class_word="")]
