"""Which number format is the faster one here: measured, since a CPU's bf16 may be 5 times faster or 2 slower."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """ "fp32", "bf16" or "fp16"."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def pick_device(device: str) -> torch.device:
    """ "auto" is CUDA, then Apple's MPS, then the CPU. Raises UserError for a device that is not there."""
    from reparam_diffusion.errors import UserError

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f'There is no device called "{device}".', do="Use auto, cpu, cuda or cuda:1.") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"The device {device} is not there.",
            f"torch sees {torch.cuda.device_count()} CUDA devices.",
            "Use auto or cpu.",
        )
    return chosen


def pick_precision(wanted: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 where it multiplies faster than fp32 on this device, else fp32."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu":
        return torch.float32
    return DTYPES[_remembered()]


def _remembered() -> str:
    """The answer for this processor, measured once and kept in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "reparam-diffusion" / "precision.json"
    key = f"{processor_name()} torch {torch.__version__} threads {torch.get_num_threads()}"
    known: dict[str, str] = {}
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if known.get(key) in DTYPES:
        return known[key]
    known[key] = "bf16" if _seconds(torch.bfloat16) < 0.8 * _seconds(torch.float32) else "fp32"
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        beside = cache.with_name(f"{cache.name}.{os.getpid()}")
        beside.write_text(json.dumps(known), encoding="utf-8")
        beside.replace(cache)
    except OSError:
        pass  # a read-only home costs a measurement each time, nothing else
    return known[key]


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _seconds(dtype: torch.dtype) -> float:
    """The best of five: a 1024 x 1024 product and a 3x3 convolution as in a UNet."""
    matrix = torch.ones(1024, 1024, dtype=dtype)
    picture, kernel = torch.ones(1, 128, 32, 32, dtype=dtype), torch.ones(128, 128, 3, 3, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        torch.nn.functional.conv2d(picture, kernel, padding=1)
        best = min(best, time.perf_counter() - start)
    return best
