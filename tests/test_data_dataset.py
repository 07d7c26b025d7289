"""Laws of drawing: a batch is a function of (seed, step), and every picture gets its turn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reparam_diffusion.data.dataset import Dataset, Drawn, Part, build_dataset
from reparam_diffusion.data.images import Picture
from reparam_diffusion.errors import UserError

SHAPES = [(256, 256), (300, 200), (200, 300), (900, 300)]


def made(counts: list[int], *, repeats: int = 1, flip: bool = False, held_out: int = 0, seed: int = 0) -> Dataset:
    """A dataset with so many pictures of each shape."""
    shapes = [shape for shape, count in zip(SHAPES, counts, strict=False) for _ in range(count)]
    return build_dataset([part(shapes, repeats, flip)], resolution=128, step=32, held_out=held_out, seed=seed)


def part(shapes: list[tuple[int, int]], repeats: int = 1, flip: bool = False, weight: float = 1.0) -> Part:
    """One set of pictures of these shapes; the hash is the number within its set."""
    pictures = [Picture(Path(f"{n}.png"), *shape, hash=f"{n}") for n, shape in enumerate(shapes)]
    captions = [f"picture {n}" for n in range(len(pictures))]
    return Part(pictures, captions, [None] * len(pictures), repeats, flip, weight)


counts = st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any)


@settings(deadline=None)
@given(counts, st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_in_a_round_every_picture_comes_equally_often_and_batches_have_one_size(
    counts: list[int], batch: int, repeats: int, seed: int
) -> None:
    data = made(counts, repeats=repeats)
    steps = data.batches(batch)
    for first in (0, steps):
        drawn = [data.batch_at(step, batch=batch, seed=seed) for step in range(first, first + steps)]
        shown = Counter(one.item for samples in drawn for one in samples)
        assert shown == {item: repeats * data.passes(batch) for item in range(len(data.train))}
        for samples in drawn:
            assert len(samples) == batch
            assert len({data.train[one.item].size for one in samples}) == 1


def test_with_whole_batches_a_round_is_one_epoch() -> None:
    data = made([4, 2], repeats=3)
    assert data.passes(2) == 1
    assert data.batches(2) == 9
    assert made([6]).passes(1) == 1


def test_one_bucket_shows_every_picture_before_any_comes_again() -> None:
    data = made([6])
    items = [one.item for step in range(9) for one in data.batch_at(step, batch=4, seed=1)]
    for at in range(0, len(items), 6):
        assert sorted(items[at : at + 6]) == list(range(6))


def test_epochs_and_seeds_differ_in_order() -> None:
    data = made([6])

    def order(epoch: int, seed: int) -> tuple[int, ...]:
        return tuple(data.batch_at(step, batch=1, seed=seed)[0].item for step in range(epoch * 6, epoch * 6 + 6))

    assert len({order(epoch, seed) for epoch in range(3) for seed in range(3)}) >= 8


def test_a_batch_depends_on_its_arguments_alone() -> None:
    kwargs = {"batch": 3, "seed": 5, "accumulation": 2, "caption_dropout": 0.3}
    one, other = made([5, 2], flip=True), made([5, 2], flip=True)
    forwards = [one.batch_at(step, micro, **kwargs) for step in range(40) for micro in range(2)]
    backwards = [other.batch_at(step, micro, **kwargs) for step in reversed(range(40)) for micro in (1, 0)]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize(("accumulation", "ranks"), [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_ranks_and_passes_share_out_the_global_batch(accumulation: int, ranks: int) -> None:
    data = made([5, 3], flip=True)

    def step_of(step: int, batch: int, ranks: int) -> list[Drawn]:
        return [
            one
            for micro in range(accumulation)
            for rank in range(ranks)
            for one in data.batch_at(
                step, micro, batch=batch, seed=7, accumulation=accumulation, rank=rank, ranks=ranks, caption_dropout=0.5
            )
        ]

    for step in range(12):
        shared = step_of(step, 2, ranks)
        assert [one.index for one in shared] == list(range(2 * accumulation * ranks))
        assert shared == step_of(step, 2 * ranks, 1)


def test_flips_and_dropped_captions_come_as_often_as_asked() -> None:
    data = made([4], flip=True)
    drawn = [one for step in range(100) for one in data.batch_at(step, batch=4, seed=0, caption_dropout=0.1)]
    assert 140 < sum(one.flip for one in drawn) < 260
    assert 20 < sum(one.drop_caption for one in drawn) < 65
    plain = [one for step in range(20) for one in made([4]).batch_at(step, batch=4, seed=0)]
    assert not any(one.flip or one.drop_caption for one in plain)


def test_held_out_pictures_are_drawn_by_seed_and_capped_at_a_quarter() -> None:
    data = made([6, 3], held_out=50)
    assert (len(data.train), len(data.held_out)) == (7, 2)
    assert {item.picture.hash for item in data.train + data.held_out} == {f"{n}" for n in range(9)}
    assert made([6, 3], held_out=1).held_out[0] in data.held_out
    assert made([6, 3], held_out=2).held_out == data.held_out
    assert len({made([6, 3], held_out=2, seed=seed).held_out for seed in range(9)}) > 3
    assert made([3]).held_out == ()
    with pytest.raises(UserError, match="at least 8 pictures, and there are 7"):
        made([7], held_out=1)


def test_without_buckets_every_picture_is_square() -> None:
    data = build_dataset([part(SHAPES)], resolution=128, step=32, buckets=False)
    assert {item.size for item in data.train} == {(128, 128)}
    assert len({item.size for item in made([1, 1, 1]).train}) == 3


@settings(deadline=None)
@given(st.lists(st.tuples(counts, st.integers(1, 4)), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 99))
def test_in_a_round_every_picture_comes_as_often_as_its_set_repeats(
    sets: list[tuple[list[int], int]], batch: int, seed: int
) -> None:
    shapes = [[shape for shape, n in zip(SHAPES, few, strict=False) for _ in range(n)] for few, _ in sets]
    parts = [part(its, repeats) for its, (_, repeats) in zip(shapes, sets, strict=True)]
    data = build_dataset(parts, resolution=128, step=32)
    steps = data.batches(batch)
    drawn = [one for step in range(steps) for one in data.batch_at(step, batch=batch, seed=seed)]
    assert Counter(one.item for one in drawn) == {
        number: item.repeats * data.passes(batch) for number, item in enumerate(data.train)
    }
    assert data.shown == sum(len(its) * repeats for its, (_, repeats) in zip(shapes, sets, strict=True))


def test_every_picture_keeps_its_own_sets_settings() -> None:
    data = build_dataset([part(SHAPES), part(SHAPES[:2], 3, True, 0.5)], resolution=128, step=32)
    assert [(item.part, item.repeats, item.flipped_ok, item.weight) for item in data.train] == [
        *[(0, 1, False, 1.0)] * 4,
        *[(1, 3, True, 0.5)] * 2,
    ]
    drawn = [one for step in range(80) for one in data.batch_at(step, batch=2, seed=3)]
    assert {data.train[one.item].part for one in drawn if one.flip} == {1}


@pytest.mark.parametrize(
    ("counts", "wanted", "told"),
    [([16, 8], 6, [4, 2]), ([20, 3, 1], 3, [3, 0, 0]), ([8, 8], 3, [2, 1]), ([1, 9], 2, [0, 2])],
)
def test_each_set_gives_its_share_of_what_is_held_out(counts: list[int], wanted: int, told: list[int]) -> None:
    data = build_dataset([part([(256, 256)] * n) for n in counts], resolution=128, step=32, held_out=wanted)
    assert [sum(item.part == number for item in data.held_out) for number in range(len(counts))] == told
    assert {item.part for item in data.train} == set(range(len(counts)))
