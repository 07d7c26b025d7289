"""A model's outline: its parts without weights, on the meta device, from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.checkpoint import read_header
from reparam_diffusion.models.eightbit import to_8bit
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.parts import empty_parts, make_scheduler, read_json, shape_key
from reparam_diffusion.models.quiet import quiet
from reparam_diffusion.models.source import Source, find_source


def outline(
    path_or_id: str | Path,
    *,
    fetch: bool = False,
    dtype: torch.dtype = torch.float32,
    base_8bit: bool = False,
) -> Model:
    """The model with shapes and no numbers: enough to plan adapters and to count memory. Raises UserError.

    `dtype` is the UNet's and the text encoders'; `base_8bit` as in load_model. A hub id's configuration must be on this
    machine, unless it may be fetched.
    """
    source = find_source(path_or_id, fetch=fetch)
    return _outline(source, shape_key(source.configs), dtype, base_8bit)


def shape_of(path_or_id: str | Path) -> str:
    """The key of the model's geometry."""
    return shape_key(find_source(path_or_id, fetch=False).configs)


@lru_cache(maxsize=6)
def _outline(source: Source, shape: str, dtype: torch.dtype, base_8bit: bool) -> Model:
    with quiet(), torch.device("meta"):
        parts = empty_parts(source.configs)
        for module in (parts.unet, *parts.text_encoders):
            module.to(dtype)
    for module in (parts.unet, parts.vae, *parts.text_encoders):
        module.requires_grad_(False).eval()
    if base_8bit:
        to_8bit(parts.unet)
    return Model(
        name=source.name,
        unet=parts.unet,
        vae=parts.vae,
        text_encoders=parts.text_encoders,
        tokenizers=[_Blank(encoder.config.max_position_embeddings) for encoder in parts.text_encoders],
        scheduler=make_scheduler(source.configs),
        device=torch.device("meta"),
        dtype=dtype,
        habits=source.habits,
        folder=source.folder,
    )


def outline_vae(path: str) -> Any:
    """A VAE's outline from the folder that is to replace a model's own; None where there is no such folder.

    A single file says only what fits the model's own. Any: diffusers' class.
    """
    home = Path(path).expanduser()
    places = (home / "vae" / "config.json", home / "config.json") if path else ()
    file = next((file for file in places if file.is_file()), None)
    if file is None:
        return None
    from diffusers import AutoencoderKL

    with quiet(), torch.device("meta"):
        vae = AutoencoderKL.from_config(read_json(file))
    return vae.requires_grad_(False).eval()


def check_vae(path: str) -> None:
    """Raise UserError, at model.vae, for a VAE that is not there or is none. Empty: the model's own."""
    if not path:
        return
    home = Path(path).expanduser()
    what, place = f'There is no VAE at "{path}".', "model.vae"
    if home.is_dir():
        if not any((home / name).is_file() for name in ("vae/config.json", "config.json")):
            raise UserError(what, "The folder has no config.json.", "Give a VAE's folder or file.", place=place)
        return
    if not home.is_file():
        raise UserError(what, do="Check the path, or leave it empty for the model's own.", place=place)
    try:
        read_header(home)
    except UserError as error:
        raise UserError(error.what, error.why, error.do, place=place) from None


class _Blank:
    """A tokenizer that knows its length and no words."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, captions: Sequence[str], **_: object) -> SimpleNamespace:
        ids = torch.zeros(len(captions), self.model_max_length, dtype=torch.long, device="meta")
        return SimpleNamespace(input_ids=ids)
