"""Which class images a run shows at which sizes: a function of its seed, so that only those are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from reparam_diffusion.config import DataSettings, TrainingSettings
from reparam_diffusion.data.buckets import Size
from reparam_diffusion.data.dataset import LEAST_FOR_HELD_OUT, Dataset, Part, build_dataset
from reparam_diffusion.data.images import Picture
from reparam_diffusion.data.sets import sources_of
from reparam_diffusion.errors import UserError
from reparam_diffusion.maths.chance import generator


def class_number(seed: int, step: int, index: int, count: int) -> int:
    """Which of `count` class images goes with the image that is `index` in the whole batch of a step."""
    return int(torch.randint(count, (1,), generator=generator(seed, step, index, "class")))


def class_sizes(dataset: Dataset, training: TrainingSettings, *, count: int, ranks: int = 1) -> list[tuple[int, Size]]:
    """(number of a class image, size in pixels) that all steps of a run together show, in the order of the numbers.

    The class images of a batch have the size of its other images. `ranks` is the number of processes.
    """
    sizes = {item.size for item in dataset.train}
    whole = training.batch * ranks
    found: set[tuple[int, Size]] = set()
    for step in range(1, training.steps + 1 if count else 1):
        for micro in range(training.accumulation):
            drawn = dataset.batch_at(step, micro, batch=whole, seed=training.seed, accumulation=training.accumulation)
            size = dataset.train[drawn[0].item].size
            found |= {(class_number(training.seed, step, one.index, count), size) for one in drawn}
        if len(found) == count * len(sizes):
            break
    return sorted(found)


def held_out_of(data: DataSettings, total: int) -> int:
    """How many of all images a run asks to keep out of training; -1 in the settings is an eighth of them."""
    return total // LEAST_FOR_HELD_OUT if data.held_out < 0 else data.held_out


def expect_class_latents(
    data: DataSettings,
    training: TrainingSettings,
    sides: Sequence[Sequence[Size]],
    *,
    count: int,
    ranks: int,
    resolution: int,
    step: int,
) -> int:
    """How many latents of class images a run will encode: one for each image and size that it shows together.

    `sides` are the widths and heights of each set's images, `step` what a side must be a multiple of, in pixels.
    """
    settings = (data.buckets, data.held_out, tuple(one.repeats for one in sources_of(data)))
    times = (training.steps, training.batch, training.accumulation, training.seed)
    return _expected(
        sides=tuple(map(tuple, sides)),
        settings=settings,
        times=times,
        count=count,
        ranks=ranks,
        resolution=resolution,
        step=step,
    )


@lru_cache(maxsize=64)
def _expected(
    *,
    sides: tuple[tuple[Size, ...], ...],
    settings: tuple[bool, int, tuple[int, ...]],
    times: tuple[int, int, int, int],
    count: int,
    ranks: int,
    resolution: int,
    step: int,
) -> int:
    buckets, held_out, repeats = settings
    steps, batch, accumulation, seed = times
    parts = [
        Part([Picture(Path(), *side, hash="") for side in own], [""] * len(own), [None] * len(own), repeats=often)
        for own, often in zip(sides, repeats, strict=True)
    ]
    asked = held_out_of(DataSettings(held_out=held_out), sum(map(len, sides)))
    try:
        dataset = build_dataset(parts, resolution=resolution, step=step, buckets=buckets, held_out=asked, seed=seed)
    except UserError:  # too few to hold any out: the run says so
        dataset = build_dataset(parts, resolution=resolution, step=step, buckets=buckets, seed=seed)
    training = TrainingSettings(steps=steps, batch=batch, accumulation=accumulation, seed=seed)
    return len(class_sizes(dataset, training, count=count, ranks=ranks)) if dataset.train else 0
