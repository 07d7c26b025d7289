"""kohya's folder layout: sub-folders named <repeats>_<trigger class>, such as "10_sks dog", each a set of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reparam_diffusion.config import DatasetSettings, DataSettings
from reparam_diffusion.data.masks import ALPHA, BESIDE
from reparam_diffusion.data.source_files import count_images, list_folder
from reparam_diffusion.errors import UserError

MOST_REPEATS = 1000


@dataclass(frozen=True)
class SubFolder:
    """One sub-folder of the layout: "10_sks dog" has 10 repeats and the words "sks dog"."""

    path: Path
    repeats: int
    words: str


def expand_folders(data: DataSettings) -> tuple[DataSettings, list[str]]:
    """The settings with each folder in kohya's layout replaced by its sub-folders as sets, and what to tell about it.

    What the user gave wins: repeats other than 1, a trigger word, a class word. Settings without such a folder come
    back as they are. Raises UserError where a folder of masks cannot be divided among the sub-folders.
    """
    notes: list[str] = []
    further: list[DatasetSettings] = []
    for number, one in enumerate(data.sets):
        folders = find_sub_folders(one.images, notes)
        rows = [_read_folder(sub, one.repeats, one.trigger, one.class_word, notes) for sub in folders]
        masks = _divide_masks(one.masks or "", folders, f"data.sets.{number}.masks")
        further += [
            one.model_copy(update={**row, **({"masks": mask} if mask else {})})
            for row, mask in zip(rows, masks, strict=True)
        ] or [one]
    folders = find_sub_folders(data.images, notes)
    if not folders:
        return (data if further == data.sets else data.model_copy(update={"sets": further})), notes
    rows = [_read_folder(sub, data.repeats, data.trigger, data.class_word, notes) for sub in folders]
    masks = _divide_masks(data.masks, folders, "data.masks")
    own = [
        DatasetSettings(**row, weight=data.weight, masks=mask) for row, mask in zip(rows[1:], masks[1:], strict=True)
    ]
    return data.model_copy(update={**rows[0], "masks": masks[0], "sets": [*own, *further]}), notes


def find_sub_folders(images: str | list[str], notes: list[str]) -> list[SubFolder]:
    """The sub-folders of a folder in kohya's layout; none where it has images itself or no such sub-folder."""
    if isinstance(images, list):
        images = images[0] if len(images) == 1 else ""
    folder = Path(images).expanduser()
    if not images.strip() or not folder.is_dir() or count_images(folder):
        return []
    inner = [entry for entry in list_folder(folder) if entry.is_dir() and count_images(entry)]
    found: list[SubFolder] = []
    unused: list[str] = []
    for entry in inner:
        match = re.fullmatch(r"(\d{1,9})_(.*\S.*)", entry.name)
        if match and 1 <= int(match[1]) <= MOST_REPEATS:
            found.append(SubFolder(entry, int(match[1]), " ".join(match[2].split())))
        else:
            unused.append(entry.name)
    if found:
        why = f"Its name is not <repeats>_<trigger class> with 1 to {MOST_REPEATS} repeats."
        notes += [f'The folder "{name}" is left out. {why}' for name in unused]
    return found


def _read_folder(
    sub: SubFolder, repeats: int, trigger: str | None, class_word: str | None, notes: list[str]
) -> dict[str, Any]:
    """The settings of a sub-folder. Any: settings of several types."""
    trigger, class_word = split_words(sub.words, trigger or "", class_word or "")
    repeats = sub.repeats if repeats == 1 else repeats
    count = count_images(sub.path)
    words = f'trigger word "{trigger}"' if trigger else "no trigger word"
    words += f', class word "{class_word}"' if class_word else ""
    notes.append(
        f'The folder "{sub.path.name}" is a set of {count} image{"" if count == 1 else "s"} with {repeats} '
        f"repeat{'' if repeats == 1 else 's'}, {words}."
    )
    return {"images": str(sub.path), "repeats": repeats, "trigger": trigger, "class_word": class_word}


def split_words(words: str, trigger: str, class_word: str) -> tuple[str, str]:
    """Trigger and class word of "sks dog"; what is given stays.

    Without a given trigger word the first word is it. With one, what follows it is the class word, or all of the words
    where they do not begin with it.
    """
    first, _, rest = words.partition(" ")
    if not trigger:
        if words.casefold() == class_word.casefold():
            return "", class_word
        return first, class_word or rest
    if (words.casefold() + " ").startswith(trigger.casefold() + " "):
        return trigger, class_word or words[len(trigger) :].strip()
    return trigger, class_word or words


def _divide_masks(masks: str, folders: list[SubFolder], place: str) -> list[str]:
    """Where each sub-folder's masks are: in the sub-folder of its name, else in the folder of masks itself."""
    if masks in ("", ALPHA, BESIDE):
        return [masks] * len(folders)
    home = Path(masks).expanduser()
    divided = [str(home / sub.path.name) if (home / sub.path.name).is_dir() else masks for sub in folders]
    owners: dict[str, SubFolder] = {}
    for sub, where in zip(folders, divided, strict=True):
        for file in list_folder(sub.path) if where == masks else ():
            other = owners.setdefault(file.stem.casefold(), sub)
            if other is not sub and not file.is_dir():
                raise UserError(
                    f"The masks in {masks} cannot be told apart.",
                    f'Both "{other.path.name}" and "{sub.path.name}" have an image {file.stem}.',
                    f'Put the masks into sub-folders of the same names, or beside the images and use "{BESIDE}".',
                    place=place,
                )
    return divided
