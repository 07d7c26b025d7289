"""Writing PEFT folders, one for each model part, and diffusers' single file for LoRA.

PEFT derives shapes from its configuration, so each method must find one that gives every layer its own shapes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from reparam_diffusion.adapters.adalora import Adalora
from reparam_diffusion.adapters.base import Adapter, norm_over
from reparam_diffusion.adapters.loha import Loha
from reparam_diffusion.adapters.lokr import Lokr
from reparam_diffusion.adapters.lora import Lora
from reparam_diffusion.adapters.oft import Oft
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import write_whole
from reparam_diffusion.formats.load import FOLDERS
from reparam_diffusion.formats.names import Parts, module_at
from reparam_diffusion.formats.peft_shapes import common_block_size, common_factor
from reparam_diffusion.formats.write import Precision, cast_leaf, share_alpha

Leaves = dict[str, Tensor]
Config = dict[str, Any]  # Any: what becomes a JSON object
_FOLDER_OF = {part: folder for folder, part in FOLDERS.items()}


def write_peft(
    folder: Path | str, adapters: Mapping[str, Adapter], *, parts: Parts, precision: Precision = "fp32"
) -> Path:
    """Write unet/, text_encoder/ and text_encoder_2/ inside `folder`, each for `PeftModel.from_pretrained`.

    Raises UserError for what PEFT cannot express: output-side OFT, foreign forms, mixed methods in a part.
    """
    folder = Path(folder)
    by_part: dict[str, dict[str, Adapter]] = {}
    for site, adapter in adapters.items():
        by_part.setdefault(site.partition(".")[0], {})[site] = adapter
    contents = {part: _part(sites, parts) for part, sites in by_part.items()}  # all or nothing
    if not any(rows for rows, _ in contents.values()):
        raise UserError("There is nothing to write.", "No layer has anything left to change.", "Train for longer.")
    stale = [name for part, name in _FOLDER_OF.items() if part not in contents and (folder / name).exists()]
    if stale:
        raise UserError(
            f"{folder} holds another adapter.",
            f"Its {stale[0]} would be read together with this one.",
            "Choose an empty folder.",
        )
    for part, (rows, config) in contents.items():
        if not rows:
            continue
        tensors = {
            f"base_model.model.{site.partition('.')[2]}.{leaf}": cast_leaf(tensor, leaf, site, precision)
            for site, leaves in rows.items()
            for leaf, tensor in leaves.items()
        }
        place = folder / _FOLDER_OF[part]
        write_whole(place / "adapter_model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
        write_whole(place / "adapter_config.json", json.dumps(config, indent=2).encode())
    return folder


def write_diffusers(
    path: Path | str, adapters: Mapping[str, Adapter], *, parts: Parts, precision: Precision = "fp32"
) -> Path:
    """Write one file for `load_lora_weights`, such as pytorch_lora_weights.safetensors. LoRA and AdaLoRA only."""
    rows = _lora_rows(adapters, parts)
    tensors: Leaves = {}
    told: dict[str, object] = {}
    for part in sorted({site.partition(".")[0] for site in rows}):
        own = {site: leaves for site, leaves in rows.items() if site.startswith(f"{part}.")}
        for key, value in _diffusers_config(part, own).items():
            told[f"{_FOLDER_OF[part]}.{key}"] = value
        for site, leaves in own.items():
            path_in_file = site.partition(".")[2]
            if part != "unet":  # the names of transformers before 5.6, which every diffusers reads
                path_in_file = f"text_model.{path_in_file.removeprefix('text_model.')}"
            for leaf, tensor in _peft_lora(leaves).items():
                if part != "unet" and leaf == "lora_magnitude_vector":
                    leaf = "lora_magnitude_vector.weight"
                key = f"{_FOLDER_OF[part]}.{path_in_file}.{leaf}"
                tensors[key] = cast_leaf(tensor, leaf, site, precision)
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(told)}
    return write_whole(Path(path), safetensors.torch.save(tensors, header))


def _part(adapters: Mapping[str, Adapter], parts: Parts) -> tuple[dict[str, Leaves], Config]:
    """PEFT's tensors and configuration for one model part."""
    kinds = {Lora if isinstance(adapter, Adalora) else type(adapter) for adapter in adapters.values()}
    if len(kinds) > 1:
        raise UserError(
            "PEFT holds one method in a folder.",
            "This adapter uses different methods for different layers.",
            "Export it as a LyCORIS file.",
        )
    kind = kinds.pop()
    if kind is Lora:
        rows = _lora_rows(adapters, parts)
        return {site: _peft_lora(leaves) for site, leaves in rows.items()}, _lora_config(rows)
    if kind is Loha:
        return _loha({site: a for site, a in adapters.items() if isinstance(a, Loha)})
    if kind is Lokr:
        return _lokr({site: a for site, a in adapters.items() if isinstance(a, Lokr)})
    if kind is Oft:
        return _oft({site: a for site, a in adapters.items() if isinstance(a, Oft)})
    raise UserError("PEFT has no form for this kind of adapter.", do="Export it as a LyCORIS file.")


def _lora_rows(adapters: Mapping[str, Adapter], parts: Parts) -> dict[str, Leaves]:
    """LyCORIS leaves of LoRA and AdaLoRA sites with one alpha; all with dora_scale when any has it."""
    rows: dict[str, Leaves] = {}
    for site, adapter in adapters.items():
        if not isinstance(adapter, Lora | Adalora):
            raise UserError(
                f"{site} is no LoRA.", "diffusers opens nothing else.", "Export it as a LyCORIS file, or as PEFT."
            )
        leaves = adapter.tensors()
        if leaves:
            rows[site] = leaves
    share_alpha(rows)
    if any("dora_scale" in leaves for leaves in rows.values()):
        for site, leaves in rows.items():
            leaves["dora_scale"] = _output_magnitude(site, adapters[site], parts)
    return rows


def _output_magnitude(site: str, adapter: Adapter, parts: Parts) -> Tensor:
    """DoRA's magnitude per output; for a layer without DoRA the norms it has, which change nothing."""
    weight = module_at(parts, site).weight
    assert isinstance(weight, Tensor)
    output = torch.Size((weight.shape[0], *[1] * (weight.ndim - 1)))
    if adapter.magnitude is None:
        with torch.no_grad():
            weight = weight.to(next(adapter.parameters()).device).float()
            return norm_over(weight + adapter.delta(weight), output)
    if adapter.magnitude.shape != output:
        raise UserError(
            f"{site} has weight decomposition along its inputs.",
            "PEFT only knows it along the outputs.",
            "Export it as a LyCORIS file.",
        )
    return adapter.magnitude.detach()


def _peft_lora(leaves: Leaves) -> Leaves:
    rows = {"lora_A.weight": leaves["lora_down.weight"], "lora_B.weight": leaves["lora_up.weight"]}
    if "dora_scale" in leaves:
        scale = leaves["dora_scale"].flatten()
        is_linear = leaves["lora_up.weight"].ndim == 2
        rows["lora_magnitude_vector"] = scale if is_linear else scale.reshape(1, -1, 1, 1)
    return rows


def _lora_config(rows: Mapping[str, Leaves]) -> Config:
    ranks = {_path(site): leaves["lora_down.weight"].shape[0] for site, leaves in rows.items()}
    alphas = {float(leaves["alpha"]) for leaves in rows.values()} or {1.0}
    return _config(
        "LORA",
        ranks,
        lora_alpha=_plain(alphas.pop()),
        lora_dropout=0.0,
        use_dora=any("dora_scale" in leaves for leaves in rows.values()),
        use_rslora=False,
        bias="none",
    )


def _diffusers_config(part: str, rows: Mapping[str, Leaves]) -> Config:
    """The least that diffusers needs. Text encoder names fit with and without text_model."""
    config = _lora_config(rows)
    kept = {key: config[key] for key in ("r", "lora_alpha", "rank_pattern", "use_dora")}
    if part == "unet":
        return kept | {"target_modules": config["target_modules"]}
    bare = [path.removeprefix("text_model.") for path in config["target_modules"]]
    kept["rank_pattern"] = {path.removeprefix("text_model."): rank for path, rank in kept["rank_pattern"].items()}
    return kept | {"target_modules": rf"(text_model\.)?({'|'.join(re.escape(path) for path in bare)})"}


def _loha(adapters: Mapping[str, Loha]) -> tuple[dict[str, Leaves], Config]:
    rows = {site: _without_alpha(adapter.tensors()) for site, adapter in adapters.items()}
    _refuse_dora(rows)
    ranks = {_path(site): adapter.plan.rank for site, adapter in adapters.items()}
    alphas = {_path(site): adapter.plan.alpha for site, adapter in adapters.items()}
    return rows, _config("LOHA", ranks, **_alpha(alphas), use_effective_conv2d=False)


def _lokr(adapters: Mapping[str, Lokr]) -> tuple[dict[str, Leaves], Config]:
    """PEFT keeps M whole when the rank is at least half its larger side, and scales it all the same: r = alpha then."""
    rows: dict[str, Leaves] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    splits = {site: (*a.shape[:2], a.plan.out_small, a.plan.in_small) for site, a in adapters.items()}
    factor = common_factor(splits)
    for site, adapter in adapters.items():
        if adapter.magnitude is not None:
            _refuse_dora({site: {"dora_scale": adapter.magnitude}})
        plan, path = adapter.plan, _path(site)
        k, n = adapter.shape[0] // plan.out_small, adapter.shape[1] // plan.in_small
        small = adapter.small_factor().detach() * plan.scale
        if plan.rank_large and plan.rank_large < max(k, n) / 2:
            leaves = adapter.tensors()
            rows[site] = {"lokr_w2_a": leaves["lokr_w2_a"], "lokr_w2_b": leaves["lokr_w2_b"]}
            ranks[path] = plan.rank_large
        else:
            rows[site] = {"lokr_w2": adapter.large_factor().detach()}
            ranks[path] = max(k, n)
        alphas[path] = float(ranks[path])  # a scale of 1: ours is in the small factor
        rows[site]["lokr_w1"] = small
    config = _config("LOKR", ranks, **_alpha(alphas), decompose_both=False, decompose_factor=factor)
    return rows, config | {"use_effective_conv2d": False}


def _oft(adapters: Mapping[str, Oft]) -> tuple[dict[str, Leaves], Config]:
    for site, adapter in adapters.items():
        spatial = any(length != 1 for length in adapter.shape[2:])
        groups = adapter.plan.blocks * adapter.plan.block_size != adapter.shape[1]
        if adapter.plan.side != "input" or spatial or groups or adapter.magnitude is not None:
            why = "It rotates outputs." if adapter.plan.side != "input" else "PEFT's OFT is wrong for 3x3 convolutions."
            raise UserError(
                f"{site} cannot be written for PEFT.", why, "Export it as a LyCORIS file, or as differences."
            )
    size = common_block_size({site: (a.shape[1], a.plan.block_size) for site, a in adapters.items()})
    config = _config("OFT", {_path(site): 0 for site in adapters}, oft_block_size=size, module_dropout=0.0)
    config |= {"coft": False, "block_share": False, "use_cayley_neumann": False, "bias": "none"}
    del config["rank_pattern"]
    return {site: adapter.tensors() for site, adapter in adapters.items()}, config


def _config(kind: str, ranks: Mapping[str, int], **more: object) -> Config:
    """A configuration that names the layers in full; `ranks` by path."""
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 0
    return {
        "peft_type": kind,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "target_modules": sorted(ranks),
        "r": rank,
        "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
        **more,
    }


def _alpha(alphas: Mapping[str, float]) -> dict[str, object]:
    common = Counter(alphas.values()).most_common(1)[0][0]
    pattern = {path: _plain(own) for path, own in alphas.items() if own != common}
    return {"alpha": _plain(common), "alpha_pattern": pattern}


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _path(site: str) -> str:
    return site.partition(".")[2]


def _without_alpha(leaves: Leaves) -> Leaves:
    return {leaf: tensor for leaf, tensor in leaves.items() if leaf != "alpha"}


def _refuse_dora(rows: Mapping[str, Leaves]) -> None:
    for site, leaves in rows.items():
        if "dora_scale" in leaves:
            raise UserError(
                f"{site} has weight decomposition.",
                "PEFT knows it for LoRA only.",
                "Export it as a LyCORIS file.",
            )
