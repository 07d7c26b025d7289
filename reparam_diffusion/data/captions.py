"""Captions: a template filled with a person's words, tags shuffled, and the words all captions share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import torch

from reparam_diffusion.data.images import Picture
from reparam_diffusion.data.text_files import name_script
from reparam_diffusion.errors import UserError

PLACEHOLDERS = ("trigger", "class", "a class", "background")

_LITTLE_WORDS = set(re.findall(r"\w+", "a an the of on in at to with and or is are by for from it its this that"))
_AN_BY_SOUND = ("hour", "honest", "honor", "honour", "heir")
_A_BY_SOUND = ("uni", "use", "usu", "eu", "one", "once", "uk", "ut")
_A_AFTER_ALL = ("unid", "unim", "unin", "utt", "utm")  # unidentified, utter … begin with a vowel sound


def with_article(words: str) -> str:
    """ "a toy", "an owl", "a unicorn", "an hour"; words that bring an article keep theirs."""
    words = words.strip()
    lower = words.lower()
    if not words or re.match(r"(a|an|the|some|my|his|her|our|their) ", lower):
        return words
    if lower.startswith(_AN_BY_SOUND):
        return f"an {words}"
    begins_with_a_vowel = lower[0] in "aeiou"
    sounds_like_you = lower.startswith(_A_BY_SOUND) and not lower.startswith(_A_AFTER_ALL)
    return f"an {words}" if begins_with_a_vowel and not sounds_like_you else f"a {words}"


def fill(template: str, *, trigger: str, class_word: str, background: str = "") -> str:
    """The template with its {placeholders} filled and no gap where a word is empty.

    Raises UserError for a placeholder that does not exist.
    """
    words = {
        "trigger": trigger.strip(),
        "class": class_word.strip(),
        "a class": with_article(class_word),
        "background": background.strip(),
    }
    for name in re.findall(r"{([^{}]*)}", template):
        if name.strip().lower() not in words:
            raise UserError(
                f"The caption template has an unknown placeholder {{{name}}}.",
                do="Use " + ", ".join(f"{{{known}}}" for known in PLACEHOLDERS) + ".",
                place="data.caption_template",
            )
    return _tidy(re.sub(r"{([^{}]*)}", lambda found: words[found[1].strip().lower()], template))


def _tidy(text: str) -> str:
    """One space between words, none before a comma or full stop, no comma before another mark."""
    text = " ".join(text.split())
    text = re.sub(r" +([,.;:!?])", r"\1", text)
    text = re.sub(r"(, ?)+(?=[,.;:!?])", "", text)
    return text.strip(" ,")


def caption_for(picture: Picture, *, template: str, trigger: str, class_word: str) -> str:
    """The picture's own caption when it has one, else the template. Known placeholders in its own are filled too."""
    if picture.caption is None:
        return fill(template, trigger=trigger, class_word=class_word)
    if not any(f"{{{name}}}" in picture.caption for name in PLACEHOLDERS):
        return picture.caption
    words = {
        "trigger": trigger.strip(),
        "class": class_word.strip(),
        "a class": with_article(class_word),
        "background": "",
    }
    # Braces that are no placeholder stay: some people write {emphasis} in captions.
    return _tidy(re.sub(r"{([^{}]*)}", lambda found: words.get(found[1], found[0]), picture.caption))


def shuffled(caption: str, keep: int, generator: torch.Generator) -> str:
    """The comma-separated tags in a drawn order; the first `keep` stay in place."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    fixed, loose = tags[:keep], tags[keep:]
    order = torch.randperm(len(loose), generator=generator).tolist()
    return ", ".join(fixed + [loose[at] for at in order])


def words_of(caption: str) -> list[str]:
    """A caption's words in lower case, without punctuation."""
    text = unicodedata.normalize("NFC", caption.lower())  # "ä" as two code points would end a word
    return re.findall(r"[^\W_]+(?:['’_-][^\W_]+)*", text)


def replace_words(text: str, old: str, new: str) -> str:
    """The text with `old` replaced by `new` where it stands as whole words, in any Unicode form and spacing."""
    words = unicodedata.normalize("NFC", old).split()
    if not words:
        return text
    plain = unicodedata.normalize("NFC", text)
    parts, end = [], 0
    for found in re.finditer(r"\s+".join(re.escape(word) for word in words), plain):
        if _is_joined(plain, found.start()) or _is_joined(plain, found.end()):
            continue
        parts += [plain[end : found.start()], new]
        end = found.end()
    return "".join([*parts, plain[end:]]) if parts else text


def _is_joined(text: str, at: int) -> bool:
    """Whether the characters around a position belong to one word.

    Chinese and Japanese have no spaces between words: a change of script ends one there.
    """
    before, after = text[at - 1 : at] if at else "", text[at : at + 1]
    if not (_is_of_word(before) and _is_of_word(after)):
        return False
    scripts = {name_script(before), name_script(after)}
    return len(scripts) == 1 or not scripts & {"CJK", "HIRAGANA", "KATAKANA"}


def _is_of_word(letter: str) -> bool:
    """Letters, digits, the underscore, and marks on letters such as vowel signs."""
    return bool(letter) and (letter.isalnum() or letter == "_" or unicodedata.category(letter).startswith("M"))


def common_words(captions: Sequence[str]) -> list[str]:
    """Words that every caption has, in the first one's order, without little words. None for a single caption."""
    if len(captions) < 2:
        return []
    shared = set.intersection(*(set(words_of(caption)) for caption in captions)) - _LITTLE_WORDS
    return list(dict.fromkeys(word for word in words_of(captions[0]) if word in shared))
