"""New words: learned vectors that text encoders read where a prompt has the word.  Gal et al. 2022, arXiv:2208.01618.

While words are on a model, its tokenizers are copies that turn each into numbers beyond the vocabulary, and hooks put
the vectors in their place. Its own tokenizers and weights are never changed, so nothing is left when they come off.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reparam_diffusion.errors import UserError

if TYPE_CHECKING:
    from reparam_diffusion.models.load import Model

_FIRST_SIGN = 0xE000
"""Each vector is a private character of Unicode inside the tokenizer, which nobody types."""


@dataclass(frozen=True, eq=False)
class Word:
    """One word and its vectors (count, width) for each text encoder, "te1" and for SDXL "te2"."""

    text: str
    vectors: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """How many vectors the word has."""
        return len(next(iter(self.vectors.values())))

    def is_same(self, other: Word) -> bool:
        """Whether the other has the same vectors under the same name."""
        return self.vectors.keys() == other.vectors.keys() and all(
            torch.equal(vectors, other.vectors[part]) for part, vectors in self.vectors.items()
        )


def has_word(text: str, word: str) -> bool:
    """Whether a text has the word, as a whole word in small or capital letters."""
    return re.search(_pattern(word), text) is not None


def _pattern(word: str) -> str:
    """What both Python and the tokenizers understand."""
    return rf"(?i)(?<!\w){re.escape(word)}(?!\w)"


class Speech:
    """The words that are on a model, with what it takes to get them off again. `asked` may name one twice."""

    def __init__(self, model: Model, words: Sequence[Word], *, asked: Sequence[Word]) -> None:
        self.words, self.asked = list(words), list(asked)
        self.tokenizers = model.tokenizers
        encoders = {part: module for part, module in model.parts.items() if part != "unet"}
        model.tokenizers = [_knowing(tokenizer, words) for tokenizer in self.tokenizers]
        self._taps = [
            _Tap(encoder, [word.vectors[part] for word in words], first=len(tokenizer))
            for (part, encoder), tokenizer in zip(encoders.items(), self.tokenizers, strict=True)
        ]

    def end(self, model: Model) -> None:
        """Take the words off."""
        model.tokenizers = self.tokenizers
        for tap in self._taps:
            tap.remove()


def united(words: Iterable[Word]) -> list[Word]:
    """The words, one that comes twice with the same vectors once. Raises UserError for two of one name that differ."""
    found: dict[str, Word] = {}
    for word in words:
        other = found.setdefault(word.text.lower(), word)
        if other is not word and not other.is_same(word):
            raise UserError(
                f'Two adapters bring the word "{word.text}".',
                "Each has learned vectors of its own for it.",
                "Use one of them.",
            )
    return list(found.values())


def set_words(model: Model, words: Sequence[Word]) -> None:
    """Have exactly these words on the model. Raises UserError as `united`; then the model is as it was."""
    wanted = united(words)
    speech: Speech | None = model.speech
    if speech is not None and speech.words == wanted:
        speech.asked = list(words)
        return
    if speech is not None:
        speech.end(model)
    model.speech = Speech(model, wanted, asked=words) if wanted else None


def add_words(model: Model, words: Sequence[Word]) -> None:
    """Let the model know these words beside those it knows already. Raises UserError as `set_words` does."""
    set_words(model, [*_asked(model), *words])


def take_words(model: Model, words: Sequence[Word]) -> None:
    """The inverse of `add_words`."""
    left = _asked(model)
    for word in words:
        left.remove(word)
    set_words(model, left)


@contextmanager
def spoken(model: Model, words: Sequence[Word]) -> Iterator[None]:
    """While the body runs the model knows these words too."""
    add_words(model, words)
    try:
        yield
    finally:
        take_words(model, words)


@contextmanager
def reading_only(outline: Model, word: Word) -> Iterator[None]:
    """While the body runs, an outline's text encoders read nothing but the word: its tokenizers know no others."""
    taps = [_Tap(outline.parts[part], [vectors], first=0) for part, vectors in word.vectors.items()]
    try:
        yield
    finally:
        for tap in taps:
            tap.remove()


def _asked(model: Model) -> list[Word]:
    return [] if model.speech is None else list(model.speech.asked)


def _knowing(tokenizer: Any, words: Sequence[Word]) -> Any:  # Any: transformers' tokenizers
    """A copy of a tokenizer that knows the words: each becomes its signs, each sign one number, in order."""
    from tokenizers import AddedToken, Regex, normalizers

    taught = copy.deepcopy(tokenizer)
    backend = taught.backend_tokenizer
    steps = [] if backend.normalizer is None else [backend.normalizer]
    signs: list[str] = []
    replaced = []
    for word in words:
        own = "".join(chr(_FIRST_SIGN + len(signs) + n) for n in range(word.count))
        signs += list(own)
        replaced.append((word.text, own))
    for text, own in sorted(replaced, key=lambda pair: -len(pair[0])):  # "sks toy" goes before "sks"
        steps.append(normalizers.Replace(Regex(_pattern(text)), own))
    backend.normalizer = normalizers.Sequence(steps)
    taught.add_tokens([AddedToken(sign, normalized=True, special=False) for sign in signs])
    return taught


class _Tap:
    """Hooks on one text encoder: numbers from `first` on stand for vectors, in order."""

    def __init__(self, encoder: nn.Module, vectors: Sequence[Tensor], *, first: int) -> None:
        self._vectors, self._first = vectors, first
        self._slots: Tensor | None = None
        table = encoder.get_input_embeddings()  # type: ignore[operator]  # transformers' models have it
        assert isinstance(table, nn.Module)
        self._handles = [
            encoder.register_forward_pre_hook(self._before, with_kwargs=True),
            table.register_forward_hook(self._embedded),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(
        self, encoder: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:  # Any: whatever the encoder takes
        """The vocabulary's numbers go on; CLIP finds a caption's end by its number, so 0 stands for the others."""
        ids = named["input_ids"] if "input_ids" in named else args[0]
        self._slots = ids - self._first
        known = torch.where(self._slots < 0, ids, torch.zeros_like(ids))
        if "input_ids" in named:
            return args, {**named, "input_ids": known}
        return (known, *args[1:]), named

    def _embedded(self, table: nn.Module, args: tuple[Any, ...], rows: Tensor) -> Tensor:
        """Table rows (captions, tokens, width) with the vectors where the words are."""
        slots = self._slots
        if slots is None or slots.shape != rows.shape[:-1]:  # asked for by somebody else than the encoder
            return rows
        vectors = torch.cat([vector.to(rows) for vector in self._vectors])
        return torch.where((slots >= 0).unsqueeze(-1), vectors[slots.clamp_min(0)], rows)
