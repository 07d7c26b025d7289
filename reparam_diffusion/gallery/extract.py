"""An adapter from a fine-tuned model: Δ = W_tuned − W_base, in any form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from reparam_diffusion.adapters.base import Host
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.header import family_keys
from reparam_diffusion.formats.names import CARRIERS, module_at
from reparam_diffusion.formats.write import Precision
from reparam_diffusion.gallery.blend.blending import named
from reparam_diffusion.gallery.blend.forms import Form
from reparam_diffusion.gallery.blend.result import Progress, Report, write_result
from reparam_diffusion.gallery.blend.sources import Base
from reparam_diffusion.maths.change import Change
from reparam_diffusion.models.load import Model


def extract(
    tuned: Model,
    base: Model,
    out: Path,
    *,
    form: Form,
    precision: Precision = "fp16",
    least: float = 0.0,
    title: str = "",
) -> Iterator[Progress | Report]:
    """Write what fine-tuning changed in the UNet and the text encoders; yields progress, then the report.

    Layers that changed by no more than `least` of their size are left out: a model saved in fp16 differs everywhere by
    about 3e-4. Norm layers and biases go into the forms that hold whole differences; else they are told as left out.
    """
    found = changed_sites(tuned, base, least=least)
    keeps_all = form.kind in ("exact", "diff")
    layers = [site for site, what in found if keeps_all or what == "layer"]
    if not layers:
        raise UserError("There is nothing to extract.", f"{tuned.name} has the weights of {base.name}.")
    left = tuple(
        (tuned.name, site, f"its {what} changed, which only exact and diff hold")
        for site, what in found
        if what != "layer" and not keeps_all
    )
    header = family_keys(base.family, is_v_prediction=base.prediction_type == "v_prediction") | named(title or out.stem)
    header |= {"ss_sd_model_name": base.name, "modelspec.merged_from": f"{tuned.name} - {base.name}"}

    def changes() -> Iterator[tuple[str, Change]]:
        for site in dict.fromkeys(layers):
            yield site, _change(tuned, base, site, with_bias=keeps_all)

    yield from write_result(
        out,
        changes,
        count=len(dict.fromkeys(layers)),
        base=Base(base.parts, base.family, base.name),
        form=form,
        precision=precision,
        header=header,
        left_out=left,
    )


def changed_sites(tuned: Model, base: Model, *, least: float) -> list[tuple[str, str]]:
    """(site, "layer", "norm" or "bias") of everything that differs. Raises UserError for another architecture."""
    found = []
    for part, model in base.parts.items():
        for path, module in model.named_modules():
            if not isinstance(module, CARRIERS):
                continue
            site, ours = f"{part}.{path}", Host(module)
            theirs = _twin(tuned, site, ours)
            if _differs(theirs.weight, ours.weight, least):
                found.append((site, "norm" if ours.kind == "norm" else "layer"))
            if ours.bias is not None and theirs.bias is not None and _differs(theirs.bias, ours.bias, least):
                found.append((site, "bias"))
    return found


def _twin(tuned: Model, site: str, ours: Host) -> Host:
    """The tuned model's own layer at a site of the base."""
    try:
        theirs = Host(module_at(tuned.parts, site))
    except (KeyError, AttributeError, TypeError):
        theirs = None
    if theirs is None or theirs.weight.shape != ours.weight.shape or (theirs.bias is None) != (ours.bias is None):
        raise UserError(
            f"{tuned.name} is not built like its base.", f"They differ at {site}.", "Name the base it was tuned from."
        )
    return theirs


@torch.no_grad()
def _differs(left: Tensor, right: Tensor, least: float) -> bool:
    off = (left.float() - right.float()).norm()
    return bool(off > least * right.float().norm())


@torch.no_grad()
def _change(tuned: Model, base: Model, site: str, *, with_bias: bool) -> Change:
    ours, theirs = Host(module_at(base.parts, site)), Host(module_at(tuned.parts, site))
    whole = theirs.weight.float().cpu() - ours.weight.float().cpu()
    bias = None
    if with_bias and ours.bias is not None and theirs.bias is not None:
        moved = theirs.bias.float().cpu() - ours.bias.float().cpu()
        bias = moved if bool(moved.any()) else None
    return Change(tuple(whole.shape), whole=whole, bias=bias)
