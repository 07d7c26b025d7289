"""Learned words inside an adapter file, in A1111's bundle form, and by themselves as textual inversion files.

SD 1 and 2: "bundle_emb.<word>.string_to_param.*"; SDXL: "bundle_emb.<word>.clip_l" and ".clip_g"; (vectors, width).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from reparam_diffusion.formats.container import TensorFile
from reparam_diffusion.formats.names import Family, Parts
from reparam_diffusion.models.words import Word

PREFIX = "bundle_emb."
_KEY = re.compile(r"bundle_emb\.(?P<word>.+?)\.(?P<leaf>string_to_param\..+|emb_params|clip_l|clip_g)")
_PART_OF = {"clip_l": "te1", "clip_g": "te2"}
_LEAF_OF = {"te1": "clip_l", "te2": "clip_g"}
Unmatched = list[tuple[str, str]]


def bundled(word: Word, family: Family) -> dict[str, Tensor]:
    """A word's tensors as a file has them."""
    start = f"{PREFIX}{word.text}."
    if family != "sdxl":
        return {f"{start}string_to_param.*": word.vectors["te1"].detach()}
    return {f"{start}{_LEAF_OF[part]}": vectors.detach() for part, vectors in word.vectors.items()}


def unbundled(tensors: Mapping[str, Tensor]) -> tuple[list[Word], Unmatched]:
    """The words in a file's tensors, and which of their tensors cannot be read with why."""
    found: dict[str, dict[str, Tensor]] = {}
    left: Unmatched = []
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            continue
        parsed = _KEY.fullmatch(key)
        if parsed is None:
            left.append((key, "it is a textual inversion packed in a form that is not known"))
        elif tensor.ndim not in (1, 2) or not tensor.numel() or not bool(torch.isfinite(tensor.float()).all()):
            left.append((key, f"its shape {tuple(tensor.shape)} or its values are no vectors"))
        else:
            part = _PART_OF.get(parsed["leaf"], "te1")
            found.setdefault(parsed["word"], {})[part] = tensor.detach().float().reshape(-1, tensor.shape[-1]).clone()
    words = [Word(text, vectors) for text, vectors in found.items()]
    for word in [word for word in words if len({len(vectors) for vectors in word.vectors.values()}) > 1]:
        left.append((f"{PREFIX}{word.text}", "it has more vectors for one text encoder than for the other"))
        words.remove(word)
    return words, left


def fitting(words: Iterable[Word], parts: Parts) -> tuple[list[Word], Unmatched]:
    """The words that a model's text encoders can read, and the others with why."""
    widths = {part: _width(module) for part, module in parts.items() if part != "unet"}
    right, left = [], []
    for word in words:
        own = {part: vectors.shape[1] for part, vectors in word.vectors.items()}
        if own == widths:
            right.append(word)
        else:
            told = " and ".join(str(width) for width in own.values())
            wanted = " and ".join(str(width) for width in widths.values())
            why = f"its vectors have {told} numbers, this model's text encoders read {wanted}"
            left.append((f"{PREFIX}{word.text}", why))
    return right, left


def _width(encoder: torch.nn.Module) -> int:
    table = encoder.get_input_embeddings()  # type: ignore[operator]  # transformers' models have it
    return int(table.embedding_dim)


def write_embedding(path: Path, word: Word, family: Family) -> Path:
    """A word by itself, as A1111, ComfyUI and diffusers' `load_textual_inversion` open it, in fp32.

    SD 1 and 2 have one tensor under the word's name; SDXL has "clip_l" and "clip_g", which diffusers takes one by one.
    """
    tensors = {word.text: word.vectors["te1"]}
    if family == "sdxl":
        tensors = {_LEAF_OF[part]: vectors for part, vectors in word.vectors.items()}
    with TensorFile(path) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor.detach().float().cpu())
        return file.finish({"format": "pt", "modelspec.trigger_phrase": word.text})


def embedding_paths(file: Path, count: int) -> list[Path]:
    """Where `write_beside` puts the learned words of an adapter."""
    stem = file.name.removesuffix(".safetensors")
    numbers = ["", *(f"-{number}" for number in range(2, count + 1))][:count]
    return [file.with_name(f"{stem}-embedding{number}.safetensors") for number in numbers]


def write_beside(file: Path, words: Sequence[Word], family: Family) -> list[Path]:
    """Each word of an adapter by itself beside its file: teddy-embedding.safetensors, or -embedding-2 and so on."""
    paths = embedding_paths(file, len(words))
    return [write_embedding(path, word, family) for path, word in zip(paths, words, strict=True)]
