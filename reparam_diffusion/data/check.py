"""What a person should read about the pictures and captions before pressing Start."""

from __future__ import annotations

from collections.abc import Sequence

from reparam_diffusion.data.captions import common_words, words_of
from reparam_diffusion.data.images import DUPLICATE, EMPTY_CAPTION, FIRST_FRAME, ON_WHITE, TURNED, Picture, Refused

FEW_PICTURES = 5
LARGE_SPREAD = 16.0
LONG_SHAPE = 2.5
_ABOUT_NOTES = {
    TURNED: "Turned upright from EXIF data",
    ON_WHITE: "See-through parts were laid on white",
    FIRST_FRAME: "Only the first frame of an animation is used",
}


def look_over(
    pictures: Sequence[Picture],
    refused: Sequence[Refused],
    captions: Sequence[str],
    *,
    trigger: str,
    resolution: int,
    expected: str = "",
) -> list[str]:
    """Plain sentences about the pictures, the weightiest first. `captions` are those that will be trained on.

    `expected` are words that all captions may well share: the class word and the base model's caption template.
    """
    return [
        *_about_encodings(pictures),
        *_about_refusals(refused),
        *_about_captions(pictures, captions, trigger, expected),
        *_about_sizes(pictures, resolution),
        *_about_notes(pictures),
    ]


def note_unused_masks(pictures: Sequence[Picture], masks: str) -> str:
    """A sentence about masks that came with the images while the setting does not use them; empty where it does."""
    having = [picture for picture in pictures if picture.mask is not None]
    if masks or not having:
        return ""
    counted = _count(len(having), "image has a mask that is", "images have masks that are")
    return f'{counted} not used. Set data.masks to "beside" to use them.'


def _about_refusals(refused: Sequence[Refused]) -> list[str]:
    twins = [bad for bad in refused if bad.why.startswith(DUPLICATE)]
    others = [bad for bad in refused if bad not in twins]
    said = [f"{bad.path.name} is left out. {bad.why}" for bad in others[:10]]
    if len(others) > 10:
        said.append(f"{len(others) - 10} more files are left out.")
    if twins:
        said.append(f"{_count(len(twins), 'duplicate is', 'duplicates are')} left out: {some_of(twins)}.")
    return said


def _about_encodings(pictures: Sequence[Picture]) -> list[str]:
    """Caption files whose encoding was detected, with a sample of what was read."""
    said = []
    for encoding in dict.fromkeys(picture.encoding for picture in pictures if picture.encoding):
        having = [picture for picture in pictures if picture.encoding == encoding]
        sample = max((picture.caption or "" for picture in having), key=lambda text: sum(c > "\x7f" for c in text))
        files = _count(len(having), "caption file is", "caption files are")
        said.append(
            f"{files} not UTF-8 and read as {encoding}, such as “{sample[:60]}” ({some_of(having)}). "
            "Save as UTF-8 if this is wrong."
        )
    return said


def _about_captions(pictures: Sequence[Picture], captions: Sequence[str], trigger: str, expected: str) -> list[str]:
    said = []
    own = [picture for picture in pictures if picture.caption is not None]
    if own and len(own) < len(pictures):
        said.append(
            f"{len(own)} of {len(pictures)} pictures have a caption file; the others take the caption template."
        )
    if empty := [picture for picture in pictures if EMPTY_CAPTION in picture.notes]:
        counted = _count(len(empty), "caption file is", "caption files are")
        said.append(f"{counted} empty, so the template is taken: {some_of(empty)}.")
    wanted = words_of(trigger)
    lacking = [
        picture
        for picture, caption in zip(pictures, captions, strict=True)
        if wanted and not _has_phrase(words_of(caption), wanted)
    ]
    if lacking:
        said.append(
            f'The trigger "{trigger}" is missing from {_count(len(lacking), "caption", "captions")} '
            f"({some_of(lacking)}), so it will not call what those pictures show. Add it to them."
        )
    if own:
        known = {*wanted, *words_of(expected)}
        shared = [word for word in common_words(captions) if word not in known]
        if shared:
            said.append(
                f"All captions share these words: {', '.join(shared)}. "
                "Words for what should change freely later are better not in all of them."
            )
    return said


def _about_sizes(pictures: Sequence[Picture], resolution: int) -> list[str]:
    said = []
    if 0 < len(pictures) < FEW_PICTURES:
        said.append(
            f"There {'is' if len(pictures) == 1 else 'are'} only {_count(len(pictures), 'picture', 'pictures')}; "
            "5 to 20 that differ in background and angle teach more."
        )
    if small := [picture for picture in pictures if min(picture.width, picture.height) < resolution]:
        said.append(
            f"{_count(len(small), 'picture is', 'pictures are')} smaller than the training size of "
            f"{resolution} pixels and will be enlarged, which blurs: {some_of(small)}."
        )
    areas = sorted((picture.width * picture.height, picture.path.name) for picture in pictures)
    if areas and areas[-1][0] > LARGE_SPREAD * areas[0][0]:
        said.append(
            f"The pictures differ much in size: {areas[-1][1]} has {areas[-1][0] / areas[0][0]:.0f} times "
            f"as many pixels as {areas[0][1]}. Fine detail will differ between them."
        )
    long = [p for p in pictures if max(p.width, p.height) > LONG_SHAPE * min(p.width, p.height)]
    if long:
        counted = _count(len(long), "picture is", "pictures are")
        said.append(f"{counted} very long or tall and will be cropped much: {some_of(long)}.")
    return said


def _about_notes(pictures: Sequence[Picture]) -> list[str]:
    said = []
    for note, words in _ABOUT_NOTES.items():
        if having := [picture for picture in pictures if note in picture.notes]:
            said.append(f"{words}: {some_of(having)}.")
    shown = {*_ABOUT_NOTES, EMPTY_CAPTION}
    for picture in pictures:
        said += [f"{picture.path.name}: {note}." for note in picture.notes if note not in shown]
    return said


def _has_phrase(words: list[str], phrase: list[str]) -> bool:
    """Whether the phrase's words stand together somewhere."""
    return any(words[at : at + len(phrase)] == phrase for at in range(len(words) - len(phrase) + 1))


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def some_of(listed: Sequence[Picture | Refused], most: int = 4) -> str:
    """Up to four names, and how many more there are."""
    names = ", ".join(entry.path.name for entry in listed[:most])
    return f"{names} and {len(listed) - most} more" if len(listed) > most else names
