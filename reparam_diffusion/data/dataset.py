"""What the loop draws from: items in buckets, and a pure function from (seed, step) to a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from reparam_diffusion.data.buckets import Size, bucket_sizes, choose_bucket, square
from reparam_diffusion.data.images import Picture
from reparam_diffusion.errors import UserError
from reparam_diffusion.maths.chance import generator

LEAST_FOR_HELD_OUT = 8


@dataclass(frozen=True)
class Item:
    """A picture with its caption and the size (width, height in pixels) it is trained at."""

    picture: Picture
    caption: str
    size: Size
    flipped_ok: bool


@dataclass(frozen=True)
class Drawn:
    """One sample: which item of `train`, its index in the global batch of this step, and how it is shown."""

    item: int
    index: int
    flip: bool
    drop_caption: bool


@dataclass(frozen=True)
class Dataset:
    """Items to train on and items kept out. Nothing here changes while training."""

    train: tuple[Item, ...]
    held_out: tuple[Item, ...]
    repeats: int = 1

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of `train`, one group a size."""
        sizes = sorted({item.size for item in self.train})
        return tuple(tuple(i for i, item in enumerate(self.train) if item.size == size) for size in sizes)

    def passes(self, batch: int) -> int:
        """Epochs in one round: the fewest after which every bucket has given whole batches and nothing is left over."""
        shares = (batch // math.gcd(len(group) * self.repeats, batch) for group in self.groups)
        return math.lcm(*shares)

    def batches(self, batch: int) -> int:
        """Batches in one round; each picture comes exactly repeats · passes(batch) times in it."""
        return len(self.train) * self.repeats * self.passes(batch) // batch

    def batch_at(
        self,
        step: int,
        micro: int = 0,
        *,
        batch: int,
        seed: int,
        accumulation: int = 1,
        rank: int = 0,
        ranks: int = 1,
        caption_dropout: float = 0.0,
    ) -> list[Drawn]:
        """The samples of one forward pass: all of one size, and a function of the arguments alone.

        `micro` counts the forward passes within a step. The ranks share out one batch of all of theirs, so that many
        processes learn what one learns with the batch of all.
        """
        assert self.train, "a dataset without pictures"
        assert 0 <= micro < accumulation, "micro counts from 0 to accumulation - 1"
        assert 0 <= rank < ranks
        whole = batch * ranks
        number, at = divmod(step * accumulation + micro, self.batches(whole))
        passes = self.passes(whole)
        drawn = _round(self.groups, number, repeats=self.repeats, passes=passes, batch=whole, seed=seed)[at]
        items = drawn[rank * batch : (rank + 1) * batch]
        first = micro * whole + rank * batch
        return [self._drawn(item, seed, step, first + i, caption_dropout) for i, item in enumerate(items)]

    def _drawn(self, item: int, seed: int, step: int, index: int, caption_dropout: float) -> Drawn:
        flip = self.train[item].flipped_ok and _chance(seed, step, index, "flip") < 0.5
        drop = caption_dropout > 0 and _chance(seed, step, index, "caption") < caption_dropout
        return Drawn(item, index, flip, drop)


def build_dataset(
    pictures: Sequence[Picture],
    captions: Sequence[str],
    *,
    resolution: int,
    step: int,
    buckets: bool = True,
    repeats: int = 1,
    flip: bool = False,
    held_out: int = 0,
    seed: int = 0,
) -> Dataset:
    """Pictures with their captions, sorted into buckets; `held_out` of them, at most a quarter, are kept out.

    `step` is what a side must be a multiple of, in pixels.
    """
    if len(pictures) != len(captions):
        raise ValueError("one caption a picture")
    if held_out and len(pictures) < LEAST_FOR_HELD_OUT:
        raise UserError(
            "Pictures cannot be held out.",
            f"That needs at least {LEAST_FOR_HELD_OUT} pictures, and there are {len(pictures)}.",
            "Set data.held_out to 0, or add pictures.",
            place="data.held_out",
        )
    sizes = bucket_sizes(resolution, step) if buckets else (square(resolution, step),)
    items = [
        Item(picture, caption, choose_bucket(picture.width, picture.height, sizes), flip)
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    order = torch.randperm(len(items), generator=generator(seed, "held out")).tolist()
    out = set(order[: min(held_out, len(items) // 4)])
    return Dataset(
        train=tuple(item for i, item in enumerate(items) if i not in out),
        held_out=tuple(item for i, item in enumerate(items) if i in out),
        repeats=repeats,
    )


@lru_cache(maxsize=4)
def _round(
    groups: tuple[tuple[int, ...], ...], number: int, *, repeats: int, passes: int, batch: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """All batches of one round: each bucket's epochs, shuffled one by one and cut; the buckets take drawn turns."""
    waiting: list[list[tuple[int, ...]]] = []
    turns: list[int] = []
    for g, group in enumerate(groups):
        stream: list[int] = []
        for epoch in range(number * passes, (number + 1) * passes):
            order = torch.randperm(len(group) * repeats, generator=generator(seed, "epoch", epoch, g)).tolist()
            stream += [group[at % len(group)] for at in order]
        waiting.append([tuple(stream[at : at + batch]) for at in range(0, len(stream), batch)])
        turns += [g] * len(waiting[-1])
    order = torch.randperm(len(turns), generator=generator(seed, "turns", number)).tolist()
    taken = [iter(batches) for batches in waiting]
    return tuple(next(taken[turns[at]]) for at in order)


def _chance(*names: int | str) -> float:
    """A number in [0, 1) that depends on its names alone."""
    return float(torch.rand((), generator=generator(*names)))
