"""Where a base model comes from: the starter, a folder in diffusers' layout, a single file, or the hub."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.checkpoint import Checkpoint, read_checkpoint
from reparam_diffusion.models.habits import Habits, read_habits
from reparam_diffusion.models.parts import ASSETS, read_json

STARTER = ASSETS / "starter-model"

_CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
)
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_OTHERS = {
    "Inpaint": "an inpainting model",
    "InstructPix2Pix": "an editing model (InstructPix2Pix)",
    "XLImg2Img": "the SDXL refiner",
    "Upscale": "an upscaler",
    "Depth2Img": "a depth model",
    "StableDiffusion3": "a Stable Diffusion 3 model",
    "Flux": "a Flux model",
}
"""Piece of a pipeline's name -> what such a model is."""


@dataclass(frozen=True)
class Source:
    """`configs` is a folder with the configuration; the weights are in `folder`, in `checkpoint`, or on the hub."""

    name: str
    configs: Path
    folder: Path | None = None
    checkpoint: Checkpoint | None = None

    @property
    def habits(self) -> Habits:
        """What the model is used to."""
        return read_habits(self.folder)


def find_source(path_or_id: str | Path, *, fetch: bool = True) -> Source:
    """What a path, a hub id or "starter" names. Raises UserError, in a person's words, for what cannot be used.

    Of a hub id only the configuration is fetched, a few kilobytes; without `fetch` it must be in the local cache.
    """
    path = STARTER if str(path_or_id) == "starter" else Path(path_or_id).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(
                f"{path} is not a Stable Diffusion model.",
                "It has no model_index.json.",
                "Give a diffusers folder or a .safetensors checkpoint.",
            )
        _check_kind(path.name, path)
        return Source(path.name, path, folder=path)
    if path.exists():
        status = path.stat()
        checkpoint = _checkpoint(path, status.st_mtime_ns, status.st_size)
        return Source(path.name, checkpoint.configs, checkpoint=checkpoint)
    asked = str(path_or_id)
    if asked.count("/") != 1 or asked.startswith((".", "/", "~")):
        names = [str(path.with_name(one)) for one in os.listdir(path.parent)] if path.parent.is_dir() else []
        close = difflib.get_close_matches(asked, ["starter", *names], 1, 0.7)
        do = f'Did you mean "{close[0]}"?' if close else 'Check the path, or use "starter".'
        raise UserError(f'There is no model at "{asked}".', do=do, place="model.path")
    configs = _hub_configs(asked, fetch=fetch)
    _check_kind(asked, configs)
    return Source(asked, configs)


@lru_cache(maxsize=8)
def _checkpoint(file: Path, changed: int, size: int) -> Checkpoint:
    """What a file was when it was changed and as large as that; the page asks often."""
    return read_checkpoint(file)


def _check_kind(name: str, configs: Path) -> None:
    """Raise UserError for a pipeline that is not one of ours, naming what it is."""
    index = read_json(configs / "model_index.json")
    kind = str(index.get("_class_name", "")) if isinstance(index, dict) else ""
    if kind in _PIPELINES:
        return
    known = next((words for piece, words in _OTHERS.items() if piece in kind), "")
    raise UserError(
        f"{name} is {known or (f'a {kind}' if kind else 'no pipeline')}.",
        do="Give a plain Stable Diffusion 1.x, 2.x or XL model.",
        place="model.path",
    )


def _hub_configs(asked: str, *, fetch: bool) -> Path:
    """The local copy of a hub model's small files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(asked, allow_patterns=list(_CONFIGS), local_files_only=not fetch))
    except LocalEntryNotFoundError:
        reason = "It was not downloaded before, and the hub is out of reach."
        what = f'The model "{asked}" is not on this machine.'
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        what = f'The model "{asked}" could not be loaded.'
    raise UserError(what, reason, "Check the id and the connection, or download it and give its folder.")
