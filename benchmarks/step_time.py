"""Time and memory of one training step: frozen model, our adapters, PEFT's and LyCORIS's, on the same layers.

    python -m benchmarks.step_time [--geometry sd15] [--device cuda] [--json]

Frozen step: weights frozen, the sample wants a gradient, text states do not. An adapter's step has forward, backward
and one fused AdamW step, for every library alike, and what its method asks for (AdaLoRA's penalty and scores). Steps
are timed in turn, round after round, in one process; peak memory is taken in a process of its own for each row.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.rivals import LIBRARIES, METHODS, Contender, build

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over the rounds, in seconds; overhead is the step less the frozen step."""

    method: str
    library: str
    seconds: float
    frozen_seconds: float
    ratio: float
    overhead: float
    peak_mb: float
    parameters: int


@dataclass(frozen=True)
class Batch:
    """What goes into the model and what should come out."""

    sample: Tensor
    timestep: Tensor
    states: Tensor
    target: Tensor
    added: dict[str, Tensor] | None


def build_model(geometry: str, dtype: torch.dtype, device: str) -> nn.Module:
    """The UNet of a geometry, frozen; random weights except for the starter model's."""
    from diffusers import UNet2DConditionModel

    if geometry == "starter":
        model = UNet2DConditionModel.from_pretrained(ROOT / "assets" / "starter-model" / "unet")
        return model.to(device, dtype).requires_grad_(False).train()
    shapes = {
        "sd15": {"cross_attention_dim": 768},
        "sdxl": {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }
    with torch.device("meta"):
        model = UNet2DConditionModel(**shapes[geometry])
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).train()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.uniform_(-1, 1).mul_(parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


def build_batch(model: nn.Module, dtype: torch.dtype, device: str, *, side: int, size: int) -> Batch:
    """Random inputs for a UNet of any shape."""
    chance = torch.Generator().manual_seed(0)
    config = model.config

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance).to(device, dtype)

    added = None
    if config.addition_embed_type == "text_time":
        added = {"text_embeds": noise(size, 1280), "time_ids": noise(size, 6)}
    return Batch(
        noise(size, config.in_channels, side, side),
        torch.full((size,), 500, device=device),
        noise(size, 77, config.cross_attention_dim),
        noise(size, config.out_channels, side, side),
        added,
    )


def loss_of(model: nn.Module, sample: Tensor, batch: Batch) -> Tensor:
    """Mean squared error, in fp32 as in training."""
    found = model(sample, batch.timestep, batch.states, added_cond_kwargs=batch.added, return_dict=False)[0]
    return nn.functional.mse_loss(found.float(), batch.target.float())


def frozen_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """The limit: the frozen model forward and back to its input."""

    def step() -> None:
        sample = batch.sample.detach().requires_grad_()
        loss_of(model, sample, batch).backward()

    return step


def adapter_step(contender: Contender, batch: Batch) -> Callable[[], None]:
    """Forward, backward, fused AdamW, and what the method asks for."""
    optimizer = torch.optim.AdamW(contender.parameters, lr=1e-4, fused=True)
    count = 150  # AdaLoRA: in the falling part of its schedule

    def step() -> None:
        nonlocal count
        count += 1
        loss = loss_of(contender.model, batch.sample, batch)
        if contender.penalty is not None:
            loss = loss + contender.penalty()
        loss.backward()
        optimizer.step()
        if contender.after_step is not None:
            contender.after_step(count)
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds_of(step: Callable[[], None], arguments: argparse.Namespace) -> float:
    """How long one step takes: on the wall, or of processor time."""
    on_cuda = arguments.device.startswith("cuda")
    clock = time.process_time if arguments.clock == "processor" else time.perf_counter
    if on_cuda:
        torch.cuda.synchronize()
    start = clock()
    step()
    if on_cuda:
        torch.cuda.synchronize()
    return clock() - start


def faster_dtype(arguments: argparse.Namespace) -> str:
    """bf16 or fp32, whichever takes the frozen step faster here."""
    taken = {}
    for name in ("fp32", "bf16"):
        dtype = DTYPES[name]
        model = build_model(arguments.geometry, dtype, arguments.device)
        batch = build_batch(model, dtype, arguments.device, side=arguments.side, size=arguments.batch)
        step = frozen_step(model, batch)
        step()
        taken[name] = min(seconds_of(step, arguments) for _ in range(3))
        del model, batch, step
        gc.collect()
    return min(taken, key=taken.__getitem__)


def measure(arguments: argparse.Namespace, dtype_name: str) -> list[Row]:
    """Every row's median time, taken in turn, with the frozen step between them; memory from processes of their own."""
    dtype = DTYPES[dtype_name]
    base = build_model(arguments.geometry, dtype, arguments.device)
    batch = build_batch(base, dtype, arguments.device, side=arguments.side, size=arguments.batch)
    steps: dict[tuple[str, str], Callable[[], None]] = {("frozen", "-"): frozen_step(base, batch)}
    counts = {("frozen", "-"): 0}
    for method in arguments.methods:
        for library in arguments.libraries:
            contender = build(library, method, base)
            if contender is not None:
                steps[method, library] = adapter_step(contender, batch)
                counts[method, library] = sum(parameter.numel() for parameter in contender.parameters)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for number in range(arguments.repeats + 1):
        for key, step in steps.items():
            seconds = seconds_of(step, arguments)
            if number > 0:  # the first round warms up
                taken[key].append(seconds)
    pick = min if arguments.statistic == "min" else statistics.median
    frozen = pick(taken["frozen", "-"])
    del steps
    rows = []
    for (method, library), times in taken.items():
        seconds = pick(times)
        peak = float("nan") if arguments.no_memory else peak_of(arguments, dtype_name, method, library)
        rows.append(
            Row(method, library, seconds, frozen, seconds / frozen, seconds - frozen, peak, counts[method, library])
        )
    return rows


def peak_of(arguments: argparse.Namespace, dtype_name: str, method: str, library: str) -> float:
    """Peak memory of a row's steps in megabytes, in a fresh process."""
    command = [
        sys.executable, "-m", "benchmarks.step_time", "--geometry", arguments.geometry, "--device", arguments.device,
        "--dtype", dtype_name, "--side", str(arguments.side), "--batch", str(arguments.batch),
        "--threads", str(arguments.threads), "--peak-of", method, library,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def print_peak(arguments: argparse.Namespace, method: str, library: str) -> None:
    """Take three steps of one row and print the most memory they held."""
    dtype = DTYPES[arguments.dtype]
    base = build_model(arguments.geometry, dtype, arguments.device)
    batch = build_batch(base, dtype, arguments.device, side=arguments.side, size=arguments.batch)
    contender = None if method == "frozen" else build(library, method, base)
    step = frozen_step(base, batch) if contender is None else adapter_step(contender, batch)
    forget_peak(arguments.device)
    for _ in range(3):
        step()
    print(f"{peak_mb(arguments.device):.1f}")


def forget_peak(device: str) -> None:
    """Start the measurement of the peak anew, once the model is built."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mb(device: str) -> float:
    """The peak since then: allocated device memory, or this process's resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform != "linux":
        return float("nan")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def table(rows: Sequence[Row]) -> str:
    """The rows for reading."""
    lines = [
        f"{'method':8} {'library':15} {'seconds':>8} {'ratio':>6} {'overhead':>9} {'peak MB':>9} {'parameters':>11}"
    ]
    for row in rows:
        lines.append(
            f"{row.method:8} {row.library:15} {row.seconds:8.3f} {row.ratio:6.3f} {row.overhead:9.3f} "
            f"{row.peak_mb:9.0f} {row.parameters:11,}"
        )
    return "\n".join(lines)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks.step_time", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", choices=("sd15", "sdxl", "starter"), default="sd15")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bf16 or fp32, as measured")
    parser.add_argument("--side", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--repeats", type=int, default=5, help="rounds after the one that warms up")
    parser.add_argument("--statistic", choices=("median", "min"), default="median", help="min: for a busy machine")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall", help="processor: with one thread, for a busy machine"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row instead of the table")
    parser.add_argument("--peak-of", nargs=2, metavar=("METHOD", "LIBRARY"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    warnings.simplefilter("ignore")  # other libraries' notes on their own settings
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print_peak(arguments, *arguments.peak_of)
        return
    dtype_name = faster_dtype(arguments) if arguments.dtype == "auto" else arguments.dtype
    rows = measure(arguments, dtype_name)
    if arguments.json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        print(f"{arguments.geometry}, {dtype_name}, {arguments.device}, batch {arguments.batch}, side {arguments.side}")
        print(table(rows))


if __name__ == "__main__":
    main()
