"""What the frozen VAE and text encoders say, kept in memory and on disk, so that each is asked once.

One safetensors file an entry, written beside and moved into place: several processes may share a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from reparam_diffusion.data.buckets import crop_box, fit
from reparam_diffusion.data.dataset import Item
from reparam_diffusion.data.disk_cache import mark_used
from reparam_diffusion.data.images import open_again
from reparam_diffusion.files import beside

Tensors = dict[str, Tensor]


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as (3, height, width) in [-1, 1], fp32."""
    rows = torch.from_numpy(np.array(image.convert("RGB")))  # (height, width, 3), 0 to 255
    return rows.permute(2, 0, 1).contiguous().float() / 127.5 - 1.0


def item_pixels(item: Item, flip: bool = False) -> Tensor:
    """An item's picture at its size, (3, height, width) in [-1, 1], mirrored when asked."""
    pixels = to_pixels(fit(open_again(item.picture), item.size))
    return pixels.flip(-1) if flip else pixels


class LatentCache:
    """Mean and standard deviation of the VAE's posterior for each picture at its size, plain and mirrored."""

    def __init__(self, folder: Path | None, fingerprint: str, *, dtype: torch.dtype = torch.float32) -> None:
        self.fingerprint = fingerprint
        self.dtype = dtype
        self.store = TensorStore(folder)

    def get(self, item: Item, flip: bool, encode: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(mean, std), each (channels, height / factor, width / factor), on the CPU.

        `encode` takes pixels (1, 3, height, width) in [-1, 1] and gives (mean, std), each (1, channels, …).
        """

        def build() -> Tensors:
            with torch.no_grad():
                mean, std = encode(item_pixels(item, flip).unsqueeze(0))
            return {"mean": mean[0].to("cpu", self.dtype), "std": std[0].to("cpu", self.dtype)}

        found = self.store.get(self._key(item, flip), build, names=("mean", "std"))
        return found["mean"], found["std"]

    def _key(self, item: Item, flip: bool) -> str:
        picture = item.picture
        crop = ",".join(f"{edge:.2f}" for edge in crop_box(picture.width, picture.height, item.size))
        return "|".join(
            ["latent", picture.hash, f"{item.size}", crop, f"flip={flip}", self.fingerprint, f"{self.dtype}"]
        )


class TextCache:
    """What the text encoders say to each caption, by name."""

    def __init__(
        self, folder: Path | None, fingerprint: str, *, clip_skip: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.fingerprint = fingerprint
        self.clip_skip = clip_skip
        self.dtype = dtype
        self.store = TensorStore(folder)

    def get(self, caption: str, encode: Callable[[str], Mapping[str, Tensor]]) -> Tensors:
        """The encoders' tensors on the CPU, as `encode(caption)` named and shaped them."""

        def build() -> Tensors:
            with torch.no_grad():
                return {name: value.to("cpu", self.dtype) for name, value in encode(caption).items()}

        key = "|".join(["text", self.fingerprint, f"skip={self.clip_skip}", f"{self.dtype}", caption])
        return self.store.get(key, build)


class TensorStore:
    """Named tensors by key: in memory after the first use, and in `folder` when there is one."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.trouble = ""
        """Why nothing more is written to disk ("" when all is well); the cache goes on in memory."""
        self._held: dict[str, Tensors] = {}

    def get(self, key: str, build: Callable[[], Tensors], *, names: tuple[str, ...] = ()) -> Tensors:
        """What is kept under a key, built when missing or damaged. `names` are the tensors it must have."""
        if key not in self._held:
            file = None if self.folder is None else self.folder / f"{_digest(key)}.safetensors"
            kept = None if file is None else _read(file)
            if kept is None or not set(names) <= set(kept):
                kept = {name: value.detach().contiguous().clone() for name, value in build().items()}
                if file is not None and not self.trouble:
                    self._write(file, kept)
            elif file is not None:
                mark_used(file)
            self._held[key] = kept
        return self._held[key]

    def _write(self, file: Path, tensors: Tensors) -> None:
        try:
            with beside(file) as hidden:
                hidden.write_bytes(save(tensors))
        except OSError as error:  # a cache may be lost: the run goes on and says so
            self.trouble = f"The cache in {file.parent} cannot be written: {error.strerror}."


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:40]


def _read(file: Path) -> Tensors | None:
    """What a cache file holds, or None when it is missing, cut short or foreign."""
    try:
        return load(file.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
