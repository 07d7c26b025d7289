"""Does an adapter draw its subject, and does the prompt still count?

`python -m benchmarks.quality ADAPTER --example teddy`

Measured as in the starter model's card: 4 prompts with backgrounds that no training picture has x 8 seeds.
- background right: the median colour of the 5-pixel frame is nearest, of the 14 named colours, to the one asked;
- colour distance: the mean 4 x 4 x 4 RGB histogram of the foreground (further than 40 from that median) against the
  training pictures', half the L1 distance: 0 the same, 1 nothing in common. Differences under 0.05 are noise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from reparam_diffusion.apply import generate
from reparam_diffusion.gallery.grid import make_grid
from reparam_diffusion.models.load import Model, load_model
from reparam_diffusion.models.parts import ASSETS

COLOURS = {
    "white": (252, 252, 252), "black": (20, 20, 24), "gray": (144, 144, 148), "red": (225, 55, 55),
    "orange": (250, 150, 60), "yellow": (252, 218, 85), "green": (90, 185, 95), "teal": (55, 170, 170),
    "blue": (60, 110, 222), "light blue": (165, 210, 252), "purple": (135, 80, 195), "pink": (250, 150, 192),
    "brown": (135, 88, 55), "beige": (240, 226, 200),
}  # fmt: skip
EXAMPLES = {
    "teddy": ("a 3d icon of sks toy on a {} background", ("red", "black", "pink", "brown")),
    "rocket": ("a 3d icon of sks aircraft on a {} background", ("red", "green", "blue", "brown")),
    "flat-style": ("a flatvec icon of a dog face on a {} background", ("red", "green", "blue", "brown")),
}
SEEDS = 8


def pixels(image: Image.Image) -> np.ndarray:
    """(128, 128, 3), 0 to 255."""
    return np.asarray(image.convert("RGB").resize((128, 128), Image.Resampling.LANCZOS), dtype=np.float64)


def frame_colour(picture: np.ndarray) -> np.ndarray:
    """The median colour of the 5-pixel frame."""
    inside = np.zeros(picture.shape[:2], dtype=bool)
    inside[5:-5, 5:-5] = True
    return np.median(picture[~inside], axis=0)


def nearest_colour(colour: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))


def histogram(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """The mean foreground histogram of pictures, 64 bins that sum to 1."""
    rows = []
    for picture in pictures:
        foreground = picture[np.linalg.norm(picture - frame_colour(picture), axis=-1) > 40]
        bins = (foreground // 64).astype(int) @ np.array([16, 4, 1])
        counts = np.bincount(bins, minlength=64).astype(float)
        rows.append(counts / max(counts.sum(), 1.0))
    return np.mean(rows, axis=0)


def draw_all(
    model: Model, example: str, adapters: Sequence[tuple[Path, float]], *, seeds: int
) -> dict[str, list[Image.Image]]:
    """Pictures by background."""
    template, backgrounds = EXAMPLES[example]
    return {b: generate(model, template.format(b), adapters=adapters, count=seeds) for b in backgrounds}


def measure(drawn: dict[str, list[Image.Image]], example: str) -> tuple[float, float]:
    """(share of right backgrounds, colour distance to the training pictures)."""
    pictures = {background: [pixels(image) for image in images] for background, images in drawn.items()}
    right = [nearest_colour(frame_colour(p)) == background for background, row in pictures.items() for p in row]
    training = [pixels(Image.open(file)) for file in sorted((ASSETS / "examples" / example).glob("*.png"))]
    distance = np.abs(histogram([p for row in pictures.values() for p in row]) - histogram(training)).sum() / 2
    return float(np.mean(right)), float(distance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", type=Path, help="an adapter file; without one the base model is measured")
    parser.add_argument("--example", choices=EXAMPLES, default="teddy")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--grid", type=Path, help="write the pictures as a grid")
    options = parser.parse_args()
    adapters = [(options.adapter, options.strength)] if options.adapter else []
    begun = time.time()
    drawn = draw_all(load_model("starter"), options.example, adapters, seeds=options.seeds)
    right, distance = measure(drawn, options.example)
    row = {"example": options.example, "adapter": str(options.adapter or "base model"), "strength": options.strength}
    print(
        json.dumps(
            row
            | {"background_right": right, "colour_distance": round(distance, 3), "seconds": round(time.time() - begun)}
        )
    )
    if options.grid:
        backgrounds = list(drawn)
        rows = [(f"seed {n}", [drawn[b][n] for b in backgrounds]) for n in range(min(4, options.seeds))]
        make_grid(rows, backgrounds).save(options.grid)


if __name__ == "__main__":
    main()
