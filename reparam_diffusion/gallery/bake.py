"""Baking adapters into their base: W + Σ s·Δ(W) saved as a model of its own, a diffusers folder or one checkpoint file.

Layer by layer: beside the loaded model only the layer at hand is in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from reparam_diffusion.errors import UserError
from reparam_diffusion.files import folder_beside, require_new_file, telling
from reparam_diffusion.formats.bundled import embedding_paths, write_beside
from reparam_diffusion.formats.checkpoint import Named, Weights, live_weights, original_names
from reparam_diffusion.formats.container import TensorFile
from reparam_diffusion.formats.header import family_keys
from reparam_diffusion.formats.load import FOLDERS
from reparam_diffusion.formats.names import Family
from reparam_diffusion.formats.write import DTYPES, Precision
from reparam_diffusion.gallery.blend.result import Progress
from reparam_diffusion.gallery.blend.sources import Base, Opened, Source, require_one_prediction
from reparam_diffusion.maths.change import Change, total
from reparam_diffusion.maths.loss import describe_loss, kept_share
from reparam_diffusion.maths.lowrank import relative
from reparam_diffusion.models.checkpoint import read_header
from reparam_diffusion.models.finite import require_weights
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.parts import MODEL_CONFIGS, empty_parts
from reparam_diffusion.models.pipeline import pipeline_over
from reparam_diffusion.models.source import find_source

Kind = Literal["folder", "checkpoint"]


@dataclass(frozen=True)
class Baked:
    """A model with adapters merged in, and what rounding its weights costs of the adapters' change."""

    path: Path
    error: float
    """‖written − (W + Δ)‖ / ‖Δ‖ over all changed layers."""

    @property
    def loss(self) -> str:
        """In words, such as "keeps 96 % of the change (relative error 0.2)"."""
        return describe_loss(self.error)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"model": str(self.path), "error": self.error, "kept": kept_share(self.error), "loss": self.loss}


def bake(
    model: Model, sources: Sequence[Source], out: Path, *, kind: Kind = "folder", precision: Precision = "fp16"
) -> Generator[Progress | Baked, None, None]:
    """Save the model with adapters merged in; yields progress, then the result. Closing it early leaves nothing.

    "checkpoint" is one .safetensors with the original Stable Diffusion names, which programs open as a base model.
    Learned words have no place in a model: each is put beside it as a textual inversion, <name>-embedding.safetensors.
    What is written is opened once before the result is given. Raises UserError before any work when `out` is taken or
    cannot be written, for NaN or infinity, where an adapter brings a bias to a layer that has none, and for a single
    file of a model in another shape than its family's, which no program could open.
    """
    require_new_file(out, sources=[source.file for source in sources])
    if kind == "checkpoint":
        require_single_file(model, out)
    require_weights(model)
    opened = Opened(sources, Base(model.parts, model.family, model.name))
    require_one_prediction(opened.files)
    words = opened.words
    for file in embedding_paths(out, len(words)):
        require_new_file(file)
    merged = _Merged(model, opened, precision)
    header = _header(model, opened, out)
    if kind == "checkpoint":
        named = chain(original_names(model.parts, model.vae, model.family, merged), _marks(model))
        names = _write(out, named, header=header, precision=precision)
    else:
        names = _write_folder(model, merged, out, header=header, precision=precision)
    count = sum(len(part.state_dict()) for part in (*model.parts.values(), model.vae))
    with closing(names):
        for number, name in enumerate(names, 1):
            yield Progress(min(number, count), count, name)
    write_beside(out, words, model.family)
    open_model(out, model)
    yield Baked(out, relative(merged.wrong**0.5, merged.size**0.5))


def require_single_file(model: Model, out: Path) -> None:
    """Raise UserError for a model that no program can open as one file: one in another shape than its family's."""
    if out.suffix != ".safetensors":
        raise UserError(f"{out.name} is no .safetensors file.", do="Name a file such as model.safetensors.")
    kind = {"sd1": "sd1", "sd2": "sd2-base", "sdxl": "sdxl"}[model.family]
    with init_empty_weights():
        standard = empty_parts(MODEL_CONFIGS / kind)
    parts = {"unet": standard.unet} | {f"te{n}": encoder for n, encoder in enumerate(standard.text_encoders, 1)}
    wanted = _shapes(parts, standard.vae, model.family)
    own = _shapes(model.parts, model.vae, model.family)
    different = [name for name in {**wanted, **own} if wanted.get(name) != own.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"{model.name} cannot be written as one file.",
            "Programs open single files only in the shapes of Stable Diffusion 1.x, 2.x and XL; "
            f"here {name} is {own.get(name, 'missing')}, not {wanted.get(name, 'there')}.",
            f"Write a folder: name the result {out.stem} instead of {out.name}.",
        )


def _shapes(parts: Mapping[str, nn.Module], vae: nn.Module, family: Family) -> dict[str, tuple[int, ...]]:
    named = original_names(parts, vae, family, live_weights(parts))
    return {name: tuple(tensor.shape) for name, tensor in named if not name.endswith("position_ids")}


def open_model(out: Path, model: Model) -> None:
    """Look at a written model as generation does. Raises UserError, and deletes it, where it is taken for another."""
    try:
        source = find_source(str(out), fetch=False)
        checkpoint = source.checkpoint
        is_v = model.prediction_type == "v_prediction"
        why = "It is taken for another kind of model." if checkpoint and checkpoint.is_v_prediction != is_v else ""
        for file in [out] if out.is_file() else sorted(out.rglob("*.safetensors")):
            read_header(file)
    except UserError as error:
        why = str(error)
    if why:
        out.unlink() if out.is_file() else shutil.rmtree(out)
        raise UserError(f"{out.name} was written but cannot be opened.", why, "This is a bug; please file an issue.")


def _header(model: Model, opened: Opened, out: Path) -> dict[str, str]:
    """The model's own kind, so that programs need not guess it, and what was merged."""
    is_v = model.prediction_type == "v_prediction"
    architecture = family_keys(model.family, is_v_prediction=is_v)["modelspec.architecture"].removesuffix("/lora")
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.title": out.stem,
        "modelspec.merged_from": _recipe(model, opened),
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "modelspec.resolution": f"{model.size}x{model.size}",
    }
    triggers = ", ".join(dict.fromkeys(file.trigger for file in opened.files if file.trigger))
    return header | ({"modelspec.trigger_phrase": triggers} if triggers else {})


def _marks(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Empty tensors by which programs know a single file's v-prediction and zero terminal SNR."""
    if model.prediction_type == "v_prediction" and model.family != "sd2":
        yield "v_pred", torch.zeros(0)
    if model.scheduler.config.get("rescale_betas_zero_snr"):
        yield "ztsnr", torch.zeros(0)


class _Merged:
    """The weights to write, by "<part>.<key>": the live ones with the adapters' change added where there is one."""

    def __init__(self, model: Model, opened: Opened, precision: Precision) -> None:
        self._dtype = DTYPES[precision]
        self.wrong = self.size = 0.0  # squares, of what rounding takes away and of the change
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
        if added is None:
            return tensor
        moved = tensor.float() + added
        self.wrong += float((moved.to(self._dtype).float() - moved).norm()) ** 2
        self.size += float(added.norm()) ** 2
        return moved

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
        with telling(out):
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
