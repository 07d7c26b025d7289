"""Which number format is the faster one here: measured, since a CPU's bf16 may be 5 times faster or 2 slower."""

from __future__ import annotations

import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from reparam_diffusion.files import beside, cache_file

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
    if chosen.type not in ("cpu", "cuda", "mps") or (chosen.type == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"The device {device} is not there.", do="Use auto, cpu, cuda or cuda:1.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"The device {device} is not there.",
            f"torch sees {torch.cuda.device_count()} CUDA devices.",
            "Use auto or cpu.",
        )
    return chosen


def pick_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The number format to load a model in: "auto" is bf16 (or fp16) on CUDA, and fp32 elsewhere."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def vae_dtype(config: Any, device: torch.device) -> torch.dtype:
    """A VAE's number format: fp32, since half of them overflow in fp16; on CUDA fp16 where the VAE is made for it.

    Any: diffusers' configuration, whose `force_upcast` says so.
    """
    is_made_for_it = config.get("force_upcast") is False
    return torch.float16 if is_made_for_it and device.type == "cuda" else torch.float32


def faster_on_cpu(unet: Any) -> torch.dtype:
    """bf16 where forward and backward through one of this UNet's blocks are clearly faster in it, else fp32.

    Measured once for each processor, torch, number of threads and UNet, and kept in the user's cache folder. An outline
    will do. Any: diffusers' classes are not imported here.
    """
    key = f"{_here()}, widths {unet.config.block_out_channels}"
    known = _kept()
    if known.get(key) in DTYPES:
        return DTYPES[known[key]]
    known[key] = "bf16" if _seconds(unet, torch.bfloat16) < 0.9 * _seconds(unet, torch.float32) else "fp32"
    try:
        with beside(cache_file("precision.json")) as hidden:
            hidden.write_text(json.dumps(known, indent=1), encoding="utf-8")
    except OSError:
        pass  # a read-only home costs a measurement each time, nothing else
    return DTYPES[known[key]]


def measured_formats() -> dict[str, str]:
    """The faster format of each UNet that was measured on this processor with this torch."""
    return {key: name for key, name in _kept().items() if key.startswith(_here())}


def _here() -> str:
    return f"{processor_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _kept() -> dict[str, str]:
    try:
        known: dict[str, str] = json.loads(cache_file("precision.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known


def _seconds(unet: Any, dtype: torch.dtype) -> float:
    """The best of four passes forward and back through a copy of the first block with attention, batch 2."""
    blocks = list(unet.down_blocks)
    attentive = [block for block in blocks if getattr(block, "has_cross_attention", False)]
    number = blocks.index(attentive[0]) if attentive else 0
    block = copy.deepcopy(blocks[number]).to_empty(device="cpu")  # an outline has no numbers; any will do
    for parameter in block.parameters():
        parameter.data.normal_(std=0.02)
    block.to(dtype)
    widths = unet.config.block_out_channels
    side = min(max(int(unet.config.sample_size) // 2**number, 8), 32)
    x = torch.randn(2, widths[max(number - 1, 0)], side, side, dtype=dtype, requires_grad=True)
    inputs: dict[str, Any] = {"temb": torch.randn(2, unet.time_embedding.linear_2.out_features, dtype=dtype)}
    if attentive:
        inputs["encoder_hidden_states"] = torch.randn(2, 77, unet.config.cross_attention_dim, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        block(x, **inputs)[0].sum().backward()
        best = min(best, time.perf_counter() - start)
    return best


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
