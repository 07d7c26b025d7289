"""Reading a written file with the programs it was written for, layer by layer, and comparing the change with ours.

Each layer stands alone with the other program's own module on it, and both answer the same random inputs. Where ΔW does
not depend on W the layer's weight is zero, so that nothing hides in the base's output.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from reparam_diffusion.adapters.base import Adapter, Host
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.load import FOLDERS
from reparam_diffusion.formats.names import Family, Parts, kohya_key, layout_of, module_at
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.maths.chance import generator
from reparam_diffusion.maths.lowrank import relative
from reparam_diffusion.models.pipeline import pipeline_over

AGREES = 1e-3
"""Largest relative difference of a layer's change that counts as the same; rounding stays far below."""
_FOLDER_OF = {part: folder for folder, part in FOLDERS.items()}


@dataclass(frozen=True)
class Reading:
    """How one program read the file. `failed` is its refusal, or why it was not asked."""

    program: str
    layers: int = 0
    largest: float = 0.0
    """The largest relative difference of a layer's change, and the layer."""
    where: str = ""
    failed: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the program opens the file and sees our change in every layer."""
        return not self.failed and self.layers > 0 and self.largest <= AGREES

    def sentence(self) -> str:
        """For a person."""
        if self.failed:
            return f"{self.program}: {self.failed}"
        if self.agrees:
            return f"opens in {self.program}: {self.layers} layers, largest difference {self.largest:.1e}"
        return f"{self.program} reads it differently: {self.largest:.1e} at {self.where}"


def installed(package: str) -> str:
    """A package's version, "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def lycoris_reading(file: Path, parts: Parts, family: Family) -> Reading:
    """LyCORIS, from each layer's tensors under the names they have in the file."""
    number = installed("lycoris-lora")
    if not number:
        return Reading("LyCORIS", failed="not installed here, so not asked")
    from lycoris.logging import logger  # type: ignore[import-untyped]  # it has no types
    from lycoris.modules import get_module, make_module  # type: ignore[import-untyped]  # it has no types

    logger.setLevel(logging.ERROR)
    layout = layout_of(parts)
    with safe_open(str(file), "pt") as opened:
        names: dict[str, list[str]] = {}
        for key in opened.keys():  # noqa: SIM118  (not a dict)
            names.setdefault(key.partition(".")[0], []).append(key)

        def put_on(site: str, host: nn.Module) -> Callable[[Tensor], Tensor]:
            key = kohya_key(site, family=family, layout=layout)
            tensors = {name: opened.get_tensor(name).float() for name in names[key]}
            kind, params = get_module(tensors, key)
            module = None if kind is None else make_module(kind, params, key, host)
            if module is None:
                raise ValueError(f"it knows no such adapter as {', '.join(sorted(tensors))}")
            module.to(torch.float32).apply_to()
            return host.forward

        return _compare(f"LyCORIS {number}", file, parts, put_on)


def peft_reading(folder: Path, parts: Parts) -> Reading:
    """PEFT, from the folders of the model's parts, one layer's model at a time."""
    number = installed("peft")
    if not number:
        return Reading("PEFT", failed="not installed here, so not asked")
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    configs = {part: PeftConfig.from_pretrained(str(folder / _FOLDER_OF[part])) for part in _parts_in(folder)}

    def put_on(site: str, host: nn.Module) -> Callable[[Tensor], Tensor]:
        part, _, path = site.partition(".")
        with warnings.catch_warnings():  # it misses the layers that stand in models of their own
            warnings.filterwarnings("ignore", message=".*_pattern keys did not match.*")
            model = get_peft_model(_nested(path, host), copy.deepcopy(configs[part]))
        with safe_open(str(folder / _FOLDER_OF[part] / "adapter_model.safetensors"), "pt") as opened:
            prefix = f"base_model.model.{path}."
            keys = [key for key in opened.keys() if key.startswith(prefix)]  # noqa: SIM118  (not a dict)
            told: Any = set_peft_model_state_dict(model, {key: opened.get_tensor(key).float() for key in keys})
        if told.unexpected_keys:
            raise ValueError(f"it does not know {told.unexpected_keys[0]}")
        layer = model.eval().base_model.model.get_submodule(path)
        return layer.__call__

    return _compare(f"PEFT {number}", folder, parts, put_on)


def diffusers_reading(file: Path, parts: Parts) -> Reading:
    """diffusers, through `load_lora_weights` on a pipeline of the live parts, which are put back as they were."""
    program = f"diffusers {installed('diffusers')}"
    if any(parameter.is_meta for parameter in parts["unet"].parameters()):
        return Reading(program, failed="not asked: that needs the base model's weights")
    pipeline = pipeline_over(parts)
    sites = list(read_adapter(file).locate(parts)[0])
    with _put_back(parts, sites):
        try:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        except (ValueError, KeyError, RuntimeError, TypeError) as error:
            return Reading(program, failed=f"refuses it ({str(error).strip().splitlines()[0][:160]})")
        loaded = {site: module_at(parts, site) for site in sites}

    def put_on(site: str, host: nn.Module) -> Callable[[Tensor], Tensor]:
        layer = loaded[site]
        if not hasattr(layer, "base_layer"):
            raise ValueError("it leaves this layer as it is")
        layer.base_layer = host
        return layer.__call__

    return _compare(program, file, parts, put_on)


@contextmanager
def _put_back(parts: Parts, sites: Iterable[str]) -> Iterator[None]:
    """Undo what another program does to the modules of a live model."""
    before = {site: module_at(parts, site) for site in sites}
    try:
        yield
    finally:
        for site, module in before.items():
            part, _, path = site.partition(".")
            parent, _, name = path.rpartition(".")
            setattr(parts[part].get_submodule(parent), name, module)
        for model in parts.values():
            for flag in ("peft_config", "_hf_peft_config_loaded"):
                model.__dict__.pop(flag, None)


def _compare(
    program: str, file: Path, parts: Parts, put_on: Callable[[str, nn.Module], Callable[[Tensor], Tensor]]
) -> Reading:
    """Our change of every layer of a file against the other program's."""
    opened = read_adapter(file)
    located, _ = opened.locate(parts)
    largest, where = 0.0, ""
    for site, found in located.items():
        module = module_at(parts, site)
        adapter = found.adapter(module)
        try:
            difference = _difference(site, module, adapter, put_on)
        except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, AssertionError) as error:
            told = str(error).strip().splitlines() or [type(error).__name__]
            return Reading(program, failed=f"cannot read {site} ({told[0][:160]})")
        if difference >= largest:
            largest, where = difference, site
        opened.let_go()
    return Reading(program, len(located), largest, where)


@torch.no_grad()
def _difference(
    site: str, module: nn.Module, adapter: Adapter, put_on: Callable[[str, nn.Module], Callable[[Tensor], Tensor]]
) -> float:
    host = Host(twin_of(module, with_weight=adapter.reads_weight))
    x = probe(site, host)
    before = host.apply(x, host.weight, host.bias)
    bias = adapter.delta_bias(host.bias)
    ours = host.apply(x, adapter.delta(host.weight).to(x.dtype), bias)
    theirs = put_on(site, host.module)(x) - before
    return relative(float((theirs - ours).norm()), float(ours.norm()))


def twin_of(module: nn.Module, *, with_weight: bool) -> nn.Module:
    """A copy of a layer on the CPU in fp32, its weight zero unless wanted. Raises UserError where it has none."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if with_weight and weight.is_meta:
        raise UserError(
            "The base model's weights are needed to read this file.", do="Name the base model with --model."
        )
    twin = copy.deepcopy(module)
    twin = twin.to_empty(device="cpu").float() if weight.is_meta else twin.to("cpu", torch.float32)
    if not with_weight or weight.is_meta:
        for parameter in twin.parameters():
            parameter.data.zero_()
    return twin.requires_grad_(False).eval()


def probe(site: str, host: Host) -> Tensor:
    """Random inputs of a layer, the same at every call: enough of them to see every part of its change."""
    shape, chance = host.weight.shape, generator("probe", site)
    if isinstance(host.module, nn.Linear):
        return torch.randn(16, shape[1], generator=chance)
    if isinstance(host.module, nn.Conv2d):
        sides = [length + 2 for length in shape[2:]]
        return torch.randn(2, shape[1] * host.groups, *sides, generator=chance)
    return torch.randn(4, shape[0], *([3, 3] if isinstance(host.module, nn.GroupNorm) else []), generator=chance)


def _parts_in(folder: Path) -> list[str]:
    return [part for part, name in _FOLDER_OF.items() if (folder / name / "adapter_config.json").is_file()]


def _nested(path: str, module: nn.Module) -> nn.Module:
    """A model in which `module` has this path and nothing else is."""
    top = nn.Module()
    inner = top
    *parents, last = path.split(".")
    for name in parents:
        child = nn.Module()
        inner.add_module(name, child)
        inner = child
    inner.add_module(last, module)
    return top
