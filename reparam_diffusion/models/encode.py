"""Captions to what the UNet reads: hidden states, and for SDXL also the pooled embedding and the time ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.load import Model


@dataclass(frozen=True)
class Encoded:
    """`hidden` (captions, tokens, width); `pooled` (captions, width) for SDXL, else None."""

    hidden: Tensor
    pooled: Tensor | None

    def pick(self, index: Sequence[int]) -> Encoded:
        """These captions only, in this order."""
        rows = list(index)
        return Encoded(self.hidden[rows], None if self.pooled is None else self.pooled[rows])


def encode(model: Model, captions: Sequence[str], *, clip_skip: int = 0) -> Encoded:
    """Encode captions as diffusers' pipelines do. `clip_skip` leaves out that many last layers.

    SD 1.x and 2.x read the last layer after the final norm; SDXL reads the last but one of both encoders, no norm.
    """
    with model.using(*model.text_encoders):
        if model.family != "sdxl":
            return Encoded(_hidden_normed(model, captions, clip_skip), None)
        states, pooled = [], None
        for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
            out = encoder(_tokens(tokenizer, captions, model.device), output_hidden_states=True)
            states.append(out.hidden_states[-(clip_skip + 2)])
            pooled = out[0]  # the last encoder's projection
        return Encoded(torch.cat(states, dim=-1), pooled)


def _tokens(tokenizer: Any, captions: Sequence[str], device: torch.device) -> Tensor:
    """(captions, the model's own number of tokens)."""
    length = tokenizer.model_max_length
    ids = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return ids.input_ids.to(device)


def _hidden_normed(model: Model, captions: Sequence[str], clip_skip: int) -> Tensor:
    encoder = model.text_encoders[0]
    ids = _tokens(model.tokenizers[0], captions, model.device)
    if not clip_skip:
        return encoder(ids)[0]
    out = encoder(ids, output_hidden_states=True)
    inner = getattr(encoder, "text_model", encoder)  # transformers 5.6 made CLIPTextModel flat
    return inner.final_layer_norm(out.hidden_states[-(clip_skip + 1)])


def last_layers(model: Model, *, clip_skip: int) -> dict[str, int]:
    """The last text encoder layer that reaches the loss; those after it are left out when planning."""
    layers = [encoder.config.num_hidden_layers for encoder in model.text_encoders]
    most = min(layers) - (1 if model.family != "sdxl" else 2)
    if clip_skip > most:
        raise UserError(
            f"clip_skip {clip_skip} leaves nothing of this text encoder.",
            f"It has {min(layers)} layers.",
            f"Use at most {most}.",
            place="model.clip_skip",
        )
    if model.family != "sdxl":
        return {"te1": layers[0] - 1 - clip_skip}
    return {"te1": layers[0] - 2 - clip_skip, "te2": layers[1] - 1}  # te2's pooled output uses every layer


def time_ids(model: Model, *, original: tuple[int, int], corner: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """SDXL's size conditioning (6,): original height and width, crop top and left, target height and width; pixels.

    In fp32, as the UNet takes sines of them: bf16 would round 1365 pixels to 1368.
    """
    return torch.tensor([*original, *corner, *target], dtype=torch.float32, device=model.device)


def is_too_long(model: Model, caption: str) -> bool:
    """Whether the caption has more tokens than the model reads."""
    lengths = [(len(t(caption, verbose=False).input_ids), t.model_max_length) for t in model.tokenizers]
    return any(length > most for length, most in lengths)
