"""The header of our adapter files: kohya's ss_ keys, modelspec 1.0.1, trigger words, hashes, and our own settings.

Keys and values as A1111, SwarmUI and the managers read them; every value is text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from reparam_diffusion.formats.identify import guess_family
from reparam_diffusion.formats.names import Family

_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
}
_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


@dataclass(frozen=True)
class SetFacts:
    """One set of pictures as a header tells it: its words, and how many pictures have each tag or caption."""

    trigger: str = ""
    class_word: str = ""
    pictures: int = 0
    repeats: int = 1
    tags: Mapping[str, int] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """What calls it."""
        return " ".join(word for word in (self.trigger, self.class_word) if word)


@dataclass(frozen=True)
class TrainingFacts:
    """What a file's header tells about how it was made. Times are Unix seconds; sizes are pixels."""

    name: str
    method: str
    family: Family
    title: str = ""
    description: str = ""
    author: str = ""
    license: str = ""
    keywords: tuple[str, ...] = ()
    rank: int | None = None
    alpha: float | None = None
    conv_rank: int | None = None
    conv_alpha: float | None = None
    dropout: float | None = None
    network_args: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    base_model: str = ""
    base_model_sha256: str = ""
    is_v_prediction: bool = False
    resolution: tuple[int, int] = (512, 512)
    """(width, height)"""
    clip_skip: int = 0
    """Text encoder layers left out; kohya counts from 1."""
    max_tokens: int = 77
    learning_rate: float = 0.0
    text_learning_rate: float = 0.0
    trains_text: bool = False
    steps: int = 0
    total_steps: int = 0
    """Planned; `steps` were taken."""
    epochs: float = 0.0
    batch: int = 1
    accumulation: int = 1
    processes: int = 1
    warmup_steps: int = 0
    seed: int = 0
    optimizer: str = ""
    schedule: str = ""
    mixed_precision: str = "no"
    clip: float = 0.0
    gradient_checkpointing: bool = False
    min_snr_gamma: float = 0.0
    noise_offset: float = 0.0
    zero_terminal_snr: bool = False
    caption_dropout: float = 0.0
    prior_weight: float = 0.0
    shuffle_captions: bool = False
    keep_tokens: int = 0
    flip: bool = False
    sets: tuple[SetFacts, ...] = (SetFacts(),)
    """The main one first."""
    held_out: int = 0
    class_pictures: int = 0
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(width, height) -> pictures."""
    started_at: float = 0.0
    finished_at: float = 0.0
    software: str = "Reparam Diffusion"
    software_version: str = ""
    started_from: str = ""
    """The adapter that it was trained on from, with the hash of its tensors."""
    config_toml: str = ""


def family_keys(family: Family, *, is_v_prediction: bool = False) -> dict[str, str]:
    """The keys by which A1111 files an adapter under its base model; without them an SDXL file is hidden."""
    version, architecture = _VERSIONS[family], _ARCHITECTURES[family]
    if family == "sd2" and is_v_prediction:
        version, architecture = "sd_v2_v", "stable-diffusion-v2-768-v/lora"
    return {
        "ss_base_model_version": version,
        "ss_v2": str(family == "sd2"),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
    }


def build_header(facts: TrainingFacts) -> dict[str, str]:
    """The whole header but its hashes, which `write_adapter` takes from the bytes it writes."""
    header: dict[str, str] = family_keys(facts.family, is_v_prediction=facts.is_v_prediction)
    header |= _network(facts) | _training(facts) | _data(facts) | _modelspec(facts)
    called = [one for one in facts.sets if one.trigger]
    if called:
        header["ss_trigger_words"] = header["trigger_words"] = ", ".join(dict.fromkeys(one.trigger for one in called))
        header["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(one.words for one in called))
    if facts.started_from:
        header["reparam_started_from"] = facts.started_from
    if facts.config_toml:
        header["reparam_config"] = facts.config_toml
    header["reparam_method"] = facts.method
    return header


def _network(facts: TrainingFacts) -> dict[str, str]:
    is_plain = facts.method in ("lora", "adalora")
    algo = {"oft": "diag-oft"}.get(facts.method, facts.method)
    args: dict[str, str] = {} if is_plain else {"algo": algo}
    args |= {name: str(value) for name, value in facts.network_args.items()}
    if facts.conv_rank is not None:
        args["conv_dim"] = str(facts.conv_rank)
    if facts.conv_alpha is not None:
        args["conv_alpha"] = f"{facts.conv_alpha:g}"
    return {
        # A name that starts with "{" would be parsed as JSON by A1111.
        "ss_output_name": facts.name.lstrip("{") or "adapter",
        "ss_network_module": "networks.lora" if is_plain else "lycoris.kohya",
        "ss_network_dim": str(facts.rank),
        "ss_network_alpha": "None" if facts.alpha is None else f"{facts.alpha:g}",
        "ss_network_dropout": str(facts.dropout),
        "ss_network_args": json.dumps(args),
    }


def _training(facts: TrainingFacts) -> dict[str, str]:
    values: dict[str, object] = {
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": facts.finished_at,
        "ss_learning_rate": facts.learning_rate,
        "ss_unet_lr": facts.learning_rate,
        "ss_text_encoder_lr": facts.text_learning_rate if facts.trains_text else None,
        "ss_steps": facts.steps,
        "ss_max_train_steps": facts.total_steps or facts.steps,
        "ss_num_epochs": math.ceil(facts.epochs),
        "ss_epoch": math.ceil(facts.epochs),
        "ss_lr_warmup_steps": facts.warmup_steps,
        "ss_lr_scheduler": facts.schedule,
        "ss_optimizer": facts.optimizer,
        "ss_seed": facts.seed,
        "ss_mixed_precision": facts.mixed_precision,
        "ss_gradient_checkpointing": facts.gradient_checkpointing,
        "ss_gradient_accumulation_steps": facts.accumulation,
        "ss_max_grad_norm": facts.clip,
        "ss_batch_size_per_device": facts.batch,
        "ss_total_batch_size": facts.batch * facts.processes * facts.accumulation,
        "ss_min_snr_gamma": facts.min_snr_gamma or None,
        "ss_noise_offset": facts.noise_offset or None,
        "ss_zero_terminal_snr": facts.zero_terminal_snr,
        "ss_caption_dropout_rate": facts.caption_dropout,
        "ss_prior_loss_weight": facts.prior_weight,
        "ss_clip_skip": facts.clip_skip + 1 if facts.clip_skip else None,
        "ss_max_token_length": None if facts.max_tokens == 77 else facts.max_tokens,
        "ss_sd_model_name": facts.base_model,
        "ss_new_sd_model_hash": facts.base_model_sha256 or None,
    }
    return {key: str(value) for key, value in values.items()}


def _folders(facts: TrainingFacts) -> dict[str, SetFacts]:
    """The sets under the folder names that kohya gives them: "10_sks toy"."""
    folders: dict[str, SetFacts] = {}
    for one in facts.sets:
        plain = name = f"{one.repeats}_{one.words or facts.name}"
        number = 1
        while name in folders:
            number += 1
            name = f"{plain} {number}"
        folders[name] = one
    return folders


def _data(facts: TrainingFacts) -> dict[str, str]:
    folders = _folders(facts)
    buckets = {
        str(number): {"resolution": list(size), "count": count}
        for number, (size, count) in enumerate(sorted(facts.buckets.items()))
    }
    values: dict[str, object] = {
        "ss_num_train_images": sum(one.pictures * one.repeats for one in facts.sets),
        "ss_num_validation_images": facts.held_out,
        "ss_num_reg_images": facts.class_pictures,
        "ss_resolution": facts.resolution,
        "ss_shuffle_caption": facts.shuffle_captions,
        "ss_keep_tokens": facts.keep_tokens,
        "ss_flip_aug": facts.flip,
        "ss_enable_bucket": bool(buckets),
    }
    return {key: str(value) for key, value in values.items()} | {
        "ss_dataset_dirs": json.dumps(
            {name: {"n_repeats": one.repeats, "img_count": one.pictures} for name, one in folders.items()}
        ),
        "ss_tag_frequency": json.dumps({name: dict(one.tags) for name, one in folders.items()}, ensure_ascii=False),
        "ss_bucket_info": json.dumps({"buckets": buckets}),
    }


def _modelspec(facts: TrainingFacts) -> dict[str, str]:
    is_xl = facts.family == "sdxl"
    spec = {
        "implementation": "https://github.com/Stability-AI/generative-models" if is_xl else "diffusers",
        "title": facts.title or facts.name,
        "resolution": f"{facts.resolution[0]}x{facts.resolution[1]}",
        "prediction_type": "v" if facts.is_v_prediction else "epsilon",
        "timestep_range": "0,1000",
        "description": facts.description,
        "author": facts.author,
        "license": facts.license,
        "tags": ", ".join(facts.keywords),
        "encoder_layer": str(facts.clip_skip + 1) if facts.clip_skip else "",
        "implementation_version": f"{facts.software} {facts.software_version}".strip(),
    }
    if facts.finished_at:
        spec["date"] = datetime.fromtimestamp(int(facts.finished_at), UTC).replace(tzinfo=None).isoformat()
    return {f"modelspec.{key}": value for key, value in spec.items() if value}


def find_prediction_type(header: Mapping[str, str]) -> str:
    """What the base model predicts: "v", "epsilon", or "" where the header does not say."""
    told = header.get("modelspec.prediction_type", "").lower()
    version = header.get("ss_base_model_version", "").lower()
    is_v = header.get("ss_v_parameterization") == "True" or version.endswith("_v")
    if told.startswith("v") or is_v or "768-v" in header.get("modelspec.architecture", "").lower():
        return "v"
    return "epsilon" if told.startswith("eps") or re.fullmatch(r"sd_v[12](_\d+)?", version) else ""


_BASE = (
    "ss_base_model_version", "ss_v2", "ss_v_parameterization", "modelspec.architecture", "modelspec.prediction_type",
)  # fmt: skip
"""What a header says of the kind of base model: kept where one source says it and none says otherwise."""
_USE = (
    "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_clip_skip", "ss_max_token_length",
    "ss_resolution", "ss_zero_terminal_snr", "modelspec.resolution", "modelspec.timestep_range",
    "modelspec.encoder_layer", "modelspec.implementation", "modelspec.license", "modelspec.author",
    "modelspec.description", "modelspec.usage_hint", "modelspec.tags",
)  # fmt: skip
"""What a header says of how the adapter is used: kept where all sources say the same."""
_TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words")
_COMPARED = {
    "ss_sd_model_name": "base model", "ss_clip_skip": "clip skip", "ss_resolution": "resolution",
    "ss_zero_terminal_snr": "zero terminal SNR", "modelspec.license": "license",
}  # fmt: skip


def inherit_header(headers: Sequence[Mapping[str, str]], family: Family) -> dict[str, str]:
    """What a result keeps of its sources' headers: the base model's kind, and how the adapter is used."""
    of_family = [header for header in headers if guess_family(header, {}) in (family, "unknown")]
    is_v = any(find_prediction_type(header) == "v" for header in of_family)
    kept = family_keys(family, is_v_prediction=is_v)
    for key in _BASE:
        values = {header[key] for header in of_family if header.get(key)}
        kept |= {key: values.pop()} if len(values) == 1 else {}
    for key in _USE if len(headers) > 1 else (*_USE, *_TRIGGERS):
        values = {header.get(key, "") for header in headers}
        kept |= {key: value} if len(values) == 1 and (value := values.pop()) else {}
    return kept


def compare_headers(headers: Sequence[Mapping[str, str]]) -> list[str]:
    """A sentence for each thing that the sources say differently, so that the result cannot say it."""
    notes = []
    for key, label in _COMPARED.items():
        values = dict.fromkeys(header.get(key, "") for header in headers)
        named = [value for value in values if value not in ("", "None")]
        if len(values) > 1 and (len(named) > 1 or (key == "ss_zero_terminal_snr" and "True" in named)):
            notes.append(f"The {label} differs ({', '.join(value or 'not said' for value in values)}); it is left out.")
    kinds = [find_prediction_type(header) for header in headers]
    if "v" in kinds and "" in kinds:
        notes.append("Not every file says its prediction type; the result says v-prediction.")
    return notes


_PUBLIC = (
    "ss_base_model_version", "ss_v2", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_output_name", "ss_network_module",
    "ss_network_dim", "ss_network_alpha", "ss_network_dropout", "ss_resolution", "ss_clip_skip", "ss_trigger_words",
    "trigger_words", "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation",
    "modelspec.title", "modelspec.resolution", "modelspec.description", "modelspec.license", "modelspec.usage_hint",
    "modelspec.tags",
    "modelspec.trigger_phrase", "modelspec.prediction_type", "modelspec.timestep_range", "modelspec.encoder_layer",
    "modelspec.date", "modelspec.merged_from", "reparam_method",
    "ss_v_parameterization", "ss_zero_terminal_snr", "ss_max_token_length", "reparam_loss",
)  # fmt: skip
"""What a stripped header keeps. Everything else may tell of pictures, captions, folders or people."""


def public(header: Mapping[str, str], *, trigger: str = "") -> dict[str, str]:
    """A header without private fields: an allowed list, so that an unknown field is left out rather than let out.

    `trigger` is kept where only a folder's name told it.
    """
    kept = {key: value for key, value in header.items() if key in _PUBLIC}
    if trigger:
        kept.setdefault("modelspec.trigger_phrase", trigger)
    return kept
