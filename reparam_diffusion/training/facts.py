"""The finished file: the adapter with its training facts in the header."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from reparam_diffusion import __version__
from reparam_diffusion.config import adapter_name, to_toml
from reparam_diffusion.data.dataset import Dataset
from reparam_diffusion.data.sets import Source, sources_of
from reparam_diffusion.formats.header import SetFacts, TrainingFacts, build_header
from reparam_diffusion.formats.write import write_adapter
from reparam_diffusion.models.precision import name_of
from reparam_diffusion.training.batch import trains_text
from reparam_diffusion.training.learner import Learner
from reparam_diffusion.training.optim import schedule_of, text_rate
from reparam_diffusion.training.setup import Setup
from reparam_diffusion.training.start import started_from

ADAPTER = "adapter.safetensors"


def write_finished(
    setup: Setup, learner: Learner, step: int, *, name: str = ADAPTER, folder: Path | None = None
) -> str:
    """Write the adapter (its moving average where one is kept) into the run or `folder`; returns the file's name."""
    facts = training_facts(setup, learner, step)
    with learner.averaged():
        write_adapter(
            (folder or setup.folder) / name,
            learner.adapters,
            parts=setup.model.parts,
            family=setup.model.family,
            precision=setup.config.output.file_precision,
            metadata=build_header(facts),
            words=[] if learner.word is None else [learner.word],
        )
    return name


def steps_of(file: Path) -> int | None:
    """How many steps the adapter in a file was trained for, by its header; None where it says nothing."""
    try:
        with safe_open(file, framework="pt") as opened:
            return int((opened.metadata() or {})["ss_steps"])
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def training_facts(setup: Setup, learner: Learner, step: int) -> TrainingFacts:
    """What the header tells of the run."""
    model, config, material = setup.model, setup.config, setup.material
    training, data, spec = config.training, config.data, config.adapter
    numbers: dict[str, Any] = spec.model_dump()
    rank = numbers.get("rank") or numbers.get("init_rank") or numbers.get("block_size") or 0
    dataset = material.dataset
    shown = training.batch * training.accumulation * learner.processes.ranks  # pictures a step
    return TrainingFacts(
        name=adapter_name(config),
        method=spec.method,
        family=model.family,
        title=adapter_name(config),
        rank=rank,
        alpha=numbers.get("alpha"),
        conv_rank=numbers.get("conv_rank") or None,
        conv_alpha=numbers.get("conv_alpha") or None,
        dropout=numbers.get("dropout"),
        network_args={key: value for key, value in numbers.items() if key not in ("method", "rank", "alpha")},
        base_model=model.name,
        is_v_prediction=model.prediction_type == "v_prediction",
        resolution=(data.resolution or model.size, data.resolution or model.size),
        clip_skip=config.model.clip_skip,
        max_tokens=model.tokenizers[0].model_max_length,
        learning_rate=training.learning_rate,
        text_learning_rate=text_rate(training) if trains_text(config) else 0.0,
        trains_text=trains_text(config),
        steps=step,
        total_steps=training.steps,
        epochs=step * shown / max(1, dataset.shown),
        batch=training.batch,
        accumulation=training.accumulation,
        processes=learner.processes.ranks,
        warmup_steps=round(training.warmup * training.steps),
        seed=training.seed,
        optimizer=training.optimizer,
        schedule=schedule_of(training),
        mixed_precision="no" if model.dtype == torch.float32 else name_of(model.dtype),
        clip=training.clip,
        gradient_checkpointing=training.gradient_checkpointing,
        min_snr_gamma=setup.objective.gamma,
        noise_offset=training.noise_offset,
        zero_terminal_snr=bool(model.scheduler.config.get("rescale_betas_zero_snr", False)),
        caption_dropout=data.caption_dropout,
        prior_weight=config.prior.weight,
        shuffle_captions=data.shuffle_tags,
        keep_tokens=data.keep_tags,
        flip=any(item.flipped_ok for item in dataset.train),
        sets=tuple(_set_facts(source, dataset, number) for number, source in enumerate(sources_of(data))),
        held_out=len(dataset.held_out),
        class_pictures=len(material.class_items),
        buckets=dict(Counter(item.size for item in dataset.train)),
        started_at=setup.begun,
        finished_at=time.time(),
        software_version=__version__,
        started_from=started_from(config, setup.folder),
        config_toml=to_toml(config),
    )


def _set_facts(source: Source, dataset: Dataset, number: int) -> SetFacts:
    """What the header tells of one set."""
    items = [item for item in dataset.train if item.part == number]
    tags = Counter(tag.strip() for item in items for tag in item.caption.split(",") if tag.strip())
    return SetFacts(source.trigger, source.class_word, len(items), source.repeats, dict(tags))
