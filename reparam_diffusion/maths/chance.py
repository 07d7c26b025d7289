"""Randomness as a function of what it is for: the same names give the same numbers, on any process, at any resume."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*names: int | str) -> int:
    """A 63-bit seed from a tuple of names, spread evenly (BLAKE2b)."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*names: int | str) -> torch.Generator:
    """A CPU generator seeded from `names`: draw on the CPU, then move, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(seed_of(*names))


class Draw:
    """Which training draw is under way: the run's seed, the step, and each sample's index in the global batch."""

    def __init__(self, seed: int, step: int, indices: list[int]) -> None:
        self.seed = seed
        self.step = step
        self.indices = indices

    def keep_mask(self, site: str, purpose: str, shape: tuple[int, ...], *, drop: float) -> torch.Tensor:
        """(samples, *shape) of 0 and 1/(1 - drop): a dropout mask that recomputation draws again unchanged."""
        rows = [
            torch.rand(shape, generator=generator(self.seed, self.step, index, site, purpose)) for index in self.indices
        ]
        return (torch.stack(rows) >= drop).float() / (1.0 - drop)
