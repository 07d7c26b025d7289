"""Several sets of pictures in one run: the main one and data.sets, each with its own words, weight and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reparam_diffusion.config import DatasetSettings, DataSettings
from reparam_diffusion.data.images import Picture, Refused, find_pictures
from reparam_diffusion.data.masks import ALPHA, BESIDE, Mask, find_masks, find_unused_masks
from reparam_diffusion.data.source_files import files_of
from reparam_diffusion.errors import UserError


@dataclass(frozen=True)
class Source:
    """One set's settings with nothing left open; `place` is where they stand ("data", "data.sets.0")."""

    place: str
    images: str | list[str]
    trigger: str
    class_word: str
    kind: str
    template: str
    """Caption template; empty takes the base model's own."""
    weight: float
    repeats: int
    flip: bool
    masks: str
    unmasked_weight: float

    @property
    def name(self) -> str:
        """What the set is called: its words, else its folder."""
        folder = Path(self.images).name if isinstance(self.images, str) else ""
        return " ".join(word for word in (self.trigger, self.class_word) if word) or folder or "pictures"


@dataclass(frozen=True)
class Found:
    """One set's usable pictures with their masks, and the files that were refused."""

    source: Source
    pictures: list[Picture]
    refused: list[Refused]
    masks: list[Mask | None]


def sources_of(data: DataSettings) -> tuple[Source, ...]:
    """All sets of a run, the main one first; what a further set leaves open is as in the main one."""
    main = Source(
        place="data",
        images=data.images,
        trigger=data.trigger,
        class_word=data.class_word,
        kind=data.kind,
        template=data.caption_template,
        weight=data.weight,
        repeats=data.repeats,
        flip=data.flip,
        masks=data.masks,
        unmasked_weight=data.unmasked_weight,
    )
    return main, *(_further(one, number, main) for number, one in enumerate(data.sets))


def _further(one: DatasetSettings, number: int, main: Source) -> Source:
    masks_for_all = main.masks if main.masks in (ALPHA, BESIDE) else ""
    return Source(
        place=f"data.sets.{number}",
        images=one.images,
        trigger=main.trigger if one.trigger is None else one.trigger,
        class_word=main.class_word if one.class_word is None else one.class_word,
        kind=one.kind or main.kind,
        template=main.template if one.caption_template is None else one.caption_template,
        weight=one.weight,
        repeats=one.repeats,
        flip=main.flip if one.flip is None else one.flip,
        masks=masks_for_all if one.masks is None else one.masks,
        unmasked_weight=main.unmasked_weight if one.unmasked_weight is None else one.unmasked_weight,
    )


def find_all(data: DataSettings, *, least_side: int) -> list[Found]:
    """Every set's pictures and masks. Raises UserError, at the set's own place, for what cannot be trained on."""
    found = [_find(source, least_side) for source in sources_of(data)]
    _require_different(found)
    return found


def _find(source: Source, least_side: int) -> Found:
    try:
        pictures, refused = find_pictures(source.images, least_side=least_side)
    except UserError as error:
        raise UserError(error.what, error.why, error.do, place=f"{source.place}.images") from None
    masks = find_masks(pictures, source.masks, rest=source.unmasked_weight, place=f"{source.place}.masks")
    refused += find_unused_masks(pictures, source.masks, place=f"{source.place}.masks")
    return Found(source, pictures, refused, masks)


def _require_different(found: Sequence[Found]) -> None:
    first_with: dict[str, Picture] = {}
    for one in found:
        twins = [(first_with[picture.hash], picture) for picture in one.pictures if picture.hash in first_with]
        if twins:
            named = "; ".join(f"{old.path} and {new.path}" for old, new in twins[:3])
            more = f"; and {len(twins) - 3} more" if len(twins) > 3 else ""
            raise UserError(
                "The same picture is in two sets.",
                f"{named}{more}.",
                "Take it out of one of them.",
                place=f"{one.source.place}.images",
            )
        first_with |= {picture.hash: picture for picture in one.pictures}


def count_further(data: DataSettings) -> list[int]:
    """How many files each further set has, by their names alone. Raises UserError for a folder that has none."""
    counts = []
    for source in sources_of(data)[1:]:
        try:
            counts.append(len(files_of(source.images)))
        except UserError as error:
            raise UserError(error.what, error.why, error.do, place=f"{source.place}.images") from None
    return counts
