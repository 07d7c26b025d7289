"""The finished file: the adapter with its training facts in the header."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from reparam_diffusion.config import TrainConfig, to_toml
from reparam_diffusion.formats.header import TrainingFacts, build_header
from reparam_diffusion.formats.write import write_adapter
from reparam_diffusion.models.load import Model
from reparam_diffusion.train.learner import Learner
from reparam_diffusion.train.prepare import Material

ADAPTER = "adapter.safetensors"


def write_finished(
    folder: Path,
    model: Model,
    config: TrainConfig,
    learner: Learner,
    material: Material,
    step: int,
    begun: float | None,
    *,
    name: str = ADAPTER,
) -> str:
    """Write the adapter (its moving average where one is kept) into `folder`; returns the file's name."""
    facts = training_facts(model, config, learner, material, step, begun)
    with learner.averaged():
        write_adapter(
            folder / name,
            learner.adapters,
            parts=model.parts,
            family=model.family,
            precision=config.output.file_precision,
            metadata=build_header(facts),
        )
    return name


def title_of(config: TrainConfig) -> str:
    """The adapter's name: the one given, else trigger, class word and method."""
    words = [config.data.trigger, config.data.class_word, config.adapter.method]
    return config.output.name or " ".join(word for word in words if word)


def training_facts(
    model: Model, config: TrainConfig, learner: Learner, material: Material, step: int, begun: float | None
) -> TrainingFacts:
    """What the header tells of the run."""
    training, data, spec = config.training, config.data, config.adapter
    numbers: dict[str, Any] = spec.model_dump()
    rank = numbers.get("rank") or numbers.get("init_rank") or numbers.get("block_size") or 0
    dataset = material.dataset
    sizes = Counter(item.size for item in dataset.train)
    words: Counter[str] = Counter(tag.strip() for item in dataset.train for tag in item.caption.split(",") if tag.strip())
    return TrainingFacts(
        name=title_of(config),
        trigger=data.trigger,
        class_word=data.class_word,
        method=spec.method,
        rank=rank,
        alpha=float(numbers.get("alpha", 1.0)),
        network_args={key: value for key, value in numbers.items() if key != "method"},
        base_model=model.name,
        family=model.family,
        is_v_prediction=model.prediction_type == "v_prediction",
        resolution=(data.resolution or model.size, data.resolution or model.size),
        clip_skip=config.model.clip_skip,
        learning_rate=training.learning_rate,
        text_learning_rate=training.text_learning_rate or training.learning_rate / 2,
        trains_text="te1" in {site.partition(".")[0] for site in learner.adapters},
        steps=step,
        total_steps=training.steps,
        epochs=step * training.batch * training.accumulation / max(1, len(dataset.train) * dataset.repeats),
        batch=training.batch,
        accumulation=training.accumulation,
        seed=training.seed,
        optimizer=training.optimizer,
        schedule=training.schedule,
        warmup_steps=round(training.warmup * training.steps),
        gradient_checkpointing=training.gradient_checkpointing,
        min_snr_gamma=training.min_snr_gamma,
        noise_offset=training.noise_offset,
        clip=training.clip,
        prior_weight=config.prior.weight,
        class_pictures=len(material.class_items),
        pictures=len(dataset.train),
        held_out=len(dataset.held_out),
        repeats=data.repeats,
        flip=data.flip,
        caption_dropout=data.caption_dropout,
        tags=dict(words),
        buckets={size: count for size, count in sizes.items()},
        started_at=begun or 0.0,
        finished_at=time.time() if begun else 0.0,
        config_toml=to_toml(config),
    )
