"""A model's outline: its parts without weights, on the meta device, from its configuration alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.habits import read_habits
from reparam_diffusion.models.load import STARTER, Model, quiet

_CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
)


def configs_of(path_or_id: str | Path, *, fetch: bool = False) -> Path:
    """The folder that holds a model's configuration. Raises UserError when there is none.

    A hub id's is looked up in the local cache; `fetch` gets it from the hub, a few kilobytes.
    """
    source = STARTER if str(path_or_id) == "starter" else Path(path_or_id).expanduser()
    if source.is_dir() or source.exists():
        return source
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=list(_CONFIGS), local_files_only=not fetch))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f'The model "{path_or_id}" is not on this machine yet.',
            str(error).strip().splitlines()[0],
            "Check the path, or load the model once.",
        ) from None


def outline(path_or_id: str | Path, *, fetch: bool = False) -> Model:
    """The model with shapes and no numbers: enough to plan adapters and to count memory. Raises UserError."""
    configs = configs_of(path_or_id, fetch=fetch)
    return _outline(configs, str(path_or_id), shape_key(configs))


def shape_key(configs: Path) -> str:
    """A short hash of everything that shapes a model: equal for all models of one geometry."""
    digest = hashlib.sha256()
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        config = {name: value for name, value in _config(configs, part).items() if not name.startswith("_")}
        digest.update(json.dumps([part, config], sort_keys=True).encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=4)
def _outline(configs: Path, name: str, key: str) -> Model:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    texts = [_config(configs, part) for part in ("text_encoder", "text_encoder_2")]
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    with quiet(), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(_config(configs, "unet"))
        vae = AutoencoderKL.from_config(_config(configs, "vae"))
        encoders = [kind(CLIPTextConfig.from_dict(text)) for kind, text in zip(kinds, texts, strict=True) if text]
    with quiet():
        scheduler = DDIMScheduler.from_config(_read(configs / "scheduler" / "scheduler_config.json"))
    for module in (unet, vae, *encoders):
        module.requires_grad_(False).eval()
    return Model(
        name=Path(name).name,
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=[_Blank(encoder.config.max_position_embeddings) for encoder in encoders],
        scheduler=scheduler,
        device=torch.device("meta"),
        dtype=torch.float32,
        habits=read_habits(configs),
        folder=configs,
    )


class _Blank:
    """A tokenizer that knows its length and no words."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, captions: Sequence[str], **_: object) -> SimpleNamespace:
        ids = torch.zeros(len(captions), self.model_max_length, dtype=torch.long, device="meta")
        return SimpleNamespace(input_ids=ids)


def _config(configs: Path, part: str) -> dict[str, Any]:
    """A part's configuration; empty for a second text encoder that is not there."""
    file = configs / part / "config.json"
    return {} if part == "text_encoder_2" and not file.is_file() else _read(file)


def _read(file: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{file} cannot be read.", "A model folder needs it.", "Get the model again.") from None
    return config
