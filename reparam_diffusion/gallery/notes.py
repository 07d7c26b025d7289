"""What a person says of an adapter, beside it in <slug>.json, in A1111's sidecar keys, so that its page shows it too.

Anything may stand in such a file: other programs write it and people edit it. What we do not know is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from reparam_diffusion.errors import UserError
from reparam_diffusion.files import write_whole

Notes = dict[str, object]

LONGEST = {"name": 120, "activation text": 2000, "negative text": 2000, "description": 20_000, "notes": 20_000}
"""Characters of each text that a person may write."""
MOST_TAGS, LONGEST_TAG = 50, 60
STRONGEST = 10.0
SD_VERSIONS = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}
"""Our names of the base models' families -> A1111's."""


def new_notes(name: str, facts: Mapping[str, object]) -> Notes:
    """The notes of a new adapter: A1111's keys with their defaults, and what is known."""
    return {
        "name": name,
        "activation text": "",
        "preferred weight": 1.0,
        "negative text": "",
        "notes": "",
        "description": "",
        "sd version": "Unknown",
    } | dict(facts)


def read_notes(file: Path) -> Notes:
    """The notes in a file; none where it is missing or broken: the adapter is there all the same."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def write_notes(file: Path, notes: Mapping[str, object]) -> None:
    """Put notes beside their adapter."""
    write_whole(file, json.dumps(notes, ensure_ascii=False, indent=2))


def changed_notes(file: Path, changes: Mapping[str, object]) -> Notes:
    """The notes in `file` with a person's changes. Raises UserError for what cannot be noted."""
    if file.is_file() and not read_notes(file) and file.read_bytes().strip() not in (b"", b"{}"):
        raise UserError(
            f"{file.name} cannot be changed.",
            "It holds notes that cannot be read.",
            "Mend it with a text editor, or remove it.",
        )
    return read_notes(file) | {key: _checked(key, value) for key, value in changes.items()}


def _checked(key: str, value: object) -> object:
    if key == "preferred weight":
        return _weight(value)
    if key == "tags":
        return _tags(value)
    if key not in LONGEST:
        raise UserError(f'"{key}" is nothing that can be noted.', do=f"Choose among {', '.join(LONGEST)}.")
    text = str(value or "").strip()
    if len(text) > LONGEST[key]:
        raise UserError(f"The {key} is too long.", f"It has {len(text)} characters.", f"Keep it to {LONGEST[key]}.")
    return text


def _weight(value: object) -> float:
    number = as_number(value)
    if number is None or abs(number) > STRONGEST:
        raise UserError("The preferred strength is no usable number.", do=f"Give one up to {STRONGEST:g}, such as 0.8.")
    return number


def _tags(value: object) -> list[str]:
    tags = split_tags(value)
    if len(tags) > MOST_TAGS or any(len(tag) > LONGEST_TAG for tag in tags):
        raise UserError("These are too many or too long tags.", do=f"Keep to {MOST_TAGS} of {LONGEST_TAG} characters.")
    return tags


# --- reading what may be anything ------------------------------------------------------------------------------------
def as_number(value: object) -> float | None:
    """A finite number out of a number or its text; None out of anything else."""
    with suppress(TypeError, ValueError, OverflowError):
        number = float(value) if isinstance(value, int | float | str) else math.nan
        return number if math.isfinite(number) else None
    return None


def strength_of(notes: Mapping[str, object]) -> float:
    """The preferred strength, which may be 0; 1 where none is noted."""
    number = as_number(notes.get("preferred weight"))
    return 1.0 if number is None else number


def as_text(value: object) -> str:
    """A text as it is; a list of texts with commas; nothing out of anything else."""
    if isinstance(value, list):
        return ", ".join(str(part).strip() for part in value if isinstance(part, str | int | float))
    return value.strip() if isinstance(value, str) else ""


def split_tags(value: object) -> list[str]:
    """Tags out of a list or a text with commas, each once, in their order."""
    return list(dict.fromkeys(tag for part in as_text(value).split(",") if (tag := part.strip())))


def fitting(found: Mapping[str, object]) -> Notes:
    """Notes from elsewhere with each of our keys of its right kind and length; what is empty or senseless is left out.

    A1111 writes 0 where nobody has chosen a weight.
    """
    own: Notes = {key: as_text(found.get(key))[:longest] for key, longest in LONGEST.items()}
    weight = as_number(found.get("preferred weight"))
    own["preferred weight"] = weight if weight and abs(weight) <= STRONGEST else ""
    own["tags"] = [tag[:LONGEST_TAG] for tag in split_tags(found.get("tags"))[:MOST_TAGS]]
    return {key: value for key, value in found.items() if key not in own} | {k: v for k, v in own.items() if v}
