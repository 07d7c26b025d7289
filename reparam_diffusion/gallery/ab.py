"""The same seeds with a change as it was and as it is written: what a lossy step does to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from reparam_diffusion.apply import AdapterChoice, generate
from reparam_diffusion.gallery.grid import make_grid
from reparam_diffusion.models.load import Model

if TYPE_CHECKING:
    from PIL.Image import Image


def ab_picture(
    model: Model,
    prompt: str,
    before: Sequence[AdapterChoice],
    after: Sequence[AdapterChoice],
    *,
    seeds: Sequence[int] = (0, 1, 2, 3),
    names: tuple[str, str] = ("before", "after"),
    steps: int | None = None,
    on_step: Callable[[int, int], bool] | None = None,
) -> Image:
    """A grid of a column a seed: with the adapters before the step, after it, and the base alone."""
    rows = [(names[0], before), (names[1], after), ("base", ())]
    total = len(rows) * len(seeds)
    drawn: list[tuple[str, list[Image]]] = []
    for name, adapters in rows:
        pictures: list[Image] = []
        for seed in seeds:
            pictures += generate(model, prompt, adapters=list(adapters), seed=seed, steps=steps)
            done = sum(len(row) for _, row in drawn) + len(pictures)
            if on_step is not None and on_step(done, total):
                break
        drawn.append((name, pictures))
    return make_grid(drawn, [f"seed {seed}" for seed in seeds])
