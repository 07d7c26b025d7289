"""Memory counted on tensors without numbers: every allocation on torch's meta device is entered and left."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_ATEN = torch.ops.aten
_CONVOLUTIONS = {_ATEN.convolution, _ATEN.convolution_backward}
_PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm}


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


@contextmanager
def counted(*modules: nn.Module) -> Iterator[Ledger]:
    """Count what the body allocates besides the modules' own tensors."""
    known = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    with Ledger(known) as ledger, _fused_attention():
        yield ledger


def bytes_of(module: nn.Module) -> int:
    """What a module's parameters and buffers take."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
