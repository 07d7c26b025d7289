"""Looking at a run from outside: the loss with fixed noise, and preview pictures from fixed seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from PIL.PngImagePlugin import PngInfo

from reparam_diffusion.data.dataset import Item
from reparam_diffusion.files import beside
from reparam_diffusion.maths.chance import generator
from reparam_diffusion.models.sample import draw
from reparam_diffusion.training.batch import Sample, places_of, scaled, size_ids, texts_of
from reparam_diffusion.training.objective import Noised
from reparam_diffusion.training.setup import Setup

TIMES = (0.1, 0.35, 0.6, 0.85)
"""Shares of the schedule at which the fixed-noise loss is taken."""
MOST_LOOKED_AT = 8
"""Pictures that the fixed-noise loss is taken over."""


@torch.no_grad()
def fixed_noise_loss(setup: Setup) -> float:
    """Mean loss at four timesteps with noise that never changes, over at most 8 pictures, held-out ones if any.

    Pictures count by their set's weight, their places by their masks.
    """
    dataset = setup.material.dataset
    items = looked_at(dataset.held_out or dataset.train)
    total = 0.0
    for number, item in enumerate(items):
        total += item.weight * _item_loss(setup, item, number)
    return total / sum(item.weight for item in items)


def looked_at(items: Sequence[Item]) -> list[Item]:
    """At most 8 of the pictures, of every set in turn."""
    seen: Counter[int] = Counter()
    turns = []
    for item in items:
        turns.append(seen[item.part])
        seen[item.part] += 1
    in_turn = sorted(range(len(items)), key=lambda i: (turns[i], i))
    return [items[i] for i in in_turn[:MOST_LOOKED_AT]]


def _item_loss(setup: Setup, item: Item, number: int) -> float:
    model, objective, material = setup.model, setup.objective, setup.material
    mean, _ = material.latents.get(item, False)
    noise = [
        torch.randn(mean.shape, generator=generator(setup.config.training.seed, "validate", number, n))
        for n in range(len(TIMES))
    ]
    count = objective.scheduler.config.num_train_timesteps
    samples = [Sample(item, 0, False, item.caption, item.weight)] * len(TIMES)
    batch = Noised(
        scaled(model, mean).repeat(len(TIMES), 1, 1, 1).to(model.device),
        torch.stack(noise).to(model.device),
        torch.tensor([round(share * count) for share in TIMES], device=model.device),
        places_of(setup, samples),
    )
    text = texts_of(setup, [item.caption] * len(TIMES))
    return float(objective.losses(model.unet, batch, text, size_ids(model, samples), model.dtype).mean())


def save_preview(setup: Setup, prompt: str, number: int, step: int) -> tuple[int, str]:
    """Draw a prompt from its fixed seed into samples/; returns the seed and the path relative to the run."""
    model, config, folder = setup.model, setup.config, setup.folder
    seed = config.output.sample_seed + number
    image = draw(model, prompt, seeds=[seed], clip_skip=config.model.clip_skip)[0]
    name = f"samples/{step:06d}-{number}.png"
    note = PngInfo()
    habits = model.habits
    note.add_text("parameters", f"{prompt}\nSteps: {habits.steps}, CFG scale: {habits.guidance}, Seed: {seed}")
    with beside(folder / name) as hidden:
        image.save(hidden, "PNG", pnginfo=note)
    return seed, name
