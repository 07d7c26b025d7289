"""Exporting an adapter for other programs, with the proof that they read it: the file, then what they see in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.adapters.foreign import Full
from reparam_diffusion.adapters.oft import Oft
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import require_new_file, require_writable, write_whole
from reparam_diffusion.formats.bundled import embedding_paths, write_beside
from reparam_diffusion.formats.changes import change_of
from reparam_diffusion.formats.finite import require_numbers
from reparam_diffusion.formats.header import public
from reparam_diffusion.formats.names import Family, Parts, module_at
from reparam_diffusion.formats.peft import write_diffusers, write_peft
from reparam_diffusion.formats.programs import STRENGTHS, traits_of
from reparam_diffusion.formats.proof import Reading, diffusers_reading, lycoris_reading, peft_reading
from reparam_diffusion.formats.read import PADDING, AdapterFile, Site, read_adapter
from reparam_diffusion.formats.write import AdapterWriter, Precision
from reparam_diffusion.maths.change import distance
from reparam_diffusion.maths.loss import describe_loss, kept_share
from reparam_diffusion.maths.lowrank import relative
from reparam_diffusion.models.words import Word

Target = Literal["lycoris", "a1111", "diffusers", "peft"]
TARGETS: dict[str, str] = {
    "lycoris": "LyCORIS and kohya: every method in its own form.",
    "a1111": "A1111 and ComfyUI: what either of them reads otherwise becomes whole differences.",
    "diffusers": "diffusers' load_lora_weights: LoRA and AdaLoRA.",
    "peft": "A PEFT folder for each model part: LoRA, LoHa, LoKr, AdaLoRA, and OFT on the inputs.",
}
_OURS = (PADDING, "sshs_model_hash", "sshs_legacy_hash", "lora_adapter_metadata", "format")
"""Header keys that the writer makes anew."""


@dataclass(frozen=True)
class Exported:
    """An export: where it is, what was rewritten, how far its numbers are rounded, and who reads it how."""

    path: Path
    target: Target
    precision: Precision
    layers: int
    rounding: float
    """The largest relative difference of a layer's change from the original's."""
    rewritten: Mapping[str, int]
    """Layers that are whole differences now, by what they were."""
    readings: tuple[Reading, ...]
    notes: tuple[str, ...]
    """What is not the same elsewhere, such as other strengths."""
    error: float = 0.0
    """‖written − original‖ / ‖original‖ over all layers."""

    @property
    def kept(self) -> float:
        """The share of the change that the file keeps, 0 to 1."""
        return kept_share(self.error)

    def sentences(self) -> list[str]:
        """For a person."""
        rows = [f"{self.layers} layers in {self.precision}, {describe_loss(self.error)}"]
        rows += [f"{count} {name} layers became whole differences" for name, count in self.rewritten.items()]
        return rows + [reading.sentence() for reading in self.readings] + list(self.notes)

    def to_dict(self) -> dict[str, Any]:  # Any: plain values for JSON
        """For JSON, with every program's answer."""
        return asdict(self) | {
            "path": self.path.name,
            "kept": self.kept,
            "loss": describe_loss(self.error),
            "rewritten": dict(self.rewritten),
            "readings": [asdict(reading) | {"agrees": reading.agrees} for reading in self.readings],
        }


def export_adapter(
    source: Path | str,
    out: Path,
    *,
    parts: Parts,
    family: Family,
    target: Target = "lycoris",
    precision: Precision = "fp16",
    strip: bool = False,
) -> Iterator[tuple[int, int, str] | Exported]:
    """Write an adapter for other programs; yields (done, of, what), then the Exported, kept beside it as .proof.json.

    `parts` may be without weights where no change depends on them; diffusers is asked only on a real model.
    """
    is_empty_folder = target == "peft" and out.is_dir() and not any(out.iterdir())
    if is_empty_folder:
        require_writable(out)
    else:
        require_new_file(out, sources=[Path(source)])
    file = read_adapter(source)
    located, left = file.locate(parts)
    if not located:
        why = file.misfit(left, family)
        raise UserError(f"{file.file.name} does not fit this base model.", why, "Name the base it was made for.")
    words, others = file.words_for(parts)
    left += others
    require_numbers(file, located)
    for path in embedding_paths(out, len(words)) if target != "lycoris" else []:
        require_new_file(path)
    rewritten: Counter[str] = Counter()
    adapters = _Adapted(file, located, parts=parts, target=target, rewritten=rewritten)
    if target == "diffusers":
        write_diffusers(out, dict(adapters), parts=parts, precision=precision)
    elif target == "peft":
        write_peft(out, dict(adapters), parts=parts, precision=precision)
    else:
        header = _header(file, strip=strip)
        with AdapterWriter(out, parts=parts, family=family, precision=precision) as writer:
            for number, (site, adapter) in enumerate(adapters, 1):
                writer.add(site, adapter)
                yield number, 2 * len(located), f"writing {site}"
            writer.add_words(words)
            writer.finish(header)
    rounding = wrong = size = 0.0
    for number, (error, norm) in enumerate(_errors(located, out, parts), 1):
        rounding = max(rounding, error)
        wrong, size = wrong + (error * norm) ** 2 if norm else wrong, size + norm**2
        yield len(located) + number, 2 * len(located), "reading it back"
    readings = _readings(out, parts, family, target)
    notes = [f"Left out: {key}: {why}." for key, why in left] + _notes(out)
    if target != "lycoris":
        notes += _put_words_beside(out, words, family)
    done = Exported(
        out,
        target,
        precision,
        len(located),
        rounding,
        dict(rewritten),
        readings,
        tuple(notes),
        relative(wrong**0.5, size**0.5),
    )
    write_whole(proof_beside(out), json.dumps(done.to_dict(), indent=1))
    yield done


def proof_beside(out: Path) -> Path:
    """Where an export's proof is kept."""
    return out / "proof.json" if out.is_dir() else out.with_suffix(".proof.json")


class _Adapted:
    """A file's adapters in the form that a target reads, one at a time."""

    def __init__(
        self,
        file: AdapterFile,
        located: Mapping[str, Site],
        *,
        parts: Parts,
        target: Target,
        rewritten: Counter[str],
    ) -> None:
        self._file, self._located, self._parts = file, located, parts
        self._target, self._rewritten = target, rewritten

    def __iter__(self) -> Iterator[tuple[str, Adapter]]:
        for site, found in self._located.items():
            module = module_at(self._parts, site)
            adapter = _built(found, module, site)
            if self._target == "a1111" and (odd := _odd_there(adapter)):
                self._rewritten[odd] += 1
                change = change_of(adapter, module)
                adapter = Full(change.shape, change.matrix(), change.bias)
            yield site, adapter
            self._file.let_go()


def _built(found: Site, module: nn.Module, site: str) -> Adapter:
    try:
        return found.adapter(module)
    except ValueError as error:
        raise UserError(f"The layer {site} cannot be exported.", f"{error}.", "`doctor` tells what is wrong.") from None


def _odd_there(adapter: Adapter) -> str:
    """What A1111 or ComfyUI reads otherwise than we do; "" for what both read alike."""
    if adapter.magnitude is not None:
        return "DoRA"
    if isinstance(adapter, Oft) and adapter.rescale is not None:
        return "rescaled OFT"
    return "input-side OFT" if isinstance(adapter, Oft) and adapter.plan.side == "input" else ""


def _header(file: AdapterFile, *, strip: bool) -> dict[str, str]:
    header = {key: value for key, value in file.metadata.items() if key not in _OURS}
    header.pop("ss_network_module", None)  # said anew by what the file holds now
    return public(header, trigger=file.trigger) if strip else header


def _errors(located: Mapping[str, Site], out: Path, parts: Parts) -> Iterator[tuple[float, float]]:
    """Each layer's change as written against the original's, as (relative error, the original's size)."""
    written = read_adapter(out)
    back, _ = written.locate(parts)
    for site, found in located.items():
        module = module_at(parts, site)
        exact = change_of(_built(found, module, site), module)
        size = exact.norm()
        wrong = distance(change_of(back[site].adapter(module), module), exact) if site in back else size
        yield relative(wrong, size), size
        written.let_go()


def _readings(out: Path, parts: Parts, family: Family, target: Target) -> tuple[Reading, ...]:
    if target == "peft":
        return (peft_reading(out, parts),)
    if target == "diffusers":
        return (diffusers_reading(out, parts),)
    by_diffusers = [diffusers_reading(out, parts)] if read_adapter(out).method == "lora" else []
    return (lycoris_reading(out, parts, family), *by_diffusers)


def _put_words_beside(out: Path, words: Sequence[Word], family: Family) -> list[str]:
    """Learned words in files of their own, for programs that read none inside an adapter's; a sentence for each."""
    files = write_beside(out, words, family)
    return [
        f'The learned word "{word.text}" is in {file.name}, a textual inversion: load it beside the adapter.'
        for word, file in zip(words, files, strict=True)
    ]


def _notes(out: Path) -> list[str]:
    """What differs at other strengths than 1, by what the file holds now."""
    layers = read_adapter(out).layers.values()
    traits = {trait for site in layers for trait in traits_of(site.kinds()[0], site.leaves)}
    return [told for trait, told in STRENGTHS.items() if trait in traits]
