"""Writing adapters as LyCORIS and kohya name them, so that A1111, ComfyUI, kohya, LyCORIS and diffusers open them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.adapters.foreign import Full, Stack
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.bundled import bundled
from reparam_diffusion.formats.changes import change_of
from reparam_diffusion.formats.container import TensorFile
from reparam_diffusion.formats.header import family_keys
from reparam_diffusion.formats.names import Family, Parts, kohya_key, layout_of, module_at
from reparam_diffusion.formats.read import PADDING
from reparam_diffusion.models.words import Word

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
    words: Sequence[Word] = (),
) -> Path:
    """Write adapters by live site into one .safetensors file, whole or not at all; LoRA layers get the commonest alpha.

    Raises UserError for values that the precision cannot hold, and when the disk is full.
    """
    alphas = Counter(
        float(leaves["alpha"])
        for adapter in adapters.values()
        if is_own(adapter) and "lora_up.weight" in (leaves := adapter.tensors())
    )
    alpha = alphas.most_common(1)[0][0] if alphas else None
    with AdapterWriter(
        Path(path), parts=parts, family=family, precision=precision, as_diff=as_diff, alpha=alpha
    ) as writer:
        for site, adapter in adapters.items():
            writer.add(site, adapter)
        writer.add_words(words)
        return writer.finish(metadata or {})


class AdapterWriter:
    """A file of adapters written layer by layer: only the layer at hand is in memory.

    Forms that we only read are written as the whole difference they make, exact. OFT on the input side keeps its own
    tensors, which this library reads; `as_diff` writes it, too, as whole differences, large but read by every program.
    All LoRA layers share one alpha, since diffusers loses those of single attention layers: `alpha`, or the first one.
    """

    def __init__(
        self,
        path: Path,
        *,
        parts: Parts,
        family: Family,
        precision: Precision,
        as_diff: bool = False,
        alpha: float | None = None,
    ) -> None:
        self.parts, self.family, self.precision, self.as_diff = parts, family, precision, as_diff
        self._alpha = alpha or None
        self._layout = layout_of(parts)
        self._file = TensorFile(path)
        self._sites: dict[str, bool] = {}  # whether it is a LoRA

    def __enter__(self) -> AdapterWriter:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def add(self, site: str, adapter: Adapter) -> Leaves:
        """Write one layer; returns its leaves as the file has them, none where nothing is left to change."""
        leaves = leaves_of(adapter, module_at(self.parts, site), as_diff=self.as_diff)
        if not leaves:  # an AdaLoRA site may have lost all its ranks
            return {}
        is_lora = "lora_up.weight" in leaves
        if is_lora:
            self._alpha = self._alpha or float(leaves["alpha"]) or 1.0
            _give_alpha(leaves, self._alpha)
        self._sites[site] = is_lora
        return self._put(site, leaves)

    def add_words(self, words: Sequence[Word]) -> None:
        """Write learned words in A1111's bundle form, which other programs than A1111 leave out."""
        for word in words:
            for key, tensor in bundled(word, self.family).items():
                self._file.add(key, cast_leaf(tensor, "vector", f'of the word "{word.text}"', self.precision))

    def finish(self, metadata: Mapping[str, str]) -> Path:
        """Put the file in its place. Raises UserError when no layer was written."""
        if not self._sites:
            raise UserError("There is nothing to write.", "No layer has anything left to change.", "Train for longer.")
        plain = all(self._sites.values())
        module = "networks.lora" if plain else "lycoris.kohya"
        header = {"format": "pt", **family_keys(self.family), "ss_network_module": module, **metadata}
        padding = _padding(self._sites, self.parts, self._alpha or 1.0)
        for site, leaves in padding.items():
            self._put(site, leaves)
        if padding:
            header[PADDING] = json.dumps([self._key(site) for site in padding])
        return self._file.finish(header)

    def _put(self, site: str, leaves: Leaves) -> Leaves:
        cast = {leaf: cast_leaf(tensor, leaf, site, self.precision) for leaf, tensor in sorted(leaves.items())}
        for leaf, tensor in cast.items():
            self._file.add(f"{self._key(site)}.{leaf}", tensor)
        return cast

    def _key(self, site: str) -> str:
        return kohya_key(site, family=self.family, layout=self._layout)


def is_own(adapter: Adapter) -> bool:
    """Whether an adapter is of a method that we train, and so has tensors of its own to write."""
    return any(type(adapter) is method.adapter for method in METHODS.values())


def leaves_of(adapter: Adapter, module: nn.Module, *, as_diff: bool) -> Leaves:
    """What a file holds for one adapter: its own tensors, or ΔW and Δb whole."""
    if is_own(adapter):
        leaves = adapter.tensors()
        if not (as_diff and any(leaf in leaves for leaf in _OURS_ONLY)):
            return leaves
    if isinstance(adapter, Stack) and all(is_own(inner) or _is_bias(inner) for inner in adapter.inner()):
        return {
            leaf: tensor
            for inner in adapter.inner()
            for leaf, tensor in leaves_of(inner, module, as_diff=as_diff).items()
        }
    change = change_of(adapter, module)
    added = change.bias
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):  # A1111 needs both
        diff = change.matrix().reshape(adapter.shape)
        return {"w_norm": diff, "b_norm": torch.zeros_like(diff) if added is None else added}
    leaves = {} if _is_bias(adapter) else {"diff": change.matrix().reshape(adapter.shape)}
    return leaves if added is None else leaves | {"diff_b": added}


def _is_bias(adapter: Adapter) -> bool:
    return isinstance(adapter, Full) and adapter.diff is None


def share_alpha(rows: Mapping[str, Leaves]) -> float:
    """Give all LoRA layers one alpha, the commonest, and put the rest into lora_up; ΔW stays.

    diffusers loses per-layer alphas of attention layers. Returns the alpha.
    """
    plain = [leaves for leaves in rows.values() if "lora_up.weight" in leaves]
    if not plain:
        return 1.0
    alpha = Counter(float(leaves["alpha"]) for leaves in plain).most_common(1)[0][0] or 1.0
    for leaves in plain:
        _give_alpha(leaves, alpha)
    return alpha


def _give_alpha(leaves: Leaves, alpha: float) -> None:
    own = float(leaves["alpha"])
    if own != alpha:
        leaves["lora_up.weight"] = leaves["lora_up.weight"] * (own / alpha)
        leaves["alpha"] = torch.tensor(alpha)


def _padding(sites: Mapping[str, bool], parts: Parts, alpha: float) -> dict[str, Leaves]:
    """Zero LoRAs for the rest of q, k, v, out where a text encoder layer has some of them.

    diffusers drops q, k, v where no layer has out_proj; A1111 drops an OpenCLIP layer that has not all four. Our reader
    leaves them out again.
    """
    padding: dict[str, Leaves] = {}
    for site, is_lora in sites.items():
        found = re.fullmatch(r"(te[12]\..+\.)(q|k|v|out)_proj", site)
        if found is None or not is_lora:
            continue
        for name in _PROJECTIONS:
            other = f"{found[1]}{name}"
            if other in sites or other in padding:
                continue
            weight = module_at(parts, other).weight
            assert isinstance(weight, Tensor)
            padding[other] = {
                "alpha": torch.tensor(alpha),
                "lora_down.weight": torch.zeros(1, weight.shape[1]),
                "lora_up.weight": torch.zeros(weight.shape[0], 1),
            }
    return padding


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
