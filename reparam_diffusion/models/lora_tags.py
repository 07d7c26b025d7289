"""<lora:name:strength> tags in prompts, read as A1111 reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.sample import finite

_TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")
_STRENGTHS = ("te", "unet")
STRONGEST = 10.0
"""Strengths go from -10 to 10."""


@dataclass(frozen=True)
class LoraTag:
    """One tag. `strength` is the UNet's, `text_strength` the text encoder's; None is the same as the UNet's."""

    name: str
    strength: float = 1.0
    text_strength: float | None = None


@dataclass(frozen=True)
class TaggedPrompt:
    """A prompt without its tags, the tags, and a sentence for everything in them that is not used."""

    text: str
    tags: tuple[LoraTag, ...]
    notes: tuple[str, ...]


def parse_tags(prompt: str, *, is_restored: bool = False, unet_first: bool = False) -> TaggedPrompt:
    """Split a prompt into its text and its <lora:name:a:b> tags.

    One number is the strength of both parts. Of two, the first is the text encoder's and the second the UNet's, as in
    A1111 (`unet_first` swaps them, as ComfyUI's nodes do); te=0.5 and unet=0.8 name them. Block weights (lbw=), start=,
    stop=, dyn= and other extras become notes. Raises UserError for a strength that is not a number; of a restored image
    that becomes a note too.
    """
    tags: list[LoraTag] = []
    notes: list[str] = []
    for kind, inside in _TAG.findall(prompt):
        if kind.lower() == "hypernet":
            notes.append(f"<{kind}:{inside}> is not used: hypernetworks are not supported.")
        elif not inside.partition(":")[0].strip():
            if not is_restored:
                raise UserError(f"<{kind}:{inside}> names no adapter.", do="Write <lora:name:0.8>.")
            notes.append(f"<{kind}:{inside}> names no adapter.")
        else:
            tags.append(_parse_tag(f"{kind}:{inside}", notes, is_restored=is_restored, unet_first=unet_first))
    text = re.sub(r"\s+", " ", _TAG.sub("", prompt)).strip().rstrip(",").strip()
    return TaggedPrompt(text, tuple(tags), tuple(notes))


def _parse_tag(tag: str, notes: list[str], *, is_restored: bool, unet_first: bool) -> LoraTag:
    """One tag, "lora:name:0.8" without its brackets; what is not used is added to `notes`."""
    _, name, *words = (word.strip() for word in tag.split(":"))
    named: dict[str, float] = {}
    numbers: list[float] = []
    unused: list[str] = []
    for position, word in enumerate(words):
        key, equals, value = word.partition("=")
        if equals and key.strip().lower() not in _STRENGTHS:
            unused.append(word)
            continue
        try:
            number = finite(value if equals else word)
        except ValueError:
            is_comma = _DECIMAL_COMMA.fullmatch(word) is not None
            is_extra = not equals and not is_comma and (position > 0 or "," in word)  # block weights, or their name
            if not is_restored and not is_extra:
                raise _wrong_strength(tag, value if equals else word) from None
            unused.append(word)
            continue
        if is_restored and abs(number) > STRONGEST:
            unused.append(word)
            number = max(-STRONGEST, min(STRONGEST, number))
        if equals:
            named[key.strip().lower()] = number
        else:
            numbers.append(number)
    unused += [f"{number:g}" for number in numbers[2:]]
    if unused:
        notes.append(f"<{tag}>: {', '.join(unused)} is not supported and is not used.")
    first = numbers[0] if numbers else 1.0
    second = numbers[1] if len(numbers) > 1 else None
    if unet_first:
        first, second = (first if second is None else second), (None if second is None else first)
    text = named.get("te", first)
    strength = named.get("unet", text if second is None else second)
    return LoraTag(name, strength, None if text == strength else text)


def _wrong_strength(tag: str, word: str) -> UserError:
    """What to say about a strength that is not a number."""
    if _DECIMAL_COMMA.fullmatch(word):
        return UserError(
            f'"{word}" in <{tag}> has a decimal comma.', do=f"Write it with a point: {word.replace(',', '.')}."
        )
    return UserError(
        f'"{word}" in <{tag}> is not a number.', do="Write <lora:name:0.8>, or <lora:name:te=0.5:unet=0.8>."
    )
