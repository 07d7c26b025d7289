"""What a result says that it keeps, against the dense sums of every pair of methods in every form."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from test_blend_laws import SPECS, changes, files, parts, tiny_model  # noqa: F401  (two fixtures)

from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.gallery.blend.blending import blend_files, settle_form, settle_options
from reparam_diffusion.gallery.blend.result import Report, finished
from reparam_diffusion.gallery.blend.sources import Source
from reparam_diffusion.maths.loss import describe_loss, kept_share

PAIRS = list(itertools.combinations_with_replacement(SPECS, 2))
FORMS = [
    ("sum", {}, {"kind": "exact"}),
    ("sum", {}, {"kind": "diff"}),
    ("sum", {}, {"kind": "lora", "rank": 2}),
    ("sum", {}, {"kind": "lora", "energy": 0.5}),
    ("sum", {}, {"kind": "adalora", "rank": 2}),
    ("sum", {}, {"kind": "loha", "rank": 2}),
    ("sum", {}, {"kind": "lokr", "factor": 4}),
    ("sum", {}, {"kind": "oft", "block_size": 4}),
    ("concat", {}, {"kind": "lora", "rank": 2}),
    ("svd", {"rank": 4}, {"kind": "exact"}),
    ("svd", {"rank": 4}, {"kind": "lora", "rank": 2}),
    ("svd", {"rank": 4}, {"kind": "diff"}),
    ("prune", {"density": 0.3}, {"kind": "exact"}),
    ("dare", {"drop": 0.5}, {"kind": "exact"}),
]
STRENGTHS = (0.8, 0.6)


def dense_error(model_parts: dict, sources: list[Source], out: Path) -> tuple[float, float]:
    """(relative error, cosine) of a file against the dense sum of its sources, over all layers."""
    exact: dict[str, torch.Tensor] = {}
    for source in sources:
        for site, change in changes(model_parts, source.file, source.strength).items():
            exact[site] = exact.get(site, 0) + change.double()
    written = changes(model_parts, out)
    wrong = size = dot = own = 0.0
    for site, wanted in exact.items():
        there = written[site].double() if site in written else torch.zeros_like(wanted)
        wrong += float((there - wanted).square().sum())
        size += float(wanted.square().sum())
        own += float(there.square().sum())
        dot += float((there * wanted).sum())
    return math.sqrt(wrong / size), dot / math.sqrt(own * size)


@pytest.mark.parametrize(("method", "options", "form"), FORMS, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_every_loss_is_measured_against_the_untruncated_sum(  # noqa: PLR0917  (fixtures and cases)
    pair: tuple[str, str],
    method: str,
    options: dict,
    form: dict,
    parts: dict,  # noqa: F811
    files: dict,  # noqa: F811
    tmp_path: Path,
) -> None:
    sources = [Source(files[name], strength) for name, strength in zip(pair, STRENGTHS, strict=True)]
    out = tmp_path / "out.safetensors"
    more = {"method": method, "options": settle_options(method, options), "model": tiny_model(parts)}
    report = finished(blend_files(sources, out, form=settle_form(form), precision="fp32", **more))
    error, cosine = dense_error(parts, sources, out)
    assert report.error == pytest.approx(error, rel=1e-3, abs=2e-6)
    assert report.kept == pytest.approx(max(0.0, 1 - error**2), abs=1e-4)
    if method == "svd" and form["kind"] != "lora":
        assert report.kept == pytest.approx(cosine**2, abs=1e-3), "the nearest one keeps the cosine's square"
    told = report.to_dict()
    assert told["kept"] == report.kept and told["loss"] == describe_loss(report.error)
    header = json.loads(read_adapter(out).metadata["reparam_loss"])
    assert header["kept"] == pytest.approx(report.kept, abs=1e-6)
    assert header["relative_error"] == pytest.approx(report.error, rel=1e-2, abs=1e-9)


@pytest.mark.parametrize("method", ["svd", "prune", "dare"])
def test_the_lossless_result_is_the_sum(method: str, parts: dict, files: dict, tmp_path: Path) -> None:  # noqa: F811
    sources = [Source(files["oft"], 0.8), Source(files["lokr"], 0.6)]
    out = tmp_path / "out.safetensors"
    steps = blend_files(sources, out, method=method, model=tiny_model(parts), precision="fp32", lossless=True)
    report: Report = finished(steps)
    assert dense_error(parts, sources, out)[0] < 1e-5 > report.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (0.0, "keeps all of the change, exactly"),
        (2.9e-4, "keeps all of the change, up to rounding (relative error 0.00029)"),
        (0.01, "keeps more than 99.9 % of the change"),
        (0.05, "keeps 99.8 % of the change"),
        (0.883, "keeps 22 % of the change (relative error 0.88)"),
        (0.99999, "keeps less than 0.1 % of the change"),
        (1.0, "keeps nothing of the change"),
        (1.7, "keeps nothing of the change (relative error 1.7)"),
        (math.inf, "keeps nothing of the change (relative error inf)"),
    ],
)
def test_losses_in_words(error: float, words: str) -> None:
    assert describe_loss(error).startswith(words)
    assert 0.0 <= kept_share(error) <= 1.0
