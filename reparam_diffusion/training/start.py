"""Training on from an adapter: its tensors and its sizes at every layer it has, fresh ones at the others."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from reparam_diffusion.adapters.base import METHODS, Adapter, Plan, trained_on
from reparam_diffusion.config import TrainConfig
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import beside, folder_beside
from reparam_diffusion.formats.container import data_hash
from reparam_diffusion.formats.names import Parts, module_at
from reparam_diffusion.formats.read import Site, read_adapter
from reparam_diffusion.maths.chance import generator
from reparam_diffusion.targets import SitePlan

PLACE = "training.start_from"
_COPY = "start"


def keep_start(config: TrainConfig, folder: Path, *, is_main: bool) -> Path | None:
    """The adapter that a run starts from, as it was at its Start: a copy of it is kept in the run's folder.

    None for a run that starts afresh. Raises UserError when it is not there.
    """
    if not config.training.start_from:
        return None
    source = Path(config.training.start_from).expanduser()
    copy = folder / (_COPY if source.is_dir() else f"{_COPY}.safetensors")
    for known in (folder / _COPY, folder / f"{_COPY}.safetensors"):
        if known.exists():
            return known
    if not source.exists():
        raise UserError(f"There is no adapter at {source}.", do="Check the path.", place=PLACE)
    if not is_main:
        return source
    if source.is_dir():
        with folder_beside(copy) as hidden:
            shutil.copytree(source, hidden, dirs_exist_ok=True)
    else:
        with beside(copy) as hidden:
            shutil.copyfile(source, hidden)
    return copy


def started_from(config: TrainConfig, folder: Path) -> str:
    """What a header tells of it: "teddy.safetensors 3f2a…", its file's name and the hash of its tensors."""
    copy = folder / f"{_COPY}.safetensors"
    name = Path(config.training.start_from).name
    return f"{name} {data_hash(copy)}" if copy.is_file() else name


def started(file: Path, parts: Parts, sites: Sequence[SitePlan], *, seed: int) -> dict[str, tuple[SitePlan, Adapter]]:
    """What a run trains on from, by site: the plan as the file's sizes have it, and the adapter.

    Raises UserError for layers of another method, and for layers that the model lacks or the run does not train.
    """
    located, left = read_adapter(file).locate(parts)
    if left:
        key, why = left[0]
        raise UserError(
            "The adapter to train on from does not fit this base model.",
            f"{len(left)} of its keys have no place, such as {key}: {why}.",
            "Choose the base model it was made for, or convert it first.",
            place=PLACE,
        )
    planned = {site.site: site for site in sites}
    found = {}
    for site in located:
        if site not in planned:
            raise UserError(
                "The adapter to train on from has layers that this run does not train.",
                f"The first is {site}.",
                "Widen the targets so that they name it.",
                place="targets.unet" if site.startswith("unet.") else "targets.text_encoder",
            )
        adapter = _adapter_at(site, located[site], parts, planned[site], seed=seed)
        plan = _noted(adapter.plan, planned[site].plan)
        found[site] = (replace(planned[site], plan=plan), adapter)
    return found


def _adapter_at(site: str, found: Site, parts: Parts, planned: SitePlan, *, seed: int) -> Adapter:
    """The file's adapter at one site, ready to be trained by the site's method."""
    method = METHODS[planned.method]
    try:
        read = found.adapter(module_at(parts, site))
    except ValueError as error:
        raise UserError("The adapter to train on from is damaged.", f"{site}: {error}.", place=PLACE) from None
    try:
        return trained_on(method, planned.plan, read, generator(seed, "init", site))
    except ValueError as error:
        raise UserError(
            f"The adapter to train on from is no {method.title}.",
            f"The first other layer is {site}: {error}.",
            f"Choose its own method, or turn it into {method.title} with `convert`.",
            place=PLACE,
        ) from None


def _noted(plan: Plan, wanted: Plan) -> Plan:
    """The plan with a note of what the file decided against the settings."""
    mine, theirs = asdict(plan), asdict(wanted)
    other = [name for name in mine if name != "note" and mine[name] != theirs[name]]
    if not other:
        return plan
    words = ", ".join(f"{name.replace('_', ' ')} {_shown(mine[name])}, not {_shown(theirs[name])}" for name in other)
    return replace(plan, **{"note": f"as in the adapter it starts from: {words}"})


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
