"""Writing a result layer by layer, with the error of every layer measured on what the file holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.adapters.foreign import read_forms
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.changes import change_of
from reparam_diffusion.formats.names import module_at
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import AdapterWriter, Precision
from reparam_diffusion.gallery.blend.forms import Form, form_name, in_form
from reparam_diffusion.gallery.blend.method import Made
from reparam_diffusion.gallery.blend.sources import Base
from reparam_diffusion.maths.change import Change, distance
from reparam_diffusion.maths.loss import describe_loss, kept_share
from reparam_diffusion.maths.lowrank import relative, share_ranks, svd
from reparam_diffusion.models.words import Word

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class ResultLayer:
    """A layer of a result: what is written, and the change that it is measured against, nothing cut off."""

    site: str
    made: Made
    wanted: Made


Layers = Callable[[], Iterator[ResultLayer]]
"""Makes a result's layers one after the other, from the start whenever it is called."""


@dataclass(frozen=True)
class Progress:
    """How far a long work has come."""

    done: int
    total: int
    what: str


@dataclass(frozen=True)
class LayerReport:
    """One layer of a result: its form, the size of the change that was wanted, and how far the file is from it."""

    site: str
    form: str
    norm: float
    error: float
    """‖written − wanted‖ / ‖wanted‖, rounding to the file's numbers included."""

    @property
    def kept(self) -> float:
        """The share of the layer's change that the file keeps, 0 to 1."""
        return kept_share(self.error)


@dataclass(frozen=True)
class Report:
    """A result: its file, every layer, and what of the sources was left out as (file, key, why)."""

    file: Path
    layers: tuple[LayerReport, ...]
    left_out: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = ()
    """What else a user should know, such as headers that contradict each other."""

    @property
    def error(self) -> float:
        """The relative error of all layers together."""
        wrong = math.sqrt(sum((row.error * row.norm) ** 2 for row in self.layers if row.norm))
        return relative(wrong, math.sqrt(sum(row.norm**2 for row in self.layers)))

    @property
    def kept(self) -> float:
        """The share of the whole change that the file keeps, 0 to 1: 1 − error²."""
        return kept_share(self.error)

    @property
    def loss(self) -> str:
        """In words, such as "keeps 22 % of the change (relative error 0.88)"."""
        return describe_loss(self.error)

    def worst(self, count: int = 5) -> list[LayerReport]:
        """The layers that lose most of the change."""
        return sorted(self.layers, key=lambda row: -row.error * row.norm)[:count]

    def header(self) -> str:
        """For the file's header: the two numbers as JSON."""
        return json.dumps({"kept": round(self.kept, 6), "relative_error": float(f"{self.error:.3g}")})

    def to_dict(self) -> dict[str, object]:
        """For JSON: totals and every layer."""
        rows = [
            {"layer": r.site, "form": r.form, "norm": r.norm, "error": r.error, "kept": r.kept} for r in self.layers
        ]
        left = [{"file": file, "key": key, "why": why} for file, key, why in self.left_out]
        size = self.file.stat().st_size if self.file.is_file() else 0
        told = {"error": self.error, "kept": self.kept, "loss": self.loss}
        return {
            "file": str(self.file),
            "bytes": size,
            **told,
            "layers": rows,
            "left_out": left,
            "notes": list(self.notes),
        }


def write_result(
    path: Path,
    layers: Layers,
    *,
    count: int,
    base: Base,
    form: Form,
    precision: Precision,
    header: Mapping[str, str],
    left_out: tuple[tuple[str, str, str], ...] = (),
    words: Sequence[Word] = (),
    notes: tuple[str, ...] = (),
) -> Iterator[Progress | Report]:
    """Write `count` layers in the wanted form; progress first, the report last. Closing the iterator leaves no file.

    Only the layer at hand is in memory. Ranks that are shared over the layers take a pass more. The file is opened once
    before the report is given. Raises UserError where not every layer is found in it again.
    """
    ranks: dict[str, int] = {}
    if form.shares_ranks:
        spectra: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for number, layer in enumerate(layers(), 1):
            site = layer.site
            yield Progress(number, 2 * count, f"looking at {site}")
            change = _as_change(layer.made, module_at(base.parts, site))
            if len(change.shape) > 1:
                spectra[site], shapes[site] = svd(change)[1], change.shape
        ranks = _shared_ranks(spectra, shapes, form, precision)
    before, total = (count, 2 * count) if form.shares_ranks else (0, count)
    rows: list[LayerReport] = []
    with AdapterWriter(path, parts=base.parts, family=base.family, precision=precision) as writer:
        for number, layer in enumerate(layers(), 1):
            module = module_at(base.parts, layer.site)
            adapter = in_form(layer.made, form, module, rank=ranks.get(layer.site))
            leaves = {} if adapter is None else writer.add(layer.site, adapter)
            rows.append(_report_on(layer, adapter, leaves, module))
            yield Progress(before + number, total, layer.site)
        writer.add_words(words)
        report = Report(path, tuple(rows), left_out, notes)
        writer.finish({**header, "reparam_loss": report.header()})
    open_once(path, base, [row.site for row in rows if row.form != form_name(None)])
    yield report


def open_once(path: Path, base: Base, sites: Sequence[str]) -> None:
    """Open a written file as any other. Raises UserError, and deletes it, where it does not hold these layers."""
    try:
        located, left = read_adapter(path).locate(base.parts)
        missing = [site for site in sites if site not in located] or [key for key, _ in left]
        why = f"{len(missing)} of its layers are not read again, the first is {missing[0]}." if missing else ""
    except UserError as error:
        why = str(error)
    if why:
        path.unlink(missing_ok=True)
        raise UserError(f"{path.name} was written but cannot be opened.", why, "This is a bug; please file an issue.")


def _shared_ranks(
    spectra: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]], form: Form, precision: Precision
) -> dict[str, int]:
    """Ranks by layer for a file's size, or for an average rank."""
    if form.kind == "adalora":
        spectra = {site: values[values > 0] for site, values in spectra.items()}
        return share_ranks(spectra, dict.fromkeys(spectra, 1), form.rank * len(spectra))
    copies = 2 if form.kind == "loha" else 1
    costs = {site: copies * (shape[0] + math.prod(shape[1:])) for site, shape in shapes.items()}
    spare = 600 * len(shapes) + 4000  # names, alphas and the header
    budget = int((form.megabytes * 1e6 - spare) / _BYTES[precision])
    ranks = share_ranks(spectra, costs, max(budget, 0))
    if not any(ranks.values()):
        raise UserError(
            f"{form.megabytes:g} MB is too small for this adapter.",
            f"One rank of its cheapest layer and the header take {(spare + 2 * min(costs.values())) / 1e6:.2f} MB.",
            "Allow a larger file.",
            place="form.megabytes",
        )
    return {site: min(rank, form.rank) if form.rank else rank for site, rank in ranks.items()}


@torch.no_grad()
def _report_on(
    layer: ResultLayer, adapter: Adapter | None, leaves: Mapping[str, Tensor], module: nn.Module
) -> LayerReport:
    wanted = _as_change(layer.wanted, module)
    norm = wanted.norm()
    if not leaves:
        return LayerReport(layer.site, form_name(None), norm, relative(norm, norm))
    written = change_of(read_forms(leaves, wanted.shape), module)
    return LayerReport(layer.site, form_name(adapter), norm, relative(distance(written, wanted), norm))


def _as_change(made: Made, module: nn.Module) -> Change:
    return made if isinstance(made, Change) else change_of(made, module)


def finished(steps: Iterator[Progress | Report]) -> Report:
    """Run a work to its end and return the report."""
    report: Report | None = None
    for step in steps:
        if isinstance(step, Report):
            report = step
    assert report is not None
    return report
