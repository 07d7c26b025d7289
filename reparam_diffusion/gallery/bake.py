"""Baking adapters into their base: W + Σ s·Δ(W) saved as a model of its own, a diffusers folder or one checkpoint file.

Layer by layer: beside the loaded model only the layer at hand is in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from reparam_diffusion.errors import UserError
from reparam_diffusion.files import folder_beside
from reparam_diffusion.formats.bundled import write_beside
from reparam_diffusion.formats.checkpoint import Named, Weights, live_weights, original_names
from reparam_diffusion.formats.container import TensorFile
from reparam_diffusion.formats.load import FOLDERS
from reparam_diffusion.formats.write import DTYPES, Precision
from reparam_diffusion.gallery.blend.result import Progress
from reparam_diffusion.gallery.blend.sources import Base, Opened, Source
from reparam_diffusion.maths.change import Change, total
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.pipeline import pipeline_over

Kind = Literal["folder", "checkpoint"]


def bake(
    model: Model, sources: Sequence[Source], out: Path, *, kind: Kind = "folder", precision: Precision = "fp16"
) -> Generator[Progress | Path, None, None]:
    """Save the model with adapters merged in; yields progress, then the path. Closing it early leaves nothing.

    "checkpoint" is one .safetensors with the original Stable Diffusion names, which programs open as a base model.
    Learned words have no place in a model: each is put beside it as a textual inversion, <name>-embedding.safetensors.
    Raises UserError when `out` is taken, and where an adapter brings a bias to a layer that has none.
    """
    if out.exists():
        raise UserError(f"{out} exists already.", "A model is never overwritten.", "Name another place.")
    opened = Opened(sources, Base(model.parts, model.family, model.name))
    words = opened.words
    merged = _Merged(model, opened)
    header = {"format": "pt", "modelspec.title": out.stem, "modelspec.merged_from": _recipe(model, opened)}
    if kind == "checkpoint":
        if out.suffix != ".safetensors":
            raise UserError(f"{out.name} is no .safetensors file.", do="Name a file such as model.safetensors.")
        named = original_names(model.parts, model.vae, model.family, merged)
        names = _write(out, named, header=header, precision=precision)
    else:
        names = _write_folder(model, merged, out, header=header, precision=precision)
    count = sum(len(part.state_dict()) for part in (*model.parts.values(), model.vae))
    with closing(names):
        for number, name in enumerate(names, 1):
            yield Progress(min(number, count), count, name)
    write_beside(out, words, model.family)
    yield out


class _Merged:
    """The weights to write, by "<part>.<key>": the live ones with the adapters' change added where there is one."""

    def __init__(self, model: Model, opened: Opened) -> None:
        self._live, self._opened = live_weights(model.parts), opened
        self._sites = frozenset(opened.sites)
        self._last: tuple[str, Change] | None = None  # a layer's weight and bias come one after the other
        for site in self._sites:
            self._check(site, model)

    def __call__(self, name: str) -> Tensor:
        tensor = self._live(name).detach().cpu()
        site, _, leaf = name.rpartition(".")
        if site not in self._sites or leaf not in ("weight", "bias"):
            return tensor
        if self._last is None or self._last[0] != site:
            self._last = (site, total([layer.wanted for layer in self._opened.layers(site)]))
        change = self._last[1]
        added = change.bias if leaf == "bias" else change.matrix().reshape(change.shape)
        return tensor if added is None else tensor.float() + added

    def _check(self, site: str, model: Model) -> None:
        part, _, path = site.partition(".")
        if model.parts[part].get_submodule(path).bias is None and any(
            "bias" in leaf or leaf.endswith("_b") for leaf in self._opened.leaves(site)
        ):
            raise UserError(
                f"An adapter brings a bias to {site}, which has none.",
                "A model's layout has no place for it.",
                "Use the adapter without baking it in.",
            )


def _recipe(model: Model, opened: Opened) -> str:
    pairs = zip(opened.sources, opened.files, strict=True)
    files = [f"{file.file.name} ({source.strength:g})" for source, file in pairs]
    return ", ".join([model.name, *files])


def _write(path: Path, named: Named, *, header: Mapping[str, str], precision: Precision) -> Generator[str, None, None]:
    """One .safetensors of a model's tensors in the wanted number format; yields the names."""
    with TensorFile(path) as file:
        for name, tensor in named:
            file.add(name, _cast(name, tensor, precision))
            yield name
        file.finish(header)


def _cast(name: str, tensor: Tensor, precision: Precision) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.cpu()
    small = tensor.detach().cpu().to(DTYPES[precision])
    if not bool(torch.isfinite(small).all()):
        raise UserError(f"{name} does not fit into {precision}.", do="Save the model as bf16 or fp32.")
    return small


def _write_folder(
    model: Model, merged: Weights, out: Path, *, header: Mapping[str, str], precision: Precision
) -> Generator[str, None, None]:
    """diffusers' layout, as `load_model` and `from_pretrained` read it; text encoders under their older names."""
    with folder_beside(out) as hidden:
        _settings(model, hidden)
        for folder, part in [*FOLDERS.items(), ("vae", "vae")]:
            module = model.vae if part == "vae" else model.parts.get(part)
            if module is None:
                continue
            is_text = part.startswith("te")
            weights = live_weights({"vae": model.vae}) if part == "vae" else merged
            named = [(_older(key) if is_text else key, f"{part}.{key}") for key in module.state_dict()]
            file = hidden / folder / ("model.safetensors" if is_text else "diffusion_pytorch_model.safetensors")
            rows = ((name, weights(key)) for name, key in named)
            yield from _write(file, rows, header=header, precision=precision)


def _settings(model: Model, folder: Path) -> None:
    """Everything of a diffusers folder but the weights."""
    tokenizers = [*model.tokenizers, None]
    pipeline_over(model.parts, vae=model.vae, tokenizers=tokenizers, scheduler=model.scheduler).save_config(folder)
    model.scheduler.save_pretrained(folder / "scheduler")
    model.unet.save_config(folder / "unet")
    model.vae.save_config(folder / "vae")
    for name, encoder in zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False):
        encoder.config.architectures = [type(encoder).__name__]
        encoder.config.save_pretrained(folder / name)
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), model.tokenizers, strict=False):
        tokenizer.save_pretrained(folder / name)
    if model.folder is not None and (model.folder / "habits.json").is_file():
        shutil.copyfile(model.folder / "habits.json", folder / "habits.json")


def _older(key: str) -> str:
    return key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}"
