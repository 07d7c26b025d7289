"""The files that belong to an image a.png: its caption a.txt, a.caption or a.png.txt, and its mask a-masklabel.png.

Names are compared as they are, then in one Unicode form (macOS writes "ä" as two code points), then without case. Each
file belongs to an image of its own folder. A browser strips folders: then a name alone decides, and a name that fits
several images is an error, because a guess would train an image with another one's caption.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from reparam_diffusion.errors import UserError

MASK_ENDING = "-masklabel"
"""How the stem of a mask beside its picture ends, as OneTrainer names it."""
MASK_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CAPTION_SUFFIXES = (".txt", ".caption")
_LEVELS: Final[tuple[Callable[[str], str], ...]] = (
    str,
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()),
)
"""Ways to spell a name, the strictest first."""


@dataclass(frozen=True)
class Sidecars:
    """Caption and mask file of each image, in the images' order, and the files that belong to none, with the reason."""

    captions: tuple[Path | None, ...]
    masks: tuple[Path | None, ...]
    unused: tuple[tuple[Path, str], ...]
    shared: tuple[Path, ...] = ()
    """Caption files and masks that several images of one name have in common (a.png and a.jpg)."""


def is_caption(file: Path) -> bool:
    """Whether a file is named as a caption."""
    return file.suffix.lower() in CAPTION_SUFFIXES


def is_mask(file: Path) -> bool:
    """Whether a file is named as the mask of a picture."""
    return file.stem.casefold().endswith(MASK_ENDING) and file.suffix.lower() in MASK_SUFFIXES


def match_name(name: str, names: Sequence[str]) -> list[int]:
    """The positions of a name among others, by the strictest spelling that finds any."""
    for spell in _LEVELS:
        if hits := [at for at, other in enumerate(names) if spell(other) == spell(name)]:
            return hits
    return []


def match_sidecars(images: Sequence[Path], files: Iterable[Path], *, earlier: Sequence[Path] = ()) -> Sidecars:
    """Match caption files and masks with images by folder and name.

    `earlier` are images that came before these files did: they are considered where none of `images` fits, and stand
    behind `images` in the result. Raises UserError where a name fits several images, or several files fit one alike.
    """
    every = [*images, *earlier]
    found: dict[bool, list[list[tuple[tuple[int, int, int], Path]]]] = {
        mask: [[] for _ in every] for mask in (False, True)
    }
    unused: list[tuple[Path, str]] = []
    shared: list[Path] = []
    for file in files:
        name = file.stem[: -len(MASK_ENDING)] if is_mask(file) else file.stem
        hits = _find_images(file, name, images) or _find_images(file, name, earlier, offset=len(images))
        if not hits:
            unused.append((file, _say_unmatched(file, name)))
        elif len(hits) > 1:
            shared.append(file)
        for at in hits:
            found[is_mask(file)][at].append((_rank(file, name, every[at]), file))
    captions, masks = ([_choose(choices, image, unused) for choices, image in zip(found[mask], every, strict=True)]
                       for mask in (False, True))  # fmt: skip
    return Sidecars(tuple(captions), tuple(masks), tuple(unused), tuple(shared))


def _find_images(file: Path, name: str, images: Sequence[Path], *, offset: int = 0) -> list[int]:
    """The images that a file belongs to. Raises UserError where the name does not say which one."""
    near = [at for at, image in enumerate(images) if image.parent == file.parent]
    near = near or list(range(len(images)))
    for part in ("name", "stem"):
        hits = [near[at] for at in match_name(name, [getattr(images[at], part) for at in near])]
        if not hits:
            continue
        fitting = [images[at] for at in hits]
        alike = {(image.parent, getattr(image, part)) for image in fitting}
        if len(alike) > 1:
            named = " and ".join(_name_place(image, file) for image in fitting[:3])
            raise UserError(
                f"{file.name} could belong to several images.",
                f"Its name fits {len(fitting)} of them: {named}.",
                "Rename the images and their files so that each name occurs once, or add one folder at a time.",
                place="data.images",
            )
        return [at + offset for at in hits]
    return []


def _name_place(image: Path, file: Path) -> str:
    """An image's name, with its folder where that tells it from others."""
    return image.name if image.parent == file.parent or not image.parent.name else f"{image.parent.name}/{image.name}"


def _rank(file: Path, name: str, image: Path) -> tuple[int, int, int]:
    """How closely a file fits an image, 0 the closest: by its kind, its spelling, the spelling of its suffix."""
    of_name = bool(match_name(name, [image.name]))
    own = image.name if of_name else image.stem
    level = next(at for at, spell in enumerate(_LEVELS) if spell(own) == spell(name))
    suffixes = MASK_SUFFIXES if is_mask(file) else CAPTION_SUFFIXES
    kind = suffixes.index(file.suffix.lower()) + len(suffixes) * of_name
    return kind, level, int(file.suffix != file.suffix.lower())


def _say_unmatched(file: Path, name: str) -> str:
    kind = "mask" if is_mask(file) else "caption"
    return f'It is a {kind} by its name, but there is no image "{name}". Rename it, or add the image.'


def _choose(
    choices: list[tuple[tuple[int, int, int], Path]], image: Path, unused: list[tuple[Path, str]]
) -> Path | None:
    """The file that fits best; the others are added to `unused`. Raises UserError where two fit alike and differ."""
    if not choices:
        return None
    choices.sort(key=lambda choice: choice[0])
    (best, file), *rest = choices
    for rank, other in rest:
        if rank == best and other.read_bytes() != file.read_bytes():
            kind = "masks" if is_mask(file) else "caption files"
            raise UserError(
                f"There are several {kind} for {image.name}.",
                f"{_name_place(file, image)} and {_name_place(other, image)} differ.",
                "Keep the right one, or add one folder at a time.",
                place="data.images",
            )
        unused.append((other, f"{file.name} is used for {image.name}."))
    return file
