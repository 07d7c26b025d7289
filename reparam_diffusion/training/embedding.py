"""The trigger word as learned vectors, trained along with the adapters: textual inversion in one run with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reparam_diffusion.config import TrainConfig
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.words import Word, has_word
from reparam_diffusion.training.start import PLACE


def new_word(model: Model, config: TrainConfig, *, start: Path | None = None) -> Word | None:
    """The trigger word as it begins: the vectors of ordinary words, fp32, on the model's device; None when it is off.

    It begins as the settings' words, else as its own pieces in the vocabulary; the class word is a worse start, as
    docs/formats.md has it measured. More tokens than vectors are cut; with fewer they come again. An adapter to train
    on from (`start`) brings its own vectors. Raises UserError for a trigger that cannot be learned.
    """
    settings, data = config.embedding, config.data
    known = [] if start is None else _words_in(start, model)
    for word in known:
        if not settings.vectors or word.text != data.trigger or len(known) > 1:
            raise UserError(
                f'The adapter to train on from has learned the word "{word.text}".',
                "A run learns one such word, its trigger.",
                f'Set the trigger word to "{word.text}" and embedding.vectors to {word.count}.',
                place="embedding.vectors",
            )
    if not settings.vectors:
        return None
    check_trigger(config)
    if known:
        own = known[0].vectors.items()
        return Word(data.trigger, {part: nn.Parameter(rows.to(model.device)) for part, rows in own})
    text = settings.words or data.trigger
    encoders = [(part, encoder) for part, encoder in model.parts.items() if part != "unet"]
    vectors = {
        part: nn.Parameter(_rows_of(text, tokenizer, encoder, count=settings.vectors).to(model.device))
        for (part, encoder), tokenizer in zip(encoders, model.tokenizers, strict=True)
    }
    return Word(data.trigger, vectors)


def blank_word(outline: Model, config: TrainConfig) -> Word | None:
    """The word of an outline: vectors with a shape and no numbers."""
    if not config.embedding.vectors:
        return None
    shapes = {
        f"te{n}": (config.embedding.vectors, e.config.hidden_size) for n, e in enumerate(outline.text_encoders, 1)
    }
    return Word(config.data.trigger, {p: nn.Parameter(torch.empty(s, device="meta")) for p, s in shapes.items()})


def count_vectors(model: Model, config: TrainConfig) -> int:
    """How many numbers the word's vectors have; `model` may be an outline."""
    widths = sum(encoder.config.hidden_size for encoder in model.text_encoders)
    return config.embedding.vectors * int(widths)


def _words_in(file: Path, model: Model) -> list[Word]:
    words, left = read_adapter(file).words_for(model.parts)
    if left:
        raise UserError("The adapter to train on from does not fit this base model.", f"{left[0][1]}.", place=PLACE)
    return words


def _rows_of(text: str, tokenizer: Any, encoder: Any, *, count: int) -> Tensor:  # Any: transformers' classes
    """The table's rows (count, width) for a text."""
    numbers = tokenizer(text, add_special_tokens=False).input_ids
    if not numbers:
        raise UserError(
            f'"{text}" is no word for this model.', do="Choose another word to begin from.", place="embedding.words"
        )
    cycled = [numbers[n % len(numbers)] for n in range(count)]
    rows: Tensor = encoder.get_input_embeddings().weight.detach()[cycled]
    return rows.float().clone()


def check_trigger(config: TrainConfig) -> None:
    """Raise UserError for a trigger word that is to be learned and cannot be."""
    data, trigger = config.data, config.data.trigger
    if not config.embedding.vectors:
        return
    class_words = " ".join([data.class_word, config.prior.prompt, *(one.class_word or "" for one in data.sets)])
    if not trigger:
        raise UserError(
            "There is no trigger word to learn.", do="Write one, or set embedding.vectors to 0.", place="data.trigger"
        )
    if "." in trigger:
        raise UserError(
            f'The trigger word "{trigger}" has a dot, which its place in the file cannot have.',
            do="Choose a word without one.",
            place="data.trigger",
        )
    if has_word(class_words, trigger):
        raise UserError(
            f'The trigger word "{trigger}" is also used for the class.',
            "Learned vectors would change what the class word means.",
            "Choose a made-up trigger word.",
            place="data.trigger",
        )


def check_captions(config: TrainConfig, captions: Sequence[str]) -> None:
    """Raise UserError when the trigger word is to be learned and no caption has it."""
    trigger = config.data.trigger
    if config.embedding.vectors and not any(has_word(caption, trigger) for caption in captions):
        raise UserError(
            f'No caption has the trigger word "{trigger}".',
            "It cannot be learned where it is not shown.",
            "Write it into the captions, or set embedding.vectors to 0.",
            place="embedding.vectors",
        )
