"""One forward pass's samples, each a function of (seed, step, index in the global batch), and their weighted loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reparam_diffusion.config import TrainConfig
from reparam_diffusion.data.buckets import crop_box
from reparam_diffusion.data.captions import shuffled
from reparam_diffusion.data.dataset import Item
from reparam_diffusion.maths.chance import Draw, generator
from reparam_diffusion.models.encode import Encoded, encode, time_ids
from reparam_diffusion.models.load import Model
from reparam_diffusion.training.class_images import class_number
from reparam_diffusion.training.objective import Noised
from reparam_diffusion.training.prepare import at_size, text_encoder
from reparam_diffusion.training.setup import Setup

_CLASS_INDEX = 1_000_000
"""Class pictures are drawn under the index of the picture they accompany plus this."""


@dataclass(frozen=True)
class Sample:
    """One picture as it is shown once."""

    item: Item
    index: int
    flip: bool
    caption: str
    weight: float


def samples_at(setup: Setup, step: int, micro: int) -> list[Sample]:
    """The samples of one forward pass; class pictures follow the others when the prior is kept."""
    material, processes = setup.material, setup.processes
    training, data = setup.config.training, setup.config.data
    drawn = material.dataset.batch_at(
        step,
        micro,
        batch=training.batch,
        seed=training.seed,
        accumulation=training.accumulation,
        rank=processes.rank,
        ranks=processes.ranks,
        caption_dropout=data.caption_dropout,
    )
    samples = []
    for one in drawn:
        item = material.dataset.train[one.item]
        caption = item.caption
        if data.shuffle_tags:
            caption = shuffled(caption, data.keep_tags, generator(training.seed, step, one.index, "tags"))
        samples.append(Sample(item, one.index, one.flip, "" if one.drop_caption else caption, item.weight))
    if material.class_items:
        size = samples[0].item.size
        for one in drawn:
            number = class_number(training.seed, step, one.index, len(material.class_items))
            item = at_size(material.class_items[number], size)
            samples.append(Sample(item, one.index + _CLASS_INDEX, False, item.caption, setup.config.prior.weight))
    return samples


def loss_of(setup: Setup, samples: Sequence[Sample], step: int) -> Tensor:
    """Mean over the pictures, weighted by their sets, plus the prior's weight times the class pictures' mean; fp32."""
    model = setup.model
    batch = noised(setup, samples, step)
    text = texts_of(setup, [sample.caption for sample in samples])
    losses = setup.objective.losses(model.unet, batch, text, size_ids(model, samples), model.dtype)
    weights = torch.tensor([sample.weight for sample in samples], device=losses.device)
    pictures = sum(1 for sample in samples if sample.index < _CLASS_INDEX)
    return (losses * weights).sum() / pictures


def draw_of(samples: Sequence[Sample], config: TrainConfig, step: int) -> Draw:
    """What the adapters' dropout masks depend on."""
    return Draw(config.training.seed, step, [sample.index for sample in samples])


def noised(setup: Setup, samples: Sequence[Sample], step: int) -> Noised:
    """Latents drawn from the posterior, noise and timesteps, on the model's device, fp32."""
    model, objective, seed = setup.model, setup.objective, setup.config.training.seed
    latents, noise, steps = [], [], []
    for sample in samples:
        mean, std = setup.material.latents.get(sample.item, sample.flip)
        eps = torch.randn(mean.shape, generator=generator(seed, step, sample.index, "latent"))
        latents.append(scaled(model, mean + std * eps))
        noise.append(objective.draw_noise(mean.shape, seed, step, sample.index))
        steps.append(objective.draw_timestep(seed, step, sample.index))
    return Noised(
        torch.stack(latents).to(model.device),
        torch.stack(noise).to(model.device),
        torch.tensor(steps, device=model.device),
        places_of(setup, samples),
    )


def places_of(setup: Setup, samples: Sequence[Sample]) -> Tensor | None:
    """How much the loss counts at each latent (batch, height, width), mirrored as shown; None where all count alike."""
    known = setup.material.masks
    masks = [known.get(sample.item) for sample in samples]
    given = next((mask for mask in masks if mask is not None), None)
    if given is None:
        return None
    whole = torch.ones_like(given)
    rows = [
        whole if mask is None else mask.flip(-1) if sample.flip else mask
        for mask, sample in zip(masks, samples, strict=True)
    ]
    return torch.stack(rows).to(setup.model.device)


def scaled(model: Model, latents: Tensor) -> Tensor:
    """The VAE's latents in the range that the UNet works in."""
    config = model.vae.config
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def texts_of(setup: Setup, captions: Sequence[str]) -> Encoded:
    """Embeddings from the cache, or encoded anew where they change from step to step."""
    model, config = setup.model, setup.config
    skip = config.model.clip_skip
    if text_is_live(config):
        return encode(model, captions, clip_skip=skip)
    found = [setup.material.texts.get(caption, text_encoder(model, skip)) for caption in captions]
    hidden = torch.cat([rows["hidden"] for rows in found]).to(model.device)
    pooled = torch.cat([rows["pooled"] for rows in found]).to(model.device) if "pooled" in found[0] else None
    return Encoded(hidden, pooled)


def trains_text(config: TrainConfig) -> bool:
    """Whether any text encoder carries adapters."""
    return config.targets.text_encoder not in ("none", [])


def teaches_text(config: TrainConfig) -> bool:
    """Whether gradients go through the text encoders: to adapters, or to the trigger word's vectors."""
    return trains_text(config) or config.embedding.vectors > 0


def text_is_live(config: TrainConfig) -> bool:
    """Whether captions are encoded anew in each step."""
    return teaches_text(config) or config.data.shuffle_tags


def size_ids(model: Model, samples: Sequence[Sample]) -> Tensor | None:
    """SDXL's time ids (batch, 6); None for other models. Crops are centred, so a mirrored picture has the same ones."""
    if model.family != "sdxl":
        return None
    rows = []
    for sample in samples:
        picture, (width, height) = sample.item.picture, sample.item.size
        left, top, right, _ = crop_box(picture.width, picture.height, sample.item.size)
        scale = width / (right - left)
        corner = (round(top * scale), round(left * scale))
        rows.append(time_ids(model, original=(picture.height, picture.width), corner=corner, target=(height, width)))
    return torch.stack(rows)
