"""Aspect-ratio buckets: a few sizes of about one area; each picture is scaled and centre-cropped to the nearest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

Size = tuple[int, int]  # width, height in pixels


def bucket_sizes(resolution: int, step: int, *, most_ratio: float = 2.0) -> tuple[Size, ...]:
    """Sizes with sides in multiples of `step` and an area of about resolution², from tall to wide.

    The square is always there; no side is more than `most_ratio` times the other.
    """
    if resolution < 1 or step < 1 or most_ratio < 1:
        raise ValueError("resolution and step must be positive and most_ratio at least 1")
    side = square(resolution, step)[0]
    sizes = {(side, side)}
    for long in range(side, int(resolution * most_ratio) + step, step):
        short = max(step, round(resolution * resolution / long / step) * step)
        if short <= long <= most_ratio * short:
            sizes |= {(long, short), (short, long)}
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


def square(resolution: int, step: int) -> Size:
    """The square nearest to resolution × resolution with sides in multiples of `step`."""
    side = max(step, math.floor(resolution / step + 0.5) * step)
    return side, side


def choose_bucket(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The size whose shape is nearest, so that the least is cropped; of equal shapes the larger."""
    shape = math.log(width / height)
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - shape), 9), -size[0] * size[1], size))


def crop_box(width: int, height: int, size: Size) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the largest centred part with the size's shape, in the picture's pixels."""
    scale = min(width / size[0], height / size[1])
    part_width, part_height = size[0] * scale, size[1] * scale
    left, top = (width - part_width) / 2, (height - part_height) / 2
    return max(left, 0.0), max(top, 0.0), min(left + part_width, width), min(top + part_height, height)


def enlargement(width: int, height: int, size: Size) -> float:
    """How many times larger the picture becomes in a bucket; below 1 it shrinks."""
    return max(size[0] / width, size[1] / height)


def fit(image: Image.Image, size: Size, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The picture scaled and centre-cropped to exactly `size`."""
    if image.size == size:
        return image
    return image.resize(size, resampling, box=crop_box(*image.size, size))
