"""How much memory a device has, how much of it is free, and whether it has run out."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import psutil  # type: ignore[import-untyped]  # it ships no types
import torch

KEPT_FREE = 700_000_000
"""What the desktop, the driver and other programs have of a device's memory, in bytes."""
_SPENT = (
    "out of memory",  # CUDA, HIP and "MPS backend out of memory"
    "can't allocate memory",  # "DefaultCPUAllocator: can't allocate memory: you tried to allocate … bytes"
    "cannot allocate memory",  # the system's own words (ENOMEM)
    "not enough memory",  # "DefaultCPUAllocator: not enough memory" (Windows)
    "failed to allocate",  # cuBLAS, oneDNN
    "could not allocate",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "std::bad_alloc",
    "invalid buffer size",  # MPS: a single tensor larger than the device takes
)


def memory_of(device: torch.device) -> int:
    """All of a device's memory in bytes; what a processor and Apple's MPS have is the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def free_on(device: torch.device) -> int:
    """What may still be taken, in bytes; what torch keeps in reserve on a GPU is free too."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _SPENT)


def empty_cache() -> None:
    """Return what torch keeps in reserve on a GPU to the system: CUDA's and Apple's."""
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def give_back() -> None:
    """Return what was freed and is kept for later to the system, where this C library (glibc) can: some 0.1 s a GB.

    glibc keeps the pieces between tensors that still live; a GB of them after a step of Stable Diffusion 1.5.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:  # Any: a C function
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
