"""What the loop draws from: items in buckets, and a pure function from (seed, step) to a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from reparam_diffusion.data.buckets import Size, bucket_sizes, choose_bucket, square
from reparam_diffusion.data.images import Picture
from reparam_diffusion.data.masks import Mask
from reparam_diffusion.errors import UserError
from reparam_diffusion.maths.chance import generator

LEAST_FOR_HELD_OUT = 8


@dataclass(frozen=True)
class Part:
    """One set's share of a dataset: its pictures with their captions and masks, and how all of them are shown."""

    pictures: Sequence[Picture]
    captions: Sequence[str]
    masks: Sequence[Mask | None]
    repeats: int = 1
    flip: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Item:
    """A picture with its caption and the size (width, height in pixels) it is trained at.

    `weight` multiplies its loss, `repeats` is how often it comes in one pass, `part` the number of its set.
    """

    picture: Picture
    caption: str
    size: Size
    flipped_ok: bool
    mask: Mask | None = None
    weight: float = 1.0
    repeats: int = 1
    part: int = 0


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

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of `train`, one group a size, each as often as its picture is repeated."""
        sizes = sorted({item.size for item in self.train})
        return tuple(self._repeated([i for i, item in enumerate(self.train) if item.size == size]) for size in sizes)

    def _repeated(self, group: Sequence[int]) -> tuple[int, ...]:
        most = max(self.train[i].repeats for i in group)
        return tuple(i for turn in range(most) for i in group if turn < self.train[i].repeats)

    @property
    def shown(self) -> int:
        """Pictures in one pass, repeats counted."""
        return sum(item.repeats for item in self.train)

    def passes(self, batch: int) -> int:
        """Epochs in one round: the fewest after which every bucket has given whole batches and nothing is left over."""
        shares = (batch // math.gcd(len(group), batch) for group in self.groups)
        return math.lcm(*shares)

    def batches(self, batch: int) -> int:
        """Batches in one round; each picture comes exactly repeats · passes(batch) times in it."""
        return self.shown * self.passes(batch) // batch

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
        drawn = _round(self.groups, number, passes=passes, batch=whole, seed=seed)[at]
        items = drawn[rank * batch : (rank + 1) * batch]
        first = micro * whole + rank * batch
        return [self._drawn(item, seed, step, first + i, caption_dropout) for i, item in enumerate(items)]

    def _drawn(self, item: int, seed: int, step: int, index: int, caption_dropout: float) -> Drawn:
        flip = self.train[item].flipped_ok and _chance(seed, step, index, "flip") < 0.5
        drop = caption_dropout > 0 and _chance(seed, step, index, "caption") < caption_dropout
        return Drawn(item, index, flip, drop)


def build_dataset(
    parts: Sequence[Part],
    *,
    resolution: int,
    step: int,
    buckets: bool = True,
    held_out: int = 0,
    seed: int = 0,
) -> Dataset:
    """All sets' pictures in buckets; `held_out` of them, at most a quarter, are kept out, of each set its share.

    `step` is what a side must be a multiple of, in pixels.
    """
    total = sum(len(part.pictures) for part in parts)
    if held_out and total < LEAST_FOR_HELD_OUT:
        raise UserError(
            "Pictures cannot be held out.",
            f"That needs at least {LEAST_FOR_HELD_OUT} pictures, and there are {total}.",
            "Set data.held_out to 0, or add pictures.",
            place="data.held_out",
        )
    sizes = bucket_sizes(resolution, step) if buckets else (square(resolution, step),)
    shares = _shares([len(part.pictures) for part in parts], min(held_out, total // 4))
    train: list[Item] = []
    kept_out: list[Item] = []
    for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
        names = ("held out", number) if number else ("held out",)
        order = torch.randperm(len(part.pictures), generator=generator(seed, *names)).tolist()
        out = set(order[:share])
        for i, item in enumerate(_items(part, number, sizes)):
            (kept_out if i in out else train).append(item)
    return Dataset(tuple(train), tuple(kept_out))


def _items(part: Part, number: int, sizes: Sequence[Size]) -> list[Item]:
    return [
        Item(
            picture,
            caption,
            choose_bucket(picture.width, picture.height, sizes),
            part.flip,
            mask,
            part.weight,
            part.repeats,
            number,
        )
        for picture, caption, mask in zip(part.pictures, part.captions, part.masks, strict=True)
    ]


def _shares(counts: Sequence[int], wanted: int) -> list[int]:
    """`wanted` shared out in proportion to the counts, the rest to the largest remainders; one of each set stays."""
    total = sum(counts)
    shares = [wanted * count // total for count in counts]
    larger = [i for i, count in enumerate(counts) if shares[i] + 1 < count]
    for i in sorted(larger, key=lambda i: (-(wanted * counts[i] % total), i))[: wanted - sum(shares)]:
        shares[i] += 1
    return shares


@lru_cache(maxsize=4)
def _round(
    groups: tuple[tuple[int, ...], ...], number: int, *, passes: int, batch: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """All batches of one round: each bucket's epochs, shuffled one by one and cut; the buckets take drawn turns."""
    waiting: list[list[tuple[int, ...]]] = []
    turns: list[int] = []
    for g, group in enumerate(groups):
        stream: list[int] = []
        for epoch in range(number * passes, (number + 1) * passes):
            order = torch.randperm(len(group), generator=generator(seed, "epoch", epoch, g)).tolist()
            stream += [group[at] for at in order]
        waiting.append([tuple(stream[at : at + batch]) for at in range(0, len(stream), batch)])
        turns += [g] * len(waiting[-1])
    order = torch.randperm(len(turns), generator=generator(seed, "turns", number)).tolist()
    taken = [iter(batches) for batches in waiting]
    return tuple(next(taken[turns[at]]) for at in order)


def _chance(*names: int | str) -> float:
    """A number in [0, 1) that depends on its names alone."""
    return float(torch.rand((), generator=generator(*names)))
