"""Which modules of a model carry adapters: named sets, globs, and rules for several methods in one run."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from reparam_diffusion.adapters.base import METHODS, Adapter, Plan, Spec, shape_size, weight_shape
from reparam_diffusion.errors import UserError
from reparam_diffusion.inject import Parts
from reparam_diffusion.maths.chance import generator

UNET_SETS = ("attention", "attention+mlp", "all")
TEXT_SETS = ("none", "attention", "attention+mlp")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class SitePlan:
    """One site of a run: its method, its plan, and the weight it sits on."""

    site: str
    method: str
    plan: Plan
    shape: tuple[int, ...]
    groups: int


def can_carry(module: nn.Module) -> bool:
    """Whether adapters train on this module."""
    return isinstance(module, nn.Linear | nn.Conv2d)


def sites_of(part: str, model: nn.Module, targets: str | Sequence[str], *, last_layer: int | None = None) -> list[str]:
    """The sites of one model part that `targets` names: a set's name, or globs on the site ("unet.*.attn2.*").

    `last_layer` leaves out text encoder layers after it, which clip skip never uses.
    """
    found = []
    inside = _inside_transformers(model)
    for path, module in model.named_modules():
        if not can_carry(module) or path.endswith("text_projection"):
            continue
        if last_layer is not None and _layer_number(path) > last_layer:
            continue
        site = f"{part}.{path}"
        if isinstance(targets, str) and targets in UNET_SETS + TEXT_SETS:
            wanted = _in_set(path, module, targets, path in inside or part != "unet")
        else:
            globs = [targets] if isinstance(targets, str) else targets
            wanted = any(fnmatch.fnmatchcase(site, glob) for glob in globs)
        if wanted:
            found.append(site)
    return found


def _inside_transformers(model: nn.Module) -> set[str]:
    """Paths of modules inside a diffusers Transformer2DModel."""
    inside = set()
    for path, module in model.named_modules():
        if type(module).__name__ == "Transformer2DModel":
            inside |= {f"{path}.{inner}" for inner, _ in module.named_modules()}
    return inside


def _in_set(path: str, module: nn.Module, name: str, is_transformer: bool) -> bool:
    if name == "none":
        return False
    if name == "all":
        return True
    if name == "attention":
        return is_transformer and path.endswith(_ATTENTION)
    pointwise = isinstance(module, nn.Linear) or module.kernel_size == (1, 1)
    return is_transformer and pointwise


def _layer_number(path: str) -> int:
    """The N in "…layers.N.…", or -1 outside the layers."""
    words = path.split(".")
    if "layers" in words[:-1]:
        return int(words[words.index("layers") + 1])
    return -1


def plan_sites(
    parts: Parts,
    targets: Mapping[str, str | Sequence[str]],
    spec: Spec,
    rules: Sequence[tuple[str, Spec]] = (),
    *,
    last_layers: Mapping[str, int] | None = None,
) -> list[SitePlan]:
    """What every targeted site gets. `rules` are (glob, Spec): the first match wins, `spec` takes the rest.

    Raises UserError when nothing matches or a rule matches nothing.
    """
    last_layers = last_layers or {}
    sites: list[SitePlan] = []
    used = set()
    _check_globs(parts, targets)
    for part, wanted in targets.items():
        for site in sites_of(part, parts[part], wanted, last_layer=last_layers.get(part)):
            module = parts[part].get_submodule(site.partition(".")[2])
            chosen = spec
            for number, (glob, other) in enumerate(rules):
                if fnmatch.fnmatchcase(site, glob):
                    chosen = other
                    used.add(number)
                    break
            shape = weight_shape(module)
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            sites.append(
                SitePlan(site, chosen.method, METHODS[chosen.method].plan(chosen, shape, groups), shape, groups)
            )
    if not sites:
        raise UserError("No layer of the model is a target.", "", "Try attention+mlp.", place="targets")
    for number, (glob, _) in enumerate(rules):
        if number not in used:
            shadowed = any(fnmatch.fnmatchcase(planned.site, glob) for planned in sites)
            raise UserError(
                f'The rule "{glob}" matches no targeted layer' + (" that is left." if shadowed else "."),
                "Earlier rules take all of its layers."
                if shadowed
                else "Rules only choose among the layers that the targets name.",
                "Put it first, or leave it out." if shadowed else "Mend the rule, or widen the targets.",
                place=f"targets.rules.{number}.match",
            )
    return sites


def _check_globs(parts: Parts, targets: Mapping[str, str | Sequence[str]]) -> None:
    """Raise UserError for a glob that fits no layer, naming the nearest set or layer."""
    for part, wanted in targets.items():
        if isinstance(wanted, str) and wanted in UNET_SETS + TEXT_SETS:
            continue
        layers = [f"{part}.{path}" for path, module in parts[part].named_modules() if can_carry(module)]
        for glob in [wanted] if isinstance(wanted, str) else wanted:
            if any(fnmatch.fnmatchcase(layer, glob) for layer in layers):
                continue
            sets = UNET_SETS if part == "unet" else TEXT_SETS
            close = difflib.get_close_matches(glob, [*sets, *layers], 1, 0.0)
            raise UserError(
                f'No layer matches the target "{glob}".',
                f'The nearest name is "{close[0]}".' if close else "",
                f"Choose {', '.join(sets)}, or mend the glob; a layer's name begins with {part}.",
                place="targets.unet" if part == "unet" else "targets.text_encoder",
            )


def build_adapters(parts: Parts, sites: Sequence[SitePlan], *, seed: int) -> dict[str, Adapter]:
    """Fresh adapters for planned sites, each from its own generator, so that one site's draw never moves another's."""
    built = {}
    for planned in sites:
        part, _, path = planned.site.partition(".")
        weight = parts[part].get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        chance = generator(seed, "init", planned.site)
        built[planned.site] = METHODS[planned.method].build(planned.plan, weight.detach().cpu(), planned.groups, chance)
    return built


def count_parameters(sites: Sequence[SitePlan]) -> int:
    """Trainable numbers of planned sites, without building on the real weights."""
    return sum(_blank(planned).parameters for planned in sites)


def file_bytes(sites: Sequence[SitePlan], precision: str = "fp16") -> int:
    """The finished file's size before it exists, its header included."""
    each = 4 if precision == "fp32" else 2
    total = _HEADER_BYTES
    for planned in sites:
        for leaf, shape in _blank(planned).leaves:
            size = 4 if leaf == "alpha" else each * shape_size(shape)
            entry = {"dtype": "F16", "shape": shape, "data_offsets": [total, total + size]}
            total += size + len(json.dumps({f"lora_{planned.site}.{leaf}": entry}, separators=(",", ":")))
    return total


_HEADER_BYTES = 8_000
"""What a file's header tells of the run, its settings included."""


@dataclass(frozen=True)
class _Blank:
    """What one site has to learn, and the tensors that the finished file holds for it."""

    parameters: int
    leaves: tuple[tuple[str, tuple[int, ...]], ...]


def _blank(planned: SitePlan) -> _Blank:
    return _blank_of(planned.method, planned.plan, planned.shape, planned.groups)


@lru_cache(maxsize=4096)
def _blank_of(method: str, plan: Plan, shape: tuple[int, ...], groups: int) -> _Blank:
    """Sites of one shape are alike, and a model has few shapes."""
    build, weight = METHODS[method].build, torch.empty(shape, device="meta")
    learned = build(plan, weight, groups, generator(0))
    kept = build(plan.finished(), weight, groups, generator(0))
    leaves = {leaf: tuple(tensor.shape) for leaf, tensor in kept.tensors().items()}
    return _Blank(sum(parameter.numel() for parameter in learned.parameters()), tuple(leaves.items()))
