"""The most memory that a run holds at once: its own work on tensors without numbers, every allocation counted.

The model's outline encodes, draws and takes one step on torch's meta device: autograd keeps there what it keeps in a
run. What libraries take beside the tensors comes on top, as measured on a CPU (docs/memory.md).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reparam_diffusion.adapters.base import METHODS, Adapter
from reparam_diffusion.config import TrainConfig
from reparam_diffusion.data.buckets import Size, bucket_sizes, square
from reparam_diffusion.inject import Injection, attach
from reparam_diffusion.models.eightbit import Linear8bit
from reparam_diffusion.models.encode import Encoded, encode
from reparam_diffusion.models.ledger import Ledger, bytes_of, counted
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.precision import vae_dtype
from reparam_diffusion.models.quiet import quiet
from reparam_diffusion.models.room import KEPT_FREE
from reparam_diffusion.models.sample import at_once
from reparam_diffusion.models.tiles import Way, taken, tile_side
from reparam_diffusion.models.words import reading_only
from reparam_diffusion.targets import SitePlan
from reparam_diffusion.training.batch import teaches_text, text_is_live
from reparam_diffusion.training.embedding import blank_word
from reparam_diffusion.training.encoding import spared
from reparam_diffusion.training.learner import plan_run
from reparam_diffusion.training.measure import TIMES
from reparam_diffusion.training.objective import Noised, Objective
from reparam_diffusion.training.prepare import DRAWN_AT_ONCE
from reparam_diffusion.training.ready import keep, recompute, recomputes

STATES = {
    "adamw": 8, "adam": 8, "radam": 8, "nadam": 8, "sgd": 4, "rmsprop": 4, "adafactor": 0, "adamw8bit": 2, "lion": 4,
    "lion8bit": 1, "prodigy": 16, "adamw_schedulefree": 8,
}  # fmt: skip
"""Bytes that an optimizer keeps for each number it trains."""
_LEAST_8BIT = 4096
"""bitsandbytes keeps states of fewer numbers than this in fp32."""
_PROGRAM_BYTES = 115_000_000
"""On a CPU: code and tables that libraries load at first use, and what the allocator keeps in fragments."""
_KERNEL_BYTES = 350_000
"""On a CPU: oneDNN compiles and keeps a kernel for every shape."""
_CUDA_SHARE = 0.1
"""On a GPU: scratch space and fragments, not measured."""


@dataclass(frozen=True)
class Memory:
    """Bytes held at the fullest moment of each part of a run, the weights included."""

    loading: int
    encoding: int
    drawing: int
    training: int

    @property
    def peak(self) -> int:
        return max(self.loading, self.encoding, self.drawing, self.training)


def count_memory(model: Model, config: TrainConfig, device: str, *, memory: int | None = None) -> Memory:
    """What a run on a "cpu", "cuda" or "mps" device needs, from its model's outline in the run's number format.

    On a CUDA card the parts come and go as in a run. `memory` is all that the device has, in bytes: where it is short,
    the VAE works in tiles (None: never). Takes seconds; the outline is left as it was.
    """
    with quiet():
        model.vae.to(vae_dtype(model.vae.config, torch.device(device)))
    if device == "cuda":
        model.stage(block_offload=config.model.block_offload)
    try:
        return _count(model, config, device, memory)
    finally:
        model.unstage()


def _count(model: Model, config: TrainConfig, device: str, memory: int | None) -> Memory:
    parts = (*model.parts.values(), model.vae)
    resident = sum(bytes_of(part) for part in parts) if device != "cuda" else 0
    drawn = min(config.prior.images, DRAWN_AT_ONCE, at_once(torch.device(device), model.size, model.size))
    share = 1.0 if device == "cpu" else 1 + _CUDA_SHARE

    def coded(way: Way, size: Size, beside: int) -> int:
        """What a picture of that size takes in the VAE, with so much beside it."""
        width, height = size
        beside += resident or bytes_of(model.vae)
        room = (memory or sys.maxsize) - KEPT_FREE - beside
        tile = tile_side(model.vae, way, height, width, room=spared(room) if way == "encode" else room, device=device)
        return beside + taken(model.vae, way, height, width, device=device, side=tile)

    def worked(work: Callable[[], object], beside: int, *used: nn.Module) -> tuple[int, Ledger]:
        """What a piece of work takes with these parts on the device, with so much beside them."""
        with counted(*parts, *learning) as ledger, model.using(*used):
            work()
        return int((resident + beside + ledger.peak) * share), ledger

    learning: list[Adapter] = []
    size, own = largest(model, config), (model.size, model.size)
    with torch.no_grad():
        encoding = worked(lambda: encode(model, [""]), 0, *model.text_encoders)[0]
        encoding = max(encoding, coded("encode", size, 0))
        drawing = worked(lambda: _denoise(model, drawn), 0, model.unet)[0] if config.prior.weight else 0
    sites, word = plan_run(model, config), blank_word(model, config)
    vectors = [] if word is None else list(word.vectors.values())
    with (
        attach(model.parts, _blank_adapters(model, sites)) as injection,
        nullcontext() if word is None else reading_only(model, word),
        _recomputed(model, config),
    ):
        learning = list(injection.adapters.values())
        learned = sum(bytes_of(adapter) for adapter in learning) + sum(v.nbytes for v in vectors)
        trained = [p.numel() for p in (*injection.parameters(), *vectors)]
        learned += sum(_state_bytes(config.training.optimizer, count) for count in trained)
        learned += 4 * sum(trained) if config.training.ema else 0  # the moving average
        with torch.no_grad():
            drawing = max(drawing, coded("decode", own, learned))
            drawing = max(drawing, worked(lambda: _look(model, config), learned, model.unet)[0])
            if math.prod(size) < math.prod(own):  # else a preview's two passes are less than the four of a look
                drawing = max(drawing, worked(lambda: _denoise(model, 1), learned, model.unet)[0])
        used = (model.unet, *(model.text_encoders if text_is_live(config) else []))
        training, ledger = worked(lambda: _step(model, config, injection), learned, *used)
    found = Memory(resident and resident + _whole_of_8bit(model), encoding, drawing, training)
    if device != "cpu":
        return found
    beside = _PROGRAM_BYTES + _KERNEL_BYTES * len(ledger.kernels)
    return Memory(*(part + beside for part in vars(found).values()))


def _whole_of_8bit(model: Model) -> int:
    """What the layers of a base in 8 bits were, which is in memory beside them: a file stays mapped as a whole."""
    layers = [inner for inner in model.unet.modules() if isinstance(inner, Linear8bit)]
    return sum(layer.numbers.numel() * layer.dtype.itemsize for layer in layers)


def _state_bytes(optimizer: str, numbers: int) -> int:
    """What the optimizer keeps for one parameter; of 8 bits also the scale of each block of 256."""
    if not optimizer.endswith("8bit"):
        return STATES[optimizer] * numbers
    if numbers < _LEAST_8BIT:
        return 4 * STATES[optimizer] * numbers
    return STATES[optimizer] * (numbers + 4 * -(-numbers // 256))


@contextmanager
def _recomputed(model: Model, config: TrainConfig) -> Iterator[None]:
    """The outline as the settings ask for it while the body runs."""
    if recomputes(config):
        recompute(model, text=teaches_text(config))
    try:
        yield
    finally:
        keep(model)


def _blank_adapters(model: Model, sites: Sequence[SitePlan]) -> dict[str, Adapter]:
    """Adapters with shapes and no numbers."""
    built = {}
    with torch.device("meta"):
        for planned in sites:
            adapter = METHODS[planned.method].adapter(planned.shape, planned.plan)
            if getattr(planned.plan, "weight_decompose", False):
                adapter.decompose(torch.empty(planned.shape))
            built[planned.site] = adapter
    return built


def largest(model: Model, config: TrainConfig) -> Size:
    """Width and height of the largest pictures that the run may train on: buckets differ by a few percent in area."""
    resolution = config.data.resolution or model.size
    if not config.data.buckets:
        return square(resolution, model.size_step)
    return max(bucket_sizes(resolution, model.size_step), key=math.prod)


def _latents(model: Model, size: Size, count: int) -> Tensor:
    width, height = (side // model.pixels_per_latent for side in size)
    return torch.empty(count, model.unet.config.in_channels, height, width, device="meta")


def _text(model: Model, count: int) -> Encoded:
    width = model.unet.config.cross_attention_dim
    tokens = model.tokenizers[0].model_max_length
    pooled = None
    if model.family == "sdxl":
        pooled = torch.empty(count, model.text_encoders[-1].config.projection_dim, device="meta")
    return Encoded(torch.empty(count, tokens, width, device="meta"), pooled)


def _denoise(model: Model, count: int) -> None:
    """One sampling step of pictures at once: the UNet sees each with and without the prompt."""
    _predict(model, _latents(model, (model.size, model.size), 2 * count), _text(model, 2 * count))


def _look(model: Model, config: TrainConfig) -> None:
    """The fixed-noise loss of one picture."""
    count = len(TIMES)
    _predict(model, _latents(model, largest(model, config), count), _text(model, count))


def _predict(model: Model, latents: Tensor, text: Encoded) -> Tensor:
    count = len(latents)
    times = torch.empty(count, dtype=torch.long, device="meta")
    added = None
    if text.pooled is not None:
        added = {"text_embeds": text.pooled.to(model.dtype), "time_ids": _size_ids(model, count)}
    return model.unet(
        latents.to(model.dtype), times, text.hidden.to(model.dtype), added_cond_kwargs=added, return_dict=False
    )[0]


def _size_ids(model: Model, count: int) -> Tensor | None:
    return torch.empty(count, 6, dtype=model.dtype, device="meta") if model.family == "sdxl" else None


def _step(model: Model, config: TrainConfig, injection: Injection) -> None:
    """Forward and backward of one pass, the class pictures included; the gradients stay."""
    training = config.training
    count = training.batch * (2 if config.prior.weight else 1)
    objective = Objective(model, min_snr_gamma=training.min_snr_gamma, noise_offset=0.0)
    latents = _latents(model, largest(model, config), count)
    batch = Noised(latents, torch.empty_like(latents), torch.empty(count, dtype=torch.long, device="meta"))
    text = _text(model, count)
    if text_is_live(config):
        text = encode(model, [""] * count, clip_skip=config.model.clip_skip)
    loss = objective.losses(model.unet, batch, text, _size_ids(model, count), model.dtype).mean()
    for name in {adapter.name for adapter in injection.adapters.values()}:
        penalty = METHODS[name].penalty
        if penalty is not None:
            loss = loss + penalty([adapter for adapter in injection.adapters.values() if adapter.name == name])
    loss.backward()
