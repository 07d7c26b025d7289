"""A VAE's work in overlapping tiles where a whole picture would not fit, with diffusers' own tiling."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch

from reparam_diffusion.models.ledger import counted
from reparam_diffusion.models.quiet import quiet

Way = Literal["encode", "decode"]
SIDES = (768, 512, 384, 256)
"""Sides of a tile in pixels, the best first: fewer seams, and sums over more of the picture."""
_SPARE = {"cpu": 1.25}
_SPARE_ON_GPU = 2.8
"""A device takes more than is counted. A GPU's is not measured here: it is what ComfyUI reckons with (2178 numbers a
decoded pixel) over what we count (770), and cuDNN's scratch space is in it."""


def tile_side(vae: Any, way: Way, height: int, width: int, *, room: int, device: str) -> int:
    """The side of the largest tile, in pixels, whose work fits into `room` bytes; 0 where the whole picture does.

    `device` is "cpu", "cuda" or "mps". Any: diffusers' VAE, whose own weights are not counted.
    """
    if taken(vae, way, height, width, device=device) <= room:
        return 0
    sides = [side for side in SIDES if side < max(height, width)]
    fitting = (side for side in sides if taken(vae, way, height, width, device=device, side=side) <= room)
    return next(fitting, sides[-1] if sides else 0)


def taken(vae: Any, way: Way, height: int, width: int, *, device: str, side: int = 0) -> int:
    """Bytes that a device takes for one picture beside the VAE's weights, whole or in tiles. Any: as above."""
    side = side or max(height, width)
    return int(work_of(vae, way, min(side, height), min(side, width)) * _SPARE.get(device, _SPARE_ON_GPU))


def work_of(vae: Any, way: Way, height: int, width: int) -> int:
    """Bytes that one picture of so many pixels needs beside the VAE's weights, as counted. Any: as above."""
    config = json.dumps({key: value for key, value in vae.config.items() if key[0] != "_"}, sort_keys=True)
    return _work_of(config, vae.dtype, way, (height, width))


@lru_cache(maxsize=64)
def _work_of(config: str, dtype: torch.dtype, way: Way, size: tuple[int, int]) -> int:
    height, width = size
    blank = _blank(config, dtype)
    reduction = reduction_of(blank)
    with torch.no_grad(), counted(blank) as ledger:
        if way == "encode":
            blank.encode(torch.empty(1, 3, height, width, dtype=dtype, device="meta"))
        else:
            shape = (1, blank.config.latent_channels, height // reduction, width // reduction)
            blank.decode(torch.empty(shape, dtype=dtype, device="meta"))
    return ledger.peak


@lru_cache(maxsize=4)
def _blank(config: str, dtype: torch.dtype) -> Any:  # Any: diffusers' class
    """The same VAE without numbers."""
    from diffusers import AutoencoderKL

    with torch.device("meta"), quiet():
        return AutoencoderKL.from_config(json.loads(config)).to(dtype).requires_grad_(False)


def reduction_of(vae: Any) -> int:
    """Pixels for each latent. Any: as above."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


@contextmanager
def tiled(vae: Any, side: int) -> Iterator[None]:
    """While the body runs, the VAE works in tiles of that side in pixels; 0 leaves it alone. Any: as above."""
    before = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size
    if side:
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = True, side, side // reduction_of(vae)
    try:
        yield
    finally:
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = before
