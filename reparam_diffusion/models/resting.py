"""Weights that rest in host memory and are on the device only while something computes with them.

Each visit is a fresh copy that the module holds in the resting one's place: what autograd keeps is that copy, so a
module may leave the device before its gradient has come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""diffusers' blocks that gradient checkpointing computes again one at a time: nearly all of a UNet's weight."""


class Rest:
    """A module's tensors (without those of some blocks inside) at rest, and on the device from `fetch` to `leave`."""

    def __init__(self, module: nn.Module, device: torch.device, *, but: list[nn.Module] | None = None) -> None:
        others = {id(inner) for block in but or [] for inner in block.modules()}
        own = [inner for inner in module.modules() if id(inner) not in others]
        stores = [store for inner in own for store in (inner._parameters, inner._buffers)]
        self._places: list[tuple[dict[str, Any], str, Tensor]] = [  # Any: torch's own, parameters or buffers
            (store, name, tensor) for store in stores for name, tensor in store.items() if tensor is not None
        ]
        self._device = device
        self.is_here = False
        self.fetched = 0

    def pin(self) -> None:
        """Move what rests into memory that a GPU reads without the processor."""
        for _, _, tensor in self._places:
            tensor.data = tensor.data.pin_memory()

    def fetch(self) -> None:
        """Copy the tensors to the device."""
        for store, name, resting in self._places:
            here = resting.detach().to(self._device, copy=True, non_blocking=resting.is_pinned())
            store[name] = nn.Parameter(here, requires_grad=False) if isinstance(resting, nn.Parameter) else here
        self.is_here = True
        self.fetched += 1

    def leave(self) -> None:
        """Put the resting tensors back; the copies go when nothing needs them any more."""
        for store, name, resting in self._places:
            store[name] = resting
        self.is_here = False

    @contextmanager
    def visiting(self) -> Iterator[None]:
        """On the device while the body runs; one that is there already stays."""
        if self.is_here:
            yield
            return
        self.fetch()
        try:
            yield
        finally:
            self.leave()


class Offload:
    """The blocks of a frozen UNet, each fetched for its forward and once more when that is computed again.

    One block at a time is on the device. It saves memory in training only with gradient checkpointing.
    """

    def __init__(self, unet: nn.Module, device: torch.device) -> None:
        self.blocks = [block for block in unet.modules() if type(block).__name__ in _BLOCKS]
        self.rests = [Rest(block, device) for block in self.blocks]
        self._handles = [
            handle
            for block, rest in zip(self.blocks, self.rests, strict=True)
            for handle in (
                block.register_forward_pre_hook(lambda *_, rest=rest: rest.fetch()),
                # Recomputation ends early with an exception, and the block must leave then too.
                block.register_forward_hook(lambda *_, rest=rest: rest.leave(), always_call=True),
            )
        ]

    def end(self) -> None:
        """The blocks are plain ones again."""
        for handle in self._handles:
            handle.remove()
