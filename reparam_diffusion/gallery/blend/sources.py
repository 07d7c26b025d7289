"""What goes into a blend: the base model, and files with strengths for UNet, text encoders and single blocks."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.container import data_hash
from reparam_diffusion.formats.families import FAMILY_TITLES, USABLE, is_other
from reparam_diffusion.formats.finite import require_numbers
from reparam_diffusion.formats.header import find_prediction_type
from reparam_diffusion.formats.names import Family, module_at
from reparam_diffusion.formats.read import AdapterFile, Site, Unmatched, read_adapter
from reparam_diffusion.gallery.blend.method import Layer
from reparam_diffusion.models.load import Model, load_model
from reparam_diffusion.models.source import STARTER
from reparam_diffusion.models.words import Word, united

_BLOCKS = {"down": "unet.down_blocks.{}.*", "mid": "unet.mid_block.*", "up": "unet.up_blocks.{}.*"}


@dataclass(frozen=True)
class Source:
    """A file with its strengths. `blocks` multiply: glob on the site, or "down.1", "mid", "up.2" -> factor."""

    file: Path
    strength: float = 1.0
    te_strength: float | None = None
    """Strength for the text encoders; None is the same as for the UNet."""
    blocks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = [self.strength, self.te_strength or 0.0, *self.blocks.values()]
        if not all(math.isfinite(number) for number in numbers):
            raise UserError(f"A strength of {self.file.name} is no number.", do="Use a number such as 0.8.")

    def strength_at(self, site: str) -> float:
        """The strength for a live site; of several blocks that hold it the first counts."""
        is_text = not site.startswith("unet.")
        whole = self.te_strength if is_text and self.te_strength is not None else self.strength
        for block, factor in self.blocks.items():
            if fnmatch.fnmatchcase(site, glob_of(block)):
                return whole * factor
        return whole


def glob_of(block: str) -> str:
    """ "down.1" -> "unet.down_blocks.1.*"; a glob stays as it is."""
    side, _, number = block.partition(".")
    return _BLOCKS[side].format(number) if side in _BLOCKS and (number.isdigit() or side == "mid") else block


@dataclass(frozen=True)
class Base:
    """What adapters sit on. Without weights it serves the methods whose change does not depend on them."""

    parts: Mapping[str, nn.Module]
    family: Family
    name: str = ""


def base_for(files: Sequence[AdapterFile], model: Model | str | None = None) -> Base:
    """The base of a blend: `model`, or the model that the files name, or their family's layers without weights."""
    if isinstance(model, Model):
        return Base(model.parts, model.family, model.name)
    if model:
        return base_for(files, load_model(model, device="cpu"))
    named = {file.metadata.get("ss_sd_model_name", "") for file in files}
    if STARTER.name in named:
        return base_for(files, load_model("starter", device="cpu"))
    for file in files:
        if is_other(file.base):
            raise UserError(
                f"{file.file.name} is for {FAMILY_TITLES[file.base]}.",
                "Only adapters for Stable Diffusion 1, 2 and XL can be blended here.",
                "Leave it out.",
            )
    families = {file.base for file in files} & set(USABLE)
    if not families:
        raise UserError(
            f"{files[0].file.name} does not say which base model it is for.", do="Name the base model with --model."
        )
    family = sorted(families)[0]
    from reparam_diffusion.models.skeleton import skeleton

    return Base(skeleton(family), family)  # type: ignore[arg-type]  # guess_family says one of these names


class Opened:
    """The files of a blend on their base. Raises UserError for a file of another base, and for NaN or infinity."""

    def __init__(self, sources: Sequence[Source], base: Base, files: Sequence[AdapterFile] | None = None) -> None:
        self.sources, self.base = sources, base
        self.files = [read_adapter(source.file) for source in sources] if files is None else list(files)
        self.hashes = [content_hash(file.file) for file in self.files]
        self.left_out: list[tuple[str, str, str]] = []
        """(file, key, why)"""
        self._located: list[dict[str, Site]] = []
        for source, file in zip(sources, self.files, strict=True):
            located = self._locate(file)
            require_numbers(file, {site: row for site, row in located.items() if source.strength_at(site) != 0})
            self._located.append(located)

    @property
    def words(self) -> list[Word]:
        """The learned words of all files that have a strength, as they are. Raises UserError for two that differ."""
        pairs = zip(self.sources, self.files, strict=True)
        return united(
            word
            for source, file in pairs
            if source.strength or source.te_strength
            for word in file.words_for(self.base.parts)[0]
        )

    @property
    def sites(self) -> list[str]:
        """Every live site that some file changes at a strength other than 0."""
        found = {
            site: None
            for source, located in zip(self.sources, self._located, strict=True)
            for site in located
            if source.strength_at(site) != 0
        }
        return list(found)

    def layers(self, site: str) -> list[Layer]:
        """What every file of the blend does to a site, built now; what was read for the one before is let go."""
        for file in self.files:
            file.let_go()
        module = module_at(self.base.parts, site)
        rows = []
        for source, file, digest, located in zip(self.sources, self.files, self.hashes, self._located, strict=True):
            strength = source.strength_at(site)
            adapter = None
            if site in located and strength != 0:  # a weight of 0 is absence
                try:
                    adapter = located[site].adapter(module)
                except ValueError as error:
                    raise UserError(
                        f"{file.file.name} does not fit {self.base.name or 'this base model'} at {site}.",
                        f"{error}.",
                        "Name the base with --model, or ask `doctor` what is wrong with the file.",
                    ) from None
            rows.append(Layer(site, module, digest, strength, adapter))
        return rows

    def leaves(self, site: str) -> set[str]:
        """The names of all tensors that the files have at a site."""
        return {leaf for located in self._located if site in located for leaf in located[site].leaves}

    def _locate(self, file: AdapterFile) -> dict[str, Site]:
        if file.base not in ("unknown", self.base.family):
            raise UserError(
                f"{file.file.name} is for another base model.",
                f"It is for {file.base}, the blend is for {self.base.family}.",
                "Blend adapters of one base model.",
            )
        located, left = file.locate(self.base.parts)
        if not located:
            raise UserError(
                f"{file.file.name} does not fit {self.base.name or 'this base model'}.",
                _first(left),
                "Blend adapters of one base model, or name it with --model.",
            )
        left += file.words_for(self.base.parts)[1]
        self.left_out += [(file.file.name, key, why) for key, why in left]
        return located


def require_one_prediction(files: Sequence[AdapterFile]) -> None:
    """Raise UserError where the headers name adapters of models that predict different things (v and ε)."""
    kinds = {kind: file.file.name for file in files if (kind := find_prediction_type(file.metadata))}
    if len(kinds) > 1:
        raise UserError(
            "These adapters are for models with different prediction types.",
            f"{kinds['v']} is for v-prediction, {kinds['epsilon']} is for epsilon.",
            "Merge adapters of one prediction type.",
        )


def content_hash(path: Path) -> str:
    """The hash of a file's tensors; of a PEFT folder, of all its files' together."""
    if path.is_dir():
        return "-".join(data_hash(file) for file in sorted(path.rglob("*.safetensors")))
    return data_hash(path)


def _first(left: Unmatched) -> str:
    return f"None of its layers match: {left[0][0]}: {left[0][1]}." if left else ""
