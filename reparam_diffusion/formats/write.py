"""Writing adapters as LyCORIS and kohya name them, so that A1111, ComfyUI, kohya, LyCORIS and diffusers open them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import write_whole
from reparam_diffusion.formats.header import family_keys, hashes
from reparam_diffusion.formats.names import Family, Parts, kohya_key, layout_of
from reparam_diffusion.formats.read import PADDING

Precision = Literal["fp32", "fp16", "bf16"]
Leaves = dict[str, Tensor]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_OURS_ONLY = ("oft_R.weight", "oft_R_channels.weight")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def write_adapter(
    path: Path | str,
    adapters: Mapping[str, Adapter],
    *,
    parts: Parts,
    family: Family,
    precision: Precision = "fp16",
    metadata: Mapping[str, str] | None = None,
    as_diff: bool = False,
) -> Path:
    """Write adapters by live site into one .safetensors file, whole or not at all.

    Forms that we only read are written as the whole difference they make, exact. OFT on the input side keeps its own
    tensors, which this library reads; `as_diff` writes it, too, as whole differences, large but read by every program.
    Raises UserError for values that the precision cannot hold, and when the disk is full.
    """
    layout = layout_of(parts)
    rows: dict[str, Leaves] = {}
    for site, adapter in adapters.items():
        leaves = leaves_of(adapter, module_at(parts, site), as_diff=as_diff)
        if leaves:  # an AdaLoRA site may have lost all its ranks
            rows[site] = leaves
    if not rows:
        raise UserError("There is nothing to write.", "No layer has anything left to change.", "Train for longer.")
    share_alpha(rows)
    padding = _padding(rows, parts)
    keys = {site: kohya_key(site, family=family, layout=layout) for site in [*rows, *padding]}
    tensors = {
        f"{keys[site]}.{leaf}": cast_leaf(tensor, leaf, site, precision)
        for site, leaves in (rows | padding).items()
        for leaf, tensor in sorted(leaves.items())
    }
    header = {"format": "pt", **family_keys(family), "ss_network_module": _network_module(rows), **(metadata or {})}
    if padding:
        header[PADDING] = json.dumps([keys[site] for site in padding])
    header |= hashes(tensors, header)
    return write_whole(Path(path), safetensors.torch.save(tensors, header))


def is_own(adapter: Adapter) -> bool:
    """Whether an adapter is of a method that we train, and so has tensors of its own to write."""
    return any(type(adapter) is method.adapter for method in METHODS.values())


def leaves_of(adapter: Adapter, module: nn.Module, *, as_diff: bool) -> Leaves:
    """What a file holds for one adapter: its own tensors, or ΔW and Δb whole."""
    if is_own(adapter):
        leaves = adapter.tensors()
        if not (as_diff and any(leaf in leaves for leaf in _OURS_ONLY)):
            return leaves
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    with torch.no_grad():
        change = adapter.delta(weight.detach().to(_device_of(adapter))).cpu()
        added = adapter.delta_bias(None if bias is None else bias.detach().to(_device_of(adapter)))
    is_norm = isinstance(module, nn.LayerNorm | nn.GroupNorm)
    leaves = {"w_norm" if is_norm else "diff": change}
    if is_norm:  # A1111 needs both
        leaves["b_norm"] = torch.zeros_like(change) if added is None else added.detach().cpu()
    elif added is not None:
        leaves["diff_b"] = added.detach().cpu()
    return leaves


def _device_of(adapter: Adapter) -> torch.device:
    tensors = [*adapter.parameters(), *adapter.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def share_alpha(rows: Mapping[str, Leaves]) -> float:
    """Give all LoRA layers one alpha, the commonest, and put the rest into lora_up; ΔW stays.

    diffusers loses per-layer alphas of attention layers. Returns the alpha.
    """
    plain = [leaves for leaves in rows.values() if "lora_up.weight" in leaves]
    if not plain:
        return 1.0
    alpha = Counter(float(leaves["alpha"]) for leaves in plain).most_common(1)[0][0] or 1.0
    for leaves in plain:
        own = float(leaves["alpha"])
        if own != alpha:
            leaves["lora_up.weight"] = leaves["lora_up.weight"] * (own / alpha)
            leaves["alpha"] = torch.tensor(alpha)
    return alpha


def _padding(rows: Mapping[str, Leaves], parts: Parts) -> dict[str, Leaves]:
    """Zero LoRAs for the rest of q, k, v, out where a text encoder layer has some of them.

    diffusers drops q, k, v where no layer has out_proj; A1111 drops an OpenCLIP layer that has not all four. Our reader
    leaves them out again.
    """
    padding: dict[str, Leaves] = {}
    for site, leaves in rows.items():
        found = re.fullmatch(r"(te[12]\..+\.)(q|k|v|out)_proj", site)
        if found is None or "lora_up.weight" not in leaves:
            continue
        for name in _PROJECTIONS:
            other = f"{found[1]}{name}"
            if other in rows or other in padding:
                continue
            weight = module_at(parts, other).weight
            assert isinstance(weight, Tensor)
            padding[other] = {
                "alpha": leaves["alpha"],
                "lora_down.weight": torch.zeros(1, weight.shape[1]),
                "lora_up.weight": torch.zeros(weight.shape[0], 1),
            }
    return padding


def _network_module(rows: Mapping[str, Leaves]) -> str:
    return "networks.lora" if all("lora_up.weight" in leaves for leaves in rows.values()) else "lycoris.kohya"


def cast_leaf(tensor: Tensor, leaf: str, site: str, precision: Precision) -> Tensor:
    """A leaf in the file's precision; alpha stays fp32. Raises UserError when a value does not fit."""
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"The layer {site} holds values that are not numbers.",
            f"Its {leaf} has NaN or infinity; the training has diverged.",
            "Train again with a lower learning rate.",
        )
    dtype = torch.float32 if leaf == "alpha" else DTYPES[precision]
    small = tensor.detach().to("cpu", dtype, copy=True)  # safetensors refuses tensors that share memory
    if not bool(torch.isfinite(small).all()):
        raise UserError(
            f"The layer {site} does not fit into {precision}.",
            f"Its {leaf} has values up to {tensor.abs().max().item():.3g}; {precision} ends at 65504.",
            "Write the file as bf16 or fp32.",
        )
    return small.contiguous()


def module_at(parts: Parts, site: str) -> nn.Module:
    """The module of a live site."""
    part, _, path = site.partition(".")
    return parts[part].get_submodule(path)
