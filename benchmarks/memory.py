"""The memory estimate against real runs: the starter model with every method, Stable Diffusion 1.5's and XL's shapes.

    python -m benchmarks.memory [--geometry sd15] [--methods lora oft] [--set model.base_8bit=true]

Measured: a child process imports what training imports, notes its resident memory, and trains for a few steps with
previews; the growth of its peak (VmHWM) over that note is compared with `count_memory`. Linux and CPU only.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import TrainConfig, find_preset, parse_set, read_settings, settle, to_toml
from reparam_diffusion.models.parts import MODEL_CONFIGS, VOCABULARY, empty_parts, make_scheduler
from reparam_diffusion.models.pipeline import pipeline_over
from reparam_diffusion.models.quiet import quiet
from reparam_diffusion.training.estimate_memory import count_memory
from reparam_diffusion.training.ready import outline_for

ROOT = Path(__file__).resolve().parent.parent
TEDDY = ROOT / "assets" / "examples" / "teddy"


def settings_of(model: Path | str, method: str, extra: list[str]) -> TrainConfig:
    """A short run with the page's settings for the starter model."""
    short = [f"model.path='{model}'", f"data.images='{TEDDY}'", "data.trigger=sks", "data.class_word=toy"]
    if model != "starter":  # one picture, one at a time
        short += [f"data.images=['{TEDDY / '01.png'}']", "training.batch=1", "training.steps=1"]
    return settle(find_preset(f"{method}-subject"), parse_set(["training.steps=6", *short, *extra]))


def save_random(folder: Path, geometry: str, *, pixels: int) -> Path:
    """A model with Stable Diffusion 1.5's or XL's shapes and random weights, in bf16 to spare the disk.

    Its own pictures have `pixels` a side, as a processor takes minutes for one at SDXL's 1024.
    """
    from transformers import CLIPTokenizer

    configs = MODEL_CONFIGS / {"sd15": "sd1", "sdxl": "sdxl"}[geometry]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with quiet():
            parts = empty_parts(configs)
    finally:
        torch.set_default_dtype(before)
    parts.unet.register_to_config(sample_size=pixels // 8)
    encoders = {f"te{number}": encoder for number, encoder in enumerate(parts.text_encoders, 1)}
    pipe = pipeline_over(
        {"unet": parts.unet} | encoders,
        vae=parts.vae,
        tokenizers=[CLIPTokenizer.from_pretrained(VOCABULARY, model_max_length=77)] * 2,
        scheduler=make_scheduler(configs),
    )
    with quiet():
        pipe.save_pretrained(folder)
    habits = {"steps": 1, "preview": ["a photo of {trigger}"]}
    (folder / "habits.json").write_text(json.dumps(habits), encoding="utf-8")
    return folder


def measured(config: TrainConfig) -> int:
    """The growth of a child's peak over its imports, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "settings.toml").write_text(to_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.memory", "--train", folder]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.strip().splitlines()[-1]))


def train_in(folder: Path) -> None:
    """Train the settings in a folder and print how far the peak rose above the imports."""
    from reparam_diffusion.models.folder import import_pipelines
    from reparam_diffusion.training.loop import train

    import_pipelines()
    config = settle(read_settings(folder / "settings.toml"))
    gc.collect()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in train(config, folder=folder / "run"):
        pass
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print(peak - before)


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", choices=("starter", "sd15", "sdxl"), default="starter")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--set", nargs="*", default=[], help="further settings, such as training.batch=1")
    parser.add_argument("--checkpointing", nargs="+", choices=("false", "true"), default=("false", "true"))
    parser.add_argument("--pixels", type=int, default=512, help="side of the random models' own pictures")
    parser.add_argument("--keep", type=Path, help="a folder for the random models, to use them again")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train_in(arguments.train)
        return
    with tempfile.TemporaryDirectory() as folder:
        model: Path | str = "starter"
        if arguments.geometry != "starter":
            name = f"{arguments.geometry}-{arguments.pixels}"
            kept = arguments.keep / name if arguments.keep else Path(folder)
            model = (
                kept
                if (kept / "model_index.json").is_file()
                else save_random(kept, arguments.geometry, pixels=arguments.pixels)
            )
        print("| method | gradient checkpointing | estimated | measured | ratio |\n|---|---|---|---|---|")
        for method in arguments.methods:
            for checkpointing in arguments.checkpointing:
                extra = [f"training.gradient_checkpointing={checkpointing}", *arguments.set]
                config = settings_of(model, method, extra)
                base = outline_for(config, torch.device("cpu"))
                guess, truth = count_memory(base, config, "cpu").peak, measured(config)
                word = "on" if checkpointing == "true" else "off"
                print(
                    f"| {METHODS[method].title} | {word} | {guess / 1e6:.0f} MB | {truth / 1e6:.0f} MB "
                    f"| {guess / truth:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
