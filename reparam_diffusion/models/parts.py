"""A model's parts from its configuration: a folder in diffusers' layout, with or without weights beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reparam_diffusion.errors import UserError

ASSETS = Path(__file__).resolve().parents[2] / "assets"
MODEL_CONFIGS = ASSETS / "model-configs"
"""A folder in diffusers' layout, without weights, for each kind of single file."""
VOCABULARY = ASSETS / "clip-vocabulary"
"""CLIP's, for models that bring no tokenizer."""
TEXT_PARTS = ("text_encoder", "text_encoder_2")


@dataclass
class Parts:
    """What a Model is made of. Any: diffusers' and transformers' classes are not imported here."""

    unet: Any
    vae: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler: Any


def empty_parts(configs: Path) -> Parts:
    """Fresh modules, on the device of the caller's context; no tokenizers and no scheduler."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    texts = [read_config(configs, part) for part in TEXT_PARTS]
    return Parts(
        unet=UNet2DConditionModel.from_config(read_config(configs, "unet")),
        vae=AutoencoderKL.from_config(read_config(configs, "vae")),
        text_encoders=[kind(CLIPTextConfig.from_dict(text)) for kind, text in zip(kinds, texts, strict=True) if text],
        tokenizers=[],
        scheduler=None,
    )


def make_scheduler(configs: Path, **changes: object) -> Any:
    """The scheduler of a model folder, with these settings changed."""
    import diffusers

    config = read_json(configs / "scheduler" / "scheduler_config.json")
    kind = getattr(diffusers, str(config.get("_class_name")), diffusers.DDIMScheduler)
    return kind.from_config(config, **changes)


def clip_tokenizers(configs: Path) -> list[Any]:
    """CLIP's tokenizers with each one's padding, from the shared vocabulary."""
    from transformers import CLIPTokenizer

    files = [configs / name / "tokenizer_config.json" for name in ("tokenizer", "tokenizer_2")]
    tokenizers = []
    for setting in (read_json(file) for file in files if file.is_file()):
        # OpenCLIP fills up with "!", number 0. As a special token it would also take every "!" of a prompt for filling.
        kind: Any = type("ClipTokenizer", (CLIPTokenizer,), {"pad_token_id": setting["pad_token_id"]})
        tokenizer = kind.from_pretrained(VOCABULARY, model_max_length=setting["model_max_length"])
        tokenizers.append(tokenizer)
    return tokenizers


def shape_key(configs: Path) -> str:
    """A short hash of everything that shapes a model: equal for all models of one geometry."""
    digest = hashlib.sha256()
    for part in ("unet", "vae", *TEXT_PARTS):
        config = {name: value for name, value in read_config(configs, part).items() if not name.startswith("_")}
        digest.update(json.dumps([part, config], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def read_config(configs: Path, part: str) -> dict[str, Any]:
    """A part's configuration; empty for a second text encoder that is not there."""
    file = configs / part / "config.json"
    return {} if part == "text_encoder_2" and not file.is_file() else read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """A small file of a model. Raises UserError when it is missing or damaged."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{file} is missing.", "A model folder needs it.", "Get the model again.") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged.", f"It is not JSON: {error}.", "Download the model again.") from None
    return found
