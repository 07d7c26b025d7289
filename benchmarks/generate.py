"""What adapters cost while drawing: seconds a picture without and with them merged, and a change of strength.

    python -m benchmarks.generate [--geometry sd15] [--device cuda] [--json]

`sd15` is Stable Diffusion 1.5's own shapes with random weights, all three parts; `starter` is the bundled model. The
adapters are LoRA of rank 16 on attention+mlp of the UNet and on attention of the text encoder. Pictures without and
with them are drawn in turn; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Sequence

import torch

from benchmarks.step_time import DTYPES, build_model, seconds_of
from reparam_diffusion.adapters.lora import LoraSpec
from reparam_diffusion.inject import Merge
from reparam_diffusion.models.load import Model, load_model
from reparam_diffusion.models.sample import draw
from reparam_diffusion.models.source import STARTER
from reparam_diffusion.targets import build_adapters, plan_sites

TARGETS = {"unet": "attention+mlp", "te1": "attention"}


def whole_model(geometry: str, dtype: torch.dtype, device: str) -> Model:
    """A model of a geometry with every part that a drawing needs."""
    starter = load_model(STARTER, device=device, dtype=dtype)
    if geometry == "starter":
        return starter
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    parts = (CLIPTextModel(text).to(device, dtype), vae.to(device))
    for part in parts:
        part.requires_grad_(False).eval()
    return Model(
        name=geometry,
        unet=build_model(geometry, dtype, device).eval(),
        vae=parts[1],
        text_encoders=[parts[0]],
        tokenizers=starter.tokenizers,
        scheduler=starter.scheduler,
        device=starter.device,
        dtype=dtype,
    )


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Medians in seconds by what they are of."""
    model = whole_model(arguments.geometry, DTYPES[arguments.dtype], arguments.device)
    adapters = build_adapters(model.parts, plan_sites(model.parts, TARGETS, LoraSpec(rank=16, alpha=16)), seed=0)
    for adapter in adapters.values():
        adapter.up.data.normal_(std=0.01)  # type: ignore[union-attr]  # LoRA's; a fresh one is zero
    merge = Merge(model.parts)
    taken: dict[str, list[float]] = {"base": [], "merged": [], "first merge": [], "other strength": [], "restore": []}

    def picture() -> None:
        side = arguments.side
        draw(model, "a toy", seeds=[0], steps=arguments.steps, guidance=7.0, width=side, height=side)

    def at(strength: float) -> Callable[[], None]:
        def change() -> None:
            merge.settle([(adapters, lambda site: strength)])

        return change

    for number in range(arguments.repeats + 1):
        row = {"base": seconds_of(picture, arguments)}
        row["first merge"] = seconds_of(at(1.0), arguments)
        row["merged"] = seconds_of(picture, arguments)
        row["other strength"] = seconds_of(at(0.8), arguments)
        row["restore"] = seconds_of(merge.restore, arguments)
        if number > 0:  # the first round warms up
            for name, seconds in row.items():
                taken[name].append(seconds)
    pick = min if arguments.statistic == "min" else statistics.median
    return {name: pick(times) for name, times in taken.items()}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.generate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", choices=("sd15", "starter"), default="sd15")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--side", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps of a picture")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--repeats", type=int, default=5, help="rounds after the one that warms up")
    parser.add_argument("--statistic", choices=("median", "min"), default="median", help="min: for a busy machine")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall", help="processor: with one thread, for a busy machine"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    arguments = parser.parse_args(words)
    warnings.simplefilter("ignore")  # other libraries' notes on their own settings
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    seconds = measure(arguments)
    if arguments.json:
        print(json.dumps(seconds))
        return
    print(f"{arguments.geometry}, {arguments.dtype}, {arguments.device}, {arguments.side} px, {arguments.steps} steps")
    for name, value in seconds.items():
        print(f"{name:16} {value:8.3f} s")
    print(f"merged / base    {seconds['merged'] / seconds['base']:8.3f}")


if __name__ == "__main__":
    main()
