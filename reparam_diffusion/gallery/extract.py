"""An adapter from a fine-tuned model: Δ = W_tuned − W_base, in any form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reparam_diffusion.adapters.base import Host
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import require_new_file
from reparam_diffusion.formats.header import family_keys
from reparam_diffusion.formats.names import CARRIERS, module_at
from reparam_diffusion.formats.write import Precision
from reparam_diffusion.gallery.blend.blending import named
from reparam_diffusion.gallery.blend.forms import Form
from reparam_diffusion.gallery.blend.result import Progress, Report, ResultLayer, write_result
from reparam_diffusion.gallery.blend.sources import Base
from reparam_diffusion.maths.change import Change, nothing
from reparam_diffusion.models.finite import require_weights
from reparam_diffusion.models.load import Model


@dataclass(frozen=True)
class Moved:
    """A layer's weight ("layer" or "norm") or its bias ("bias") that differs, and by what share of its size."""

    site: str
    what: str
    share: float


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
    about 3e-4. Norm layers and biases go into the forms that hold whole differences; else they are listed as left out.
    The report's loss is measured against everything that changed in these layers. Raises UserError before any work
    where `out` exists or cannot be written, and for weights that are NaN or infinity.
    """
    require_new_file(out)
    for model in (tuned, base):
        require_weights(model)
    found = find_moved(tuned, base)
    keeps_all = form.kind in ("exact", "diff")
    written = {moved.site for moved in found if moved.share > least and (keeps_all or moved.what == "layer")}
    left = tuple(
        (tuned.name, moved.site, f"its {moved.what} changed, which only exact and diff hold")
        for moved in found
        if moved.share > least and moved.what != "layer" and not keeps_all
    ) + tuple(_without_place(tuned, base))
    if not written:
        why = left[0][2] if left else f"{tuned.name} has the weights of {base.name}"
        raise UserError("There is nothing to extract.", f"{why[0].upper()}{why[1:]}.")
    sites = list(dict.fromkeys(moved.site for moved in found))

    def layers() -> Iterator[ResultLayer]:
        for site in sites:
            wanted = _change(tuned, base, site, with_bias=True)
            if site not in written:
                yield ResultLayer(site, nothing(wanted.shape), wanted)
            else:
                yield ResultLayer(site, _change(tuned, base, site, with_bias=keeps_all), wanted)

    yield from write_result(
        out,
        layers,
        count=len(sites),
        base=Base(base.parts, base.family, base.name),
        form=form,
        precision=precision,
        header=_header(tuned, base, title or out.stem),
        left_out=left,
        notes=tuple(_notes(tuned, base, found, least)),
    )


def _header(tuned: Model, base: Model, title: str) -> dict[str, str]:
    """The tuned model's own kind: what it predicts, its size, and whether its noise ends in pure noise."""
    is_v = tuned.prediction_type == "v_prediction"
    header = family_keys(base.family, is_v_prediction=is_v) | named(title)
    header |= {"ss_sd_model_name": base.name, "modelspec.merged_from": f"{tuned.name} - {base.name}"}
    header |= {"modelspec.prediction_type": "v" if is_v else "epsilon"}
    header |= {"modelspec.resolution": f"{tuned.size}x{tuned.size}"}
    if tuned.scheduler.config.get("rescale_betas_zero_snr"):
        header["ss_zero_terminal_snr"] = "True"
    return header


def _notes(tuned: Model, base: Model, found: Sequence[Moved], least: float) -> Iterator[str]:
    small = len({moved.site for moved in found if moved.share <= least})
    if small:
        yield f"{small} layers that changed by no more than {least:g} of their size are left out."
    if tuned.prediction_type != base.prediction_type:
        yield f"{tuned.name} predicts {tuned.prediction_type}, {base.name} {base.prediction_type}."


def _without_place(tuned: Model, base: Model) -> Iterator[tuple[str, str, str]]:
    """What differs and has no place in an adapter: embedding tables, and the VAE."""
    for part, model in base.parts.items():
        theirs = tuned.parts[part].state_dict()
        for path, module in model.named_modules():
            if isinstance(module, CARRIERS):
                continue
            for name, ours in module.named_parameters(path, recurse=False):
                if name in theirs and _share(theirs[name], ours) > 0:
                    yield tuned.name, f"{part}.{name}", "it changed, and an adapter has no place for it"
    ours = {} if base.vae is None else base.vae.state_dict()
    theirs = {} if tuned.vae is None else tuned.vae.state_dict()
    if any(name in theirs and _share(theirs[name], tensor) > 0 for name, tensor in ours.items()):
        yield tuned.name, "vae", "it has another VAE, and an adapter has no place for it"


def find_moved(tuned: Model, base: Model) -> list[Moved]:
    """Everything that differs in layers that an adapter can change. Raises UserError for another architecture."""
    found = []
    for part, model in base.parts.items():
        for path, module in model.named_modules():
            if not isinstance(module, CARRIERS):
                continue
            site, ours = f"{part}.{path}", Host(module)
            theirs = _twin(tuned, site, ours)
            if share := _share(theirs.weight, ours.weight):
                found.append(Moved(site, "norm" if ours.kind == "norm" else "layer", share))
            if ours.bias is not None and theirs.bias is not None and (share := _share(theirs.bias, ours.bias)):
                found.append(Moved(site, "bias", share))
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
def _share(left: Tensor, right: Tensor) -> float:
    """‖left − right‖ / ‖right‖; infinite where something differs from 0, or in shape."""
    if left.shape != right.shape:
        return float("inf")
    off, size = float((left.float() - right.float()).norm()), float(right.float().norm())
    return off / size if size else (float("inf") if off else 0.0)


@torch.no_grad()
def _change(tuned: Model, base: Model, site: str, *, with_bias: bool) -> Change:
    ours, theirs = Host(module_at(base.parts, site)), Host(module_at(tuned.parts, site))
    whole = theirs.weight.float().cpu() - ours.weight.float().cpu()
    bias = None
    if with_bias and ours.bias is not None and theirs.bias is not None:
        moved = theirs.bias.float().cpu() - ours.bias.float().cpu()
        bias = moved if bool(moved.any()) else None
    return Change(tuple(whole.shape), whole=whole, bias=bias)
