"""Processor time of SD 1.5's attention projections alone, forward and backward, by library: the overhead up close.

    python -m benchmarks.projections [--dtype fp32] [--repeats 12]

The whole step (`benchmarks.step_time`) hides a tenth of a second in ten; here are only the 128 adapted layers, with the
shapes and rows of 32x32 latents in a batch of 2, on one thread. The best of the rounds counts, so a busy machine
hardly matters.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from torch import Tensor, nn

from benchmarks.rivals import LIBRARIES, METHODS, build

LEVELS = ((320, 1024, 5), (640, 256, 5), (1280, 64, 5), (1280, 16, 1))
"""Width, tokens of a picture, and how many transformers of this kind the UNet has."""


class Projections(nn.Module):
    """The four projections of one attention."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> list[Tensor]:
        return [self.to_out[0](self.to_q(x)), self.to_k(context), self.to_v(context)]


class Transformer2DModel(nn.Module):
    """Self- and cross-attention; named as diffusers names it, since the targets look for that."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Projections(width, width), Projections(width, 768)

    def forward(self, x: Tensor, text: Tensor) -> list[Tensor]:
        return [*self.attn1(x, x), *self.attn2(x, text)]


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([Transformer2DModel(width) for width, _, _ in LEVELS])


def seconds(model: nn.Module, inputs: list[tuple[Tensor, Tensor]]) -> float:
    """One forward and backward of every projection of the UNet."""
    total = 0.0
    for level, (x, text), (_, _, count) in zip(model.levels, inputs, LEVELS, strict=True):
        start = time.process_time()
        found = [y for y in level(x, text) if y.requires_grad]
        torch.autograd.backward(found, [torch.ones_like(y) for y in found])
        total += count * (time.process_time() - start)
        x.grad = None
    return total


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.projections")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    base = Levels().to(dtype).requires_grad_(False).train()
    inputs = [
        (torch.randn(2, tokens, width).to(dtype).requires_grad_(), torch.randn(2, 77, 768).to(dtype))
        for width, tokens, _ in LEVELS
    ]
    models = {("frozen", "-"): base}
    for method in arguments.methods:
        for library in arguments.libraries:
            contender = build(library, method, base)
            if contender is not None:
                models[method, library] = contender.model
    best = dict.fromkeys(models, float("inf"))
    for _ in range(arguments.repeats):
        for key, model in models.items():
            best[key] = min(best[key], seconds(model, inputs))
            model.zero_grad(set_to_none=True)
    frozen = best["frozen", "-"]
    print(f"{'method':8} {'library':15} {'seconds':>8} {'ratio':>6} {'overhead':>9}")
    for (method, library), taken in best.items():
        print(f"{method:8} {library:15} {taken:8.3f} {taken / frozen:6.3f} {taken - frozen:9.3f}")


if __name__ == "__main__":
    main()
