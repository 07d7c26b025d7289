"""The most memory that a run holds at once: its own work on tensors without numbers, every allocation counted.

The model's outline encodes, draws and takes one step on torch's meta device: autograd keeps there what it keeps in a
run. What libraries take beside the tensors comes on top, as measured on a CPU (docs/memory.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from reparam_diffusion.adapters.base import METHODS, Adapter
from reparam_diffusion.config import TrainConfig
from reparam_diffusion.inject import Injection, attach
from reparam_diffusion.models.encode import Encoded, encode
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.sample import at_once
from reparam_diffusion.models.words import reading_only
from reparam_diffusion.targets import SitePlan
from reparam_diffusion.training.batch import teaches_text, text_is_live
from reparam_diffusion.training.embedding import blank_word
from reparam_diffusion.training.learner import plan_run
from reparam_diffusion.training.measure import TIMES
from reparam_diffusion.training.objective import Noised, Objective
from reparam_diffusion.training.prepare import DRAWN_AT_ONCE
from reparam_diffusion.training.ready import keep, recompute

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

_ATEN = torch.ops.aten
_CONVOLUTIONS = {_ATEN.convolution, _ATEN.convolution_backward}
_PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm}


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


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, and the most that lived at once."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.kernels: set[tuple[object, ...]] = set()
        self._storages = WeakIdKeyDictionary()
        for tensor in known:
            self._storages[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # Any: torch's own
        out = func(*args, **(kwargs or {}))
        self._note_kernel(func.overloadpacket, [tensor for tensor in args if isinstance(tensor, Tensor)])
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        return out

    def _note_kernel(self, function: Any, inputs: list[Tensor]) -> None:  # Any: torch's own
        """oneDNN serves convolutions, and products in half precision."""
        if function in _CONVOLUTIONS or (function in _PRODUCTS and inputs[-1].dtype != torch.float32):
            self.kernels.add((function, *(tuple(tensor.shape) for tensor in inputs)))

    def _enter(self, storage: torch.UntypedStorage) -> None:
        if storage in self._storages:
            return
        size = storage.nbytes()
        self._storages[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, size)

    def _leave(self, size: int) -> None:
        self.live -= size


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as real devices compute it, without the matrix of scores that the meta device would hold.

    A torch function mode would be off while checkpointing recomputes, so the function itself is exchanged.
    """
    plain = nn.functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:  # Any: masks and numbers
        known = {name: options[name] for name in ("is_causal", "attn_mask", "scale") if name in options}
        out: Tensor = _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, **known)[0]
        return out

    nn.functional.scaled_dot_product_attention = fused  # type: ignore[assignment]  # for this body only
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = plain


def count_memory(model: Model, config: TrainConfig, device: str) -> Memory:
    """What a run on a "cpu" or a "cuda" device needs, from its model's outline in the run's number format.

    Takes seconds; the outline is left as it was.
    """
    everything = sum(_bytes(module) for module in (*model.parts.values(), model.vae))
    parked = 0  # a GPU is left by what training does not need; on a CPU all stays
    if device != "cpu":
        parked = _bytes(model.vae) + (0 if text_is_live(config) else sum(_bytes(e) for e in model.text_encoders))
    side = model.size
    drawn = min(config.prior.images, DRAWN_AT_ONCE, at_once(torch.device(device), side, side))
    with torch.no_grad():
        encoding = everything + max(_encode_picture(model, config), _encode_text(model))
        drawing = everything + _draw(model, drawn if config.prior.weight else 1)
    word = blank_word(model, config)
    with (
        attach(model.parts, _blank_adapters(model, plan_run(model, config))) as injection,
        nullcontext() if word is None else reading_only(model, word),
        _recomputed(model, config),
    ):
        vectors = [] if word is None else list(word.vectors.values())
        learned = sum(_bytes(adapter) for adapter in injection.adapters.values()) + sum(v.nbytes for v in vectors)
        learned += sum(_state_bytes(config.training.optimizer, p.numel()) for p in (*injection.parameters(), *vectors))
        with torch.no_grad():
            drawing = max(drawing, everything + learned + max(_draw(model, 1), _look(model, config)))
        with _counted(*model.parts.values(), *injection.adapters.values()) as ledger:
            _step(model, config, injection)
    training = everything - parked + learned + ledger.peak
    parts = [everything, encoding, drawing, training]
    if device == "cpu":
        beside = _PROGRAM_BYTES + _KERNEL_BYTES * len(ledger.kernels)
        return Memory(*(part + beside for part in parts))
    return Memory(*(int(part * (1 + _CUDA_SHARE)) for part in parts))


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
    if config.training.gradient_checkpointing:
        recompute(model, text=teaches_text(config))
    try:
        yield
    finally:
        keep(model)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@contextmanager
def _counted(*modules: nn.Module) -> Iterator[Ledger]:
    known = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    with Ledger(known) as ledger, _fused_attention():
        yield ledger


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


def _latents(model: Model, pixels: int, count: int) -> Tensor:
    side = pixels // model.pixels_per_latent
    return torch.empty(count, model.unet.config.in_channels, side, side, device="meta")


def _text(model: Model, count: int) -> Encoded:
    width = model.unet.config.cross_attention_dim
    tokens = model.tokenizers[0].model_max_length
    pooled = None
    if model.family == "sdxl":
        pooled = torch.empty(count, model.text_encoders[-1].config.projection_dim, device="meta")
    return Encoded(torch.empty(count, tokens, width, device="meta"), pooled)


def _encode_picture(model: Model, config: TrainConfig) -> int:
    side = config.data.resolution or model.size
    with _counted(model.vae) as ledger:
        model.vae.encode(torch.empty(1, 3, side, side, device="meta"))
    return ledger.peak


def _encode_text(model: Model) -> int:
    with _counted(*model.text_encoders) as ledger:
        encode(model, [""])
    return ledger.peak


def _draw(model: Model, count: int) -> int:
    """Drawing pictures at once: the UNet sees each with and without the prompt, the VAE one after the other."""
    with _counted(model.unet) as ledger:
        _predict(model, _latents(model, model.size, 2 * count), _text(model, 2 * count))
    with _counted(model.vae) as decoder:
        model.vae.decode(_latents(model, model.size, 1))
    return max(ledger.peak, decoder.peak)


def _look(model: Model, config: TrainConfig) -> int:
    """The fixed-noise loss of one picture."""
    count = len(TIMES)
    with _counted(model.unet) as ledger:
        _predict(model, _latents(model, config.data.resolution or model.size, count), _text(model, count))
    return ledger.peak


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
    latents = _latents(model, config.data.resolution or model.size, count)
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
