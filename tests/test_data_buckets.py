"""Laws of aspect-ratio buckets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reparam_diffusion.data.buckets import bucket_sizes, choose_bucket, crop_box, enlargement, fit, square

resolutions = st.integers(32, 1536)
steps = st.sampled_from([8, 16, 32, 64])
sides = st.integers(1, 5000)


@given(resolutions, steps, st.floats(1, 4))
def test_bucket_sizes_keep_their_promises(resolution: int, step: int, most_ratio: float) -> None:
    sizes = bucket_sizes(resolution, step, most_ratio=most_ratio)
    assert square(resolution, step) in sizes
    assert len(set(sizes)) == len(sizes)
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % step == 0
        assert height % step == 0
        assert width > 0 < height
        assert max(width, height) <= most_ratio * min(width, height)
        # Off by at most a strip of one step along the longer side, unless a side cannot get smaller.
        assert abs(width * height - resolution**2) <= max(width, height) * step or min(width, height) == step


def test_the_usual_sizes() -> None:
    assert bucket_sizes(128, 32) == ((96, 192), (96, 160), (128, 128), (160, 96), (192, 96))
    assert (1344, 768) in bucket_sizes(1024, 64)
    assert (1152, 896) in bucket_sizes(1024, 64)
    assert square(500, 64) == (512, 512)


@given(sides, sides, resolutions, steps)
def test_the_nearest_shape_is_chosen_whatever_the_order(width: int, height: int, resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, step)
    chosen = choose_bucket(width, height, sizes)
    assert choose_bucket(width, height, sizes[::-1]) == chosen

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(width / height))

    assert distance(chosen) <= min(map(distance, sizes)) + 1e-6


@given(sides, sides, st.integers(1, 40), st.integers(1, 40))
def test_a_crop_is_centred_inside_and_as_large_as_it_can_be(width: int, height: int, across: int, down: int) -> None:
    size = (across * 32, down * 32)
    left, top, right, bottom = crop_box(width, height, size)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert left + right == pytest.approx(width)
    assert top + bottom == pytest.approx(height)
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1])
    assert min(left, top) == pytest.approx(0, abs=1e-6)
    assert enlargement(width, height, size) == pytest.approx(size[0] / (right - left))


def test_a_picture_fits_its_bucket_with_its_middle_in_the_middle() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (140, 40, 160, 60))
    fitted = fit(image, (96, 64))
    assert fitted.size == (96, 64)
    light = np.argwhere(np.asarray(fitted)[..., 0] > 128)
    assert light.mean(axis=0) == pytest.approx([31.5, 47.5], abs=0.6)
    exact = Image.new("RGB", (96, 64), "red")
    assert fit(exact, (96, 64)) is exact
    assert fit(Image.new("RGB", (1, 3), "red"), (64, 64)).getpixel((5, 60)) == (255, 0, 0)
