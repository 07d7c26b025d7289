"""Opening adapter files: one .safetensors, a PEFT folder, or a folder with a PEFT folder for each model part."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.mapped import Mapped, open_mapped

Config = dict[str, Any]  # Any: a JSON object of PEFT's

FOLDERS = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
"""Names of a pipeline's folders -> our names of the parts."""
_CLASSES = {"UNet2DConditionModel": "unet", "CLIPTextModel": "te1", "CLIPTextModelWithProjection": "te2"}
_PICKLES = (".pt", ".pth", ".ckpt", ".bin")
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Piece:
    """One file's tensors, the part they are for ("" when only their names tell), and PEFT's configuration of it."""

    file: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    part: str = ""
    config: Config | None = None
    part_configs: dict[str, Config] = field(default_factory=dict)
    """diffusers' `lora_adapter_metadata`: a configuration for each part."""
    mapped: Mapped | None = None


def open_pieces(path: Path) -> list[Piece]:
    """Everything that makes up an adapter at `path`. Raises UserError when there is nothing to read."""
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"There is no adapter at {path}.", do="Check the path.")
    if path.suffix.lower() in _PICKLES:
        raise UserError(
            f"{path.name} is not opened.",
            "Files of this kind can run programs when they are read.",
            "Convert it to .safetensors first, with the program that made it.",
        )
    config = path.parent / _CONFIG
    if path.name == _WEIGHTS and config.is_file():
        return [_open_peft(path.parent)]
    return [_open_file(path)]


def _open_folder(folder: Path) -> list[Piece]:
    parts = [folder / name for name in FOLDERS if (folder / name / _CONFIG).is_file()]
    if parts:
        return [_open_peft(part) for part in parts]
    if (folder / _CONFIG).is_file():
        return [_open_peft(folder)]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return [_open_file(files[0])]
    why = "It has no adapter_config.json and no .safetensors file." if not files else f"It has {len(files)} files."
    raise UserError(f"{folder.name} is no adapter folder.", why, "Choose one .safetensors file, or a PEFT folder.")


def _open_peft(folder: Path) -> Piece:
    weights = folder / _WEIGHTS
    if not weights.is_file():
        pickled = any((folder / f"adapter_model{end}").is_file() for end in _PICKLES)
        why = "It only has a pickled file, which is not opened." if pickled else f"{_WEIGHTS} is missing."
        raise UserError(f"The PEFT folder {folder.name} cannot be read.", why, "Save it again as .safetensors.")
    config = _json_object((folder / _CONFIG).read_bytes(), folder / _CONFIG)
    mapping = config.get("auto_mapping")
    named = mapping.get("base_model_class", "") if isinstance(mapping, dict) else ""
    part = FOLDERS.get(folder.name) or _CLASSES.get(named, "")
    piece = _open_file(weights)
    return Piece(weights, piece.tensors, piece.metadata, part, config, mapped=piece.mapped)


def _open_file(file: Path) -> Piece:
    mapped = open_mapped(file)
    configs = _diffusers_configs(mapped.metadata, file)
    return Piece(file, mapped.tensors, mapped.metadata, part_configs=configs, mapped=mapped)


def _diffusers_configs(metadata: dict[str, str], file: Path) -> dict[str, Config]:
    """`lora_adapter_metadata` as diffusers writes it: keys "unet.r", "text_encoder.lora_alpha", …"""
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    configs: dict[str, Config] = {}
    for key, value in _json_object(text.encode(), file).items():
        folder, _, option = key.partition(".")
        if folder in FOLDERS and option:
            configs.setdefault(FOLDERS[folder], {"peft_type": "LORA"})[option] = value
    return configs


def _json_object(text: bytes, file: Path) -> Config:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file.name} cannot be read.", f"Its configuration is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file.name} cannot be read.", "Its configuration is not a JSON object.")
    return value
