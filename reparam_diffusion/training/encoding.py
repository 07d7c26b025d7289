"""What the VAE says to a run's pictures, each asked once: whole where the memory is enough for it, else in tiles."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from reparam_diffusion.data.cache import LatentCache
from reparam_diffusion.data.dataset import Item
from reparam_diffusion.errors import UserError
from reparam_diffusion.models.ledger import bytes_of
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.room import KEPT_FREE, empty_cache, memory_of
from reparam_diffusion.models.tiles import SIDES, tile_side, tiled

Size = tuple[int, int]


class Latents:
    """The posterior's mean and standard deviation of each picture, kept in memory and on disk.

    `tile` is the side of the tiles that they are encoded in, in pixels; 0: whole. The disk keeps those of each tile
    apart, since they differ a little.
    """

    def __init__(self, model: Model, folder: Path, *, tile: int) -> None:
        self._model, self._folder = model, folder
        self.tile = tile
        self._cache = self._opened()

    def _opened(self) -> LatentCache:
        return LatentCache(
            self._folder, fingerprint(self._model.vae) + (f" in tiles of {self.tile}" if self.tile else "")
        )

    @property
    def trouble(self) -> str:
        """Why nothing could be kept on disk; "" where it could."""
        return self._cache.store.trouble

    def get(self, item: Item, flip: bool) -> tuple[Tensor, Tensor]:
        """(mean, std), each (channels, height/8, width/8), of a picture at its size, mirrored when asked; on the CPU.

        Raises RuntimeError where the memory runs out.
        """
        return self._cache.get(item, flip, vae_encoder(self._model, tile=self.tile))

    def shrink(self, sizes: Sequence[Size]) -> int:
        """Take the next smaller tile for pictures of these sizes, after the memory ran out; its side.

        Raises UserError where there is none.
        """
        empty_cache()
        largest = max(max(size) for size in sizes)
        smaller = [side for side in SIDES if side < (self.tile or largest)]
        if not smaller:
            raise UserError(
                "The memory is not enough to encode the pictures.",
                f"It ran out with {f'tiles of {self.tile} pixels' if self.tile else 'pictures smaller than a tile'}.",
                "Close other programs that use the device, then resume; or train on another device.",
                place="model.device",
            )
        self.tile = smaller[0]
        self._cache = self._opened()
        return self.tile


def vae_encoder(model: Model, *, tile: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """pixels (1, 3, height, width) in −1 to 1 -> the posterior's mean and std (1, channels, height/8, width/8)."""

    def encode_pixels(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), model.using(model.vae), tiled(model.vae, tile):
            posterior = model.vae.encode(pixels.to(model.device, model.vae.dtype)).latent_dist
        return posterior.mean.float().cpu(), posterior.std.float().cpu()

    return encode_pixels


def spared(room: int) -> int:
    """What of a device's room in bytes encoding reckons with: a tenth is left, since nobody asks what is free then."""
    return room * 9 // 10


def encoding_tile(model: Model, sizes: Sequence[Size], *, memory: int | None = None) -> int:
    """The side of the tiles that training pictures of these sizes are encoded in, in pixels; 0: whole.

    It follows from the device's whole memory (or `memory`, in bytes), so that pictures are encoded alike every time.
    """
    memory = memory_of(model.device) if memory is None else memory
    here = (model.vae,) if model.is_staged else (*model.parts.values(), model.vae)
    room = spared(memory - KEPT_FREE - sum(bytes_of(part) for part in here))
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return tile_side(model.vae, "encode", height, width, room=room, device=model.device.type)


def fingerprint(module: torch.nn.Module) -> str:
    """A short hash of a module's weights, for cache keys: names, shapes and a sample of every tensor's values."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten()[:: max(1, tensor.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
