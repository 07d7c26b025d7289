"""Blending files into one file: Δ = method(s₁Δ₁, s₂Δ₂, …), layer by layer, with what it loses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from reparam_diffusion.errors import UserError, unknown_name
from reparam_diffusion.files import require_new_file
from reparam_diffusion.formats.header import compare_headers, inherit_header
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import Precision
from reparam_diffusion.gallery.blend import BLENDS
from reparam_diffusion.gallery.blend.forms import Form
from reparam_diffusion.gallery.blend.method import BlendMethod, Made, Options
from reparam_diffusion.gallery.blend.result import Progress, Report, ResultLayer, write_result
from reparam_diffusion.gallery.blend.sources import Opened, Source, base_for, require_one_prediction
from reparam_diffusion.models.load import Model
from reparam_diffusion.validation import explain


def blend_files(
    sources: Sequence[Source],
    out: Path,
    *,
    method: str = "sum",
    options: Options | None = None,
    form: Form | None = None,
    model: Model | str | None = None,
    precision: Precision = "fp16",
    title: str = "",
    lossless: bool = False,
) -> Iterator[Progress | Report]:
    """Blend adapters of any methods into one file; yields progress, then the report. Closing it early leaves no file.

    `model` is needed where a change depends on the base's weights (OFT, DoRA, (IA)³, GLoRA). The report's loss is
    measured against the change before the method or the form cut anything off; `lossless` writes that change.
    Raises UserError before any work when `out` is one of the sources, exists, or cannot be written.
    """
    require_new_file(out, sources=[source.file for source in sources])
    chosen, form = blend_method(method), form or Form()
    chosen.check(len(sources))
    options = options or chosen.options()
    files = [read_adapter(source.file) for source in sources]
    require_one_prediction(files)
    opened = Opened(sources, base_for(files, model), files)
    sites = opened.sites
    if not sites:
        raise UserError("There is nothing to blend.", "All strengths are 0.", "Raise one.")
    header = _header(opened, chosen, options, form, title or out.stem)
    yield from write_result(
        out,
        lambda: _layers(opened, chosen, options, lossless=lossless),
        count=len(sites),
        base=opened.base,
        form=form,
        precision=precision,
        header=header,
        left_out=tuple(opened.left_out),
        words=opened.words,
        notes=tuple(compare_headers([file.metadata for file in files])),
    )


def blended(opened: Opened, method: BlendMethod, options: Options) -> Iterator[tuple[str, Made]]:
    """The layers of a blend, one at a time."""
    for site in opened.sites:
        yield site, method.blend(opened.layers(site), options)


def _layers(opened: Opened, method: BlendMethod, options: Options, *, lossless: bool) -> Iterator[ResultLayer]:
    """The layers of a blend with what they should be if nothing were cut off."""
    for site in opened.sites:
        layers = opened.layers(site)
        if method.lossless is None:
            made = wanted = method.blend(layers, options)
        else:
            wanted = method.lossless(layers)
            made = wanted if lossless else method.blend(layers, options)
        yield ResultLayer(site, made, wanted)


def blend_method(name: str) -> BlendMethod:
    """A registered method. Raises UserError with the known ones."""
    if name not in BLENDS:
        raise unknown_name("merge method", name, BLENDS, place="method")
    return BLENDS[name]


def settle_options(method: str, values: Mapping[str, Any]) -> Options:
    """A method's options from plain values. Any: what a form or a command line gives. UserError names the option."""
    kind = blend_method(method).options
    try:
        return kind(**values)
    except ValidationError as error:
        at, message = explain(error)
        place = ".".join(map(str, at))
        known = ", ".join(kind.model_fields) or "none"
        raise UserError(f"{place} {message}.", f"The options of {method} are: {known}.", place=place) from None


def settle_form(values: Mapping[str, Any]) -> Form:
    """A form from plain values. Any: as above."""
    try:
        return Form(**values)
    except ValidationError as error:
        at, message = explain(error)
        place, told = ".".join(map(str, at)), message.removeprefix("is not possible: ")
        raise UserError(f"{place} {message}." if place else f"{told[0].upper()}{told[1:]}.", place=place) from None


def _header(opened: Opened, method: BlendMethod, options: Options, form: Form, title: str) -> dict[str, str]:
    """Sources with their hashes and strengths, triggers joined; nothing of the sources' pictures, captions or paths."""
    rows = [
        {"file": file.file.name, "sha256": digest, "strength": source.strength}
        | ({} if source.te_strength is None else {"te_strength": source.te_strength})
        | ({"blocks": dict(source.blocks)} if source.blocks else {})
        for source, file, digest in zip(opened.sources, opened.files, opened.hashes, strict=True)
    ]
    recipe = {"method": method.name, "options": options.model_dump(), "form": form.model_dump(exclude_defaults=True)}
    header = inherit_header([file.metadata for file in opened.files], opened.base.family) | named(title)
    header["modelspec.merged_from"] = ", ".join(f"{row['file']} ({row['strength']:g})" for row in rows)
    header["reparam_blend"] = json.dumps(recipe | {"sources": rows}, ensure_ascii=False)
    triggers = list(dict.fromkeys(file.trigger for file in opened.files if file.trigger))
    if triggers and (len(opened.files) > 1 or "modelspec.trigger_phrase" not in header):
        header["modelspec.trigger_phrase"] = header["ss_trigger_words"] = header["trigger_words"] = ", ".join(triggers)
    return header


def named(title: str) -> dict[str, str]:
    """A result's name, in the keys that A1111 and the managers show."""
    plain = title.lstrip("{") or "adapter"
    return {"ss_output_name": plain, "modelspec.title": plain, "ss_network_dim": "Dynamic", "ss_network_alpha": "None"}
