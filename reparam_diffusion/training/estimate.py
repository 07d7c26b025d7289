"""What a run will cost, before Start: its file, its time part by part, its memory; each says where it comes from.

Everything here is read: the model's configuration, what was measured before, what lies in the caches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reparam_diffusion.config import TrainConfig
from reparam_diffusion.data.buckets import Size
from reparam_diffusion.data.images import sides_of
from reparam_diffusion.data.sets import count_further, sources_of
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.outline import check_vae, outline, shape_of
from reparam_diffusion.models.precision import pick_device
from reparam_diffusion.models.room import memory_of
from reparam_diffusion.targets import count_parameters, file_bytes
from reparam_diffusion.training.batch import text_is_live
from reparam_diffusion.training.cards import advise, room_on
from reparam_diffusion.training.class_images import expect_class_latents, held_out_of
from reparam_diffusion.training.embedding import count_vectors
from reparam_diffusion.training.estimate_pace import Book, Pace, Piece, Unit, machine_name, pieces_of
from reparam_diffusion.training.learner import plan_run
from reparam_diffusion.training.measure import MOST_LOOKED_AT
from reparam_diffusion.training.optim import notes_on
from reparam_diffusion.training.prepare import DRAWN_AT_ONCE, class_pictures_left, preview_prompts

MEASURED = "measured on this machine"
SCALED = "estimated from similar work on this machine"
COUNTED = "estimated"
_PARTS: dict[Unit, str] = {
    "loading": "preparation",
    "latents": "preparation",
    "captions": "preparation",
    "class picture": "class pictures",
    "preview": "previews",
    "step": "training",
    "fixed-noise loss": "training",
    "checkpoint": "training",
}
_SMALL: tuple[Unit, ...] = ("loading", "captions", "checkpoint")
"""Work whose time may be unknown without spoiling the sum."""


@dataclass(frozen=True)
class Part:
    """One part of a run's time. `seconds` None: not known yet."""

    name: str
    seconds: float | None
    source: str


@dataclass(frozen=True)
class Cost:
    """What a run will cost. None is what is not known yet."""

    sites: int
    parameters: int
    file_bytes: int
    parts: tuple[Part, ...]
    """Preparation, class pictures, training, previews; those that take no time are left out."""
    class_pictures: int
    """How many are still to be drawn."""
    peak_bytes: int | None
    device: str
    """ "cpu", "cuda" or "mps": where the peak is."""
    notes: tuple[str, ...]
    """What had to be settled for some layers, and what costs more than it might."""
    advice: str = ""
    """What to do where the memory is not enough."""
    processes: int = 1
    """How many there are; on a CPU the peak is what they take together, on a GPU what each card gives."""

    @property
    def seconds(self) -> float | None:
        """All parts together; None while one of them is not known."""
        known = [part.seconds for part in self.parts if part.seconds is not None]
        return sum(known) if len(known) == len(self.parts) else None

    def sentences(self) -> list[str]:
        """The cost for a person."""
        lines = [
            f"{self.sites} layers, {self.parameters:,} parameters, a file of about {plain_bytes(self.file_bytes)}."
        ]
        for part in self.parts:
            if part.seconds is not None:
                lines.append(f"{part.name.capitalize()}: {plain_seconds(part.seconds)} ({part.source}).")
        if self.seconds is None:
            lines.append("How long it takes is not known yet: nothing like it was timed on this machine.")
        else:
            lines.append(f"Together about {plain_seconds(self.seconds)}.")
        if self.peak_bytes is not None:
            where = "GPU memory" if self.device == "cuda" else "memory"
            if self.processes > 1:
                where += " on each card" if self.device == "cuda" else f" for {self.processes} processes"
            lines.append(f"It needs about {plain_bytes(self.peak_bytes)} of {where} ({COUNTED}).")
        if self.advice:
            lines.append(self.advice)
        return lines


def cost_of(
    config: TrainConfig, *, pictures: int, workspace: Path, threads: int, sides: Sequence[Size] | None = None
) -> Cost:
    """What a run with so many pictures in its main set will cost, as far as it is known. Reads small files only.

    `threads` are the processor threads the run will have, `sides` the width and height of each of those images where
    they are known. Raises UserError for a model or a VAE that cannot be read.
    """
    check_vae(config.model.vae)
    model = outline(config.model.path)
    device = pick_device(config.model.device)
    key = shape_of(config.model.path)
    sites = plan_run(model, config)
    book = Book()
    left = class_pictures_left(model, config, workspace)
    pieces = pieces_of(model, key, config, machine_name(device, threads))
    counts = work_of(model, config, pictures=pictures, class_pictures=left, sides=sides)
    vectors = count_vectors(model, config)
    notes = sorted({note for site in sites if (note := getattr(site.plan, "note", ""))})
    notes += notes_on(config)
    if text_is_live(config):
        notes.append("captions are encoded anew in each step")
    known = book.read()

    def peak_of(one: TrainConfig) -> int | None:
        found = known.get(memory_piece(key, one, device))
        return None if found is None else int(found) * (1 if device.type == "cuda" else one.launch.processes)

    peak = peak_of(config)
    advice = ""
    if peak is not None:
        advice = advise(config, peak, room=room_on(device), memory=memory_of(device), peak_of=peak_of).sentence
    return Cost(
        sites=len(sites),
        parameters=count_parameters(sites) + vectors,
        file_bytes=file_bytes(sites, config.output.file_precision)
        + vectors * (4 if config.output.file_precision == "fp32" else 2),
        parts=parts_of(book, pieces, counts),
        class_pictures=left,
        peak_bytes=peak,
        device=device.type,
        notes=tuple(notes),
        advice=advice,
        processes=config.launch.processes,
    )


def memory_piece(shape: str, config: TrainConfig, device: torch.device) -> Piece:
    """What a run's memory depends on, as a key of the book."""
    training, data = config.training, config.data
    settings = [
        config.adapter.model_dump(), config.targets.model_dump(), config.model.precision, config.model.clip_skip,
        config.model.base_8bit, config.model.block_offload, config.model.vae, data.buckets, training.ema > 0,
        training.batch, training.optimizer, training.gradient_checkpointing, data.resolution, data.shuffle_tags,
        training.start_from, config.embedding.vectors,
        min(config.prior.images, DRAWN_AT_ONCE) if config.prior.weight else 0,
    ]  # fmt: skip
    place = device.type if device.type == "cpu" else f"{device.type} of {memory_of(device)}"
    return Piece("peak bytes", f"{shape}, {place}, torch {torch.__version__}", json.dumps(settings))


def work_of(
    model: Model, config: TrainConfig, *, pictures: int, class_pictures: int, sides: Sequence[Size] | None = None
) -> dict[Unit, int]:
    """How often each piece of work comes in a run with so many pictures in its main set; further sets are counted.

    Without `sides`, the width and height of each of them, they are reckoned with as square.
    """
    data, training, output = config.data, config.training, config.output
    counts = [pictures, *count_further(data)]
    mirrored = sum(count for count, source in zip(counts, sources_of(data), strict=True) if source.flip)
    pictures = sum(counts)
    held_out = min(held_out_of(data, pictures), pictures // 4)
    class_items = config.prior.images if config.prior.weight else 0
    square = (model.size, model.size)
    class_latents = (
        expect_class_latents(
            data,
            training,
            [[square] * counts[0] if sides is None else sides, *(sides_of(one.images) for one in sources_of(data)[1:])],
            count=class_items,
            ranks=config.launch.processes,
            resolution=data.resolution or model.size,
            step=model.size_step,
        )
        if class_items and pictures
        else 0
    )
    looks = 1 + _times(training.steps, output.validate_every or max(training.steps // 10, 1))
    is_cached = not text_is_live(config)
    return {
        "loading": 1,
        "latents": pictures + mirrored + class_latents,
        "captions": 1 + pictures + min(class_items, max(len(model.habits.backgrounds), 1)) if is_cached else 0,
        "class picture": class_pictures,
        "preview": len(preview_prompts(model, config, [])) * (1 + _times(training.steps, output.sample_every)),
        "step": training.steps,
        "fixed-noise loss": looks * min(held_out or pictures, MOST_LOOKED_AT),
        "checkpoint": _times(training.steps, output.checkpoint_every or max(training.steps // 5, 1)),
    }


def _times(steps: int, every: int) -> int:
    """How often something comes that is due every so many steps and after the last; 0: only then."""
    return -(-steps // every) if every else 1


def parts_of(book: Book, pieces: Mapping[Unit, Piece], counts: Mapping[Unit, int]) -> tuple[Part, ...]:
    """The run's time by parts, each as sure as its least sure piece."""
    found: dict[str, list[tuple[Unit, float, Pace | None]]] = {}
    for unit, name in _PARTS.items():
        if counts[unit]:
            found.setdefault(name, []).append((unit, counts[unit], book.expect(pieces[unit])))
    parts = []
    for name, rows in found.items():
        if any(pace is None and unit not in _SMALL for unit, _, pace in rows):
            parts.append(Part(name, None, ""))
            continue
        seconds = sum(count * pace.seconds for _, count, pace in rows if pace is not None)
        is_measured = all(pace is None or pace.is_measured for _, _, pace in rows)
        parts.append(Part(name, seconds, MEASURED if is_measured else SCALED))
    return tuple(parts)


def plain_seconds(seconds: float) -> str:
    """Seconds for a person: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def plain_bytes(size: float) -> str:
    """Bytes for a person: "840 KB", "2.4 MB", "6.1 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} KB"
