"""Prompts with weights, and prompts longer than the model reads, through compel: for drawing, never for training.

A1111's and compel's ways to write a weight are both understood; see `parse`. compel moves a word's embedding away from
the empty prompt's (or, below 1, towards the prompt without it), and reads a long prompt in pieces of the model's length
whose embeddings are put one behind the other. A plain prompt that fits is encoded as ever, to the bit.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.encode import Encoded, encode, is_too_long, read_tokens
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.quiet import quiet

Piece = tuple[str, float]
"""Words, and how much they count; 1 is plain."""

ONCE = 1.1
"""What one pair of brackets, or one + or -, multiplies by."""
MISSING = "Weights and long prompts need compel: pip install -r requirements-extras.txt"
_MARK = re.compile(r"\\[()\[\]\\]|[()\[\]]|[^\\()\[\]]+|\\")
_INSIDE = re.compile(r"(.*):\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*", re.DOTALL)
_BEHIND = re.compile(r"(\d+\.?\d*|\.\d+|\++|-+)(?=[\s,.;:!?)\]]|$)")
_SIGNED = re.compile(r"(?<![^\s,;:+])([^\s,;:+]*[^\W\d_])(\++|--+)(?=[\s,.;:!?)\]]|$)")
_CHANGING = re.compile(r"(?<!\\)\[(?:[^\[\]|]*\|[^\[\]]*|[^\[\]]*:\s*(?:\d+(?:\.\d*)?|\.\d+)\s*)\]")
"""A1111's [from:to:when], [to:when], [from::when] and [one|other]."""
_BREAK = re.compile(r"\bBREAK\b")


# --- what is written -------------------------------------------------------------------------------------------------
def parse(prompt: str) -> list[list[Piece]]:
    """The parts of a prompt between BREAKs, each as words with their weights.

    (word:1.3) and (word)1.3 count 1.3 times, (word) and word+ 1.1 times, [word] and word-- less, nested ones multiply.
    A backslash before a bracket makes it a plain one, and so does its missing other half. Raises UserError for a
    weight below 0.
    """
    return [_joined(_pieces(part)) for part in _BREAK.split(prompt)]


@dataclass
class _Open:
    """An opening bracket, and what stands behind it so far."""

    bracket: str
    pieces: list[Piece]


def _pieces(text: str) -> list[Piece]:
    stack = [_Open("", [])]
    at = 0
    while match := _MARK.match(text, at):
        mark, at = match.group(), match.end()
        is_pair = len(stack) > 1 and stack[-1].bracket + mark in ("()", "[]")
        if mark in ("(", "["):
            stack.append(_Open(mark, []))
        elif is_pair:
            inside = stack.pop().pieces
            behind = _BEHIND.match(text, at) if mark == ")" else None
            at = behind.end() if behind else at
            stack[-1].pieces += _weighed(mark, inside, behind.group() if behind else "")
        else:
            plain = mark[1:] if len(mark) == 2 and mark[0] == "\\" else mark
            stack[-1].pieces += _signed(plain)
    while len(stack) > 1:  # brackets that nobody closed are letters
        left = stack.pop()
        stack[-1].pieces += [(left.bracket, 1.0), *left.pieces]
    return stack[0].pieces


def _weighed(mark: str, inside: list[Piece], behind: str) -> list[Piece]:
    """What stood in a pair of brackets, with the weight that is said in it or behind it."""
    weight = 1 / ONCE if mark == "]" else ONCE
    if behind:
        weight = (ONCE if behind[0] == "+" else 0.9) ** len(behind) if behind[0] in "+-" else float(behind)
    elif mark == ")" and inside and (said := _INSIDE.fullmatch(inside[-1][0])):
        inside, weight = [*inside[:-1], (said[1], inside[-1][1])], float(said[2])
    if weight < 0:
        what = f"The weight {weight:g} in the prompt is below 0."
        raise UserError(what, do="Write what should not be there into the negative prompt.")
    return [(words, own * weight) for words, own in inside]


def _signed(text: str) -> list[Piece]:
    """Plain words, of which some end in + or --."""
    pieces: list[Piece] = []
    at = 0
    for match in _SIGNED.finditer(text):
        base = ONCE if match[2][0] == "+" else 0.9
        pieces += [(text[at : match.start()], 1.0), (match[1], base ** len(match[2]))]
        at = match.end()
    return [*pieces, (text[at:], 1.0)]


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one weight as one piece; at least one, which may be empty."""
    joined: list[Piece] = []
    for words, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + words, weight)
        elif words.strip() or (words and joined):
            joined.append((words, weight))
    return [(" ".join(words.split()), weight) for words, weight in joined if words.strip()] or [("", 1.0)]


def plain(prompt: str) -> str:
    """The words of a prompt without what says their weights."""
    parts = [" ".join(words for words, _ in part) for part in parse(prompt)]
    return " ".join(part for part in parts if part)


def is_weighted(prompt: str) -> bool:
    """Whether a prompt says weights, or BREAK."""
    parts = parse(prompt)
    return len(parts) > 1 or any(weight != 1 for _, weight in parts[0])


# --- what is read ----------------------------------------------------------------------------------------------------
def has_compel() -> bool:
    """Whether compel is installed."""
    return importlib.util.find_spec("compel") is not None


def notes_on(model: Model, prompt: str, negative: str | None = None) -> list[str]:
    """What of a prompt and its negative has no effect here, in a sentence each."""
    notes = []
    for name, text in (("prompt", prompt), ("negative prompt", negative or "")):
        if change := _CHANGING.search(text):
            notes.append(f"{change.group()} in the {name} does not change while drawing: it is read as letters are.")
        if has_compel():
            continue
        if is_weighted(text):
            notes.append(f"The weights in the {name} have no effect. {MISSING}.")
        if is_too_long(model, plain(text)):
            notes.append(f"The {name} is longer than this model reads; its end has no effect. {MISSING}.")
    return notes


def encode_prompts(model: Model, prompts: Sequence[str], *, clip_skip: int = 0) -> Encoded:
    """As `encode`, with weights, and whole where they are too long; all padded to the longest."""
    words = [plain(prompt) if is_weighted(prompt) or "\\" in prompt else prompt for prompt in prompts]
    special = [is_weighted(prompt) or is_too_long(model, text) for prompt, text in zip(prompts, words, strict=True)]
    usual = encode(model, words, clip_skip=clip_skip)
    if not any(special) or not has_compel():
        return usual
    rows = [
        _hidden(model, parse(prompt), clip_skip) if is_special else usual.hidden[n : n + 1]
        for n, (prompt, is_special) in enumerate(zip(prompts, special, strict=True))
    ]
    empty = encode(model, [""], clip_skip=clip_skip).hidden
    longest = max(row.shape[1] for row in rows)
    padded = [torch.cat([row, *[empty] * ((longest - row.shape[1]) // empty.shape[1])], dim=1) for row in rows]
    return Encoded(torch.cat(padded), usual.pooled)


def _hidden(model: Model, parts: list[list[Piece]], clip_skip: int) -> Tensor:
    """(1, tokens, width): every part's chunks one behind the other, the encoders' widths side by side."""
    from compel import Compel  # type: ignore[import-untyped]  # it ships no types
    from compel.prompt_parser import FlattenedPrompt  # type: ignore[import-untyped]  # as above

    wide = []
    for number, tokenizer in enumerate(model.tokenizers):
        reader = _Reader(model, number, clip_skip)
        compel = Compel(tokenizer=tokenizer, text_encoder=reader, truncate_long_prompts=False)
        prompts = [FlattenedPrompt(list(part)) for part in parts]
        with quiet():  # a text longer than the model reads is what it is for
            rows = [compel.build_conditioning_tensor_for_prompt_object(prompt)[0][0] for prompt in prompts]
        wide.append(torch.cat(rows, dim=1))
    return torch.cat(wide, dim=-1)


class _Reader:
    """A text encoder as compel calls one; its hidden state is the layer that this model's UNet reads."""

    def __init__(self, model: Model, number: int, clip_skip: int) -> None:
        self.model, self.number, self.clip_skip = model, number, clip_skip
        self.device, self.dtype = model.device, model.dtype

    def __call__(self, ids: Tensor, mask: Tensor | None = None, **_: Any) -> SimpleNamespace:  # Any: compel's wishes
        hidden, _pooled = read_tokens(self.model, self.number, ids, clip_skip=self.clip_skip, mask=mask)
        return SimpleNamespace(last_hidden_state=hidden)
