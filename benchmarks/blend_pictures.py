"""The pictures of docs/blending.md: `python -m benchmarks.blend_pictures EVIDENCE` (a folder of `benchmarks.quality`).

Teddies trained with every method, each blended with one flat style into one file, and what compressing that file does.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL.Image import Image

from reparam_diffusion.apply import generate
from reparam_diffusion.gallery.blend.blending import blend_files, settle_options
from reparam_diffusion.gallery.blend.forms import Form
from reparam_diffusion.gallery.blend.result import Report, finished
from reparam_diffusion.gallery.blend.sources import Source
from reparam_diffusion.gallery.collide import Collision, collide, heat_map
from reparam_diffusion.gallery.grid import make_grid
from reparam_diffusion.models.load import Model, load_model

DOCS = Path(__file__).resolve().parents[1] / "docs"
BACKGROUNDS = ("blue", "purple", "teal")
METHODS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "adalora": "AdaLoRA"}
WAYS: dict[str, dict[str, object]] = {
    "sum": {},
    "average": {},
    "slerp": {"t": 0.5},
    "ties": {"density": 0.5},
    "dare": {"drop": 0.5},
    "prune": {"density": 0.25},
    "svd": {"rank": 8},
}
FORMS = {
    "exact": Form(),
    "LoRA, rank 16": Form(kind="lora", rank=16),
    "LoRA, rank 4": Form(kind="lora", rank=4),
    "LoRA, 95 %": Form(kind="lora", energy=0.95),
    "LoRA, 2 MB": Form(kind="lora", megabytes=2.0),
    "LoKr, 8": Form(kind="lokr", factor=8),
    "OFT, 8": Form(kind="oft", block_size=8),
}


def newest(evidence: Path, name: str) -> Path:
    """The adapter of the newest run of a preset."""
    return sorted(evidence.glob(f"{name}-[0-9]*"))[-1] / "adapter.safetensors"


def row(model: Model, what: str, *files: Path) -> list[Image]:
    """A picture on every background."""
    prompts = [f"{what} on a {background} background" for background in BACKGROUNDS]
    return [generate(model, prompt, adapters=list(files), seed=1)[0] for prompt in prompts]


def save(sheet: Image, name: str) -> None:
    """A PNG among the docs."""
    sheet.save(DOCS / f"{name}.png", optimize=True)


def main(evidence: Path) -> None:
    model, style, both = load_model("starter"), newest(evidence, "style"), "a flatvec icon of sks toy"
    teddies = {method: newest(evidence, f"{method}-subject") for method in METHODS}
    columns = [f"on {background}" for background in BACKGROUNDS]
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "blend.safetensors"

        def made(*sources: Source, **more: object) -> Report:
            return finished(blend_files(sources, out, model=model, **more))  # type: ignore[arg-type]  # passed through

        rows = [("teddy (LoRA)", row(model, "a 3d icon of sks toy", teddies["lora"]))]
        rows.append(("flat style (LoRA)", row(model, "a flatvec icon of a dog face", style)))
        for method, title in METHODS.items():
            made(Source(teddies[method]), Source(style))
            rows.append((f"{title} teddy + style", row(model, both, out)))
        save(make_grid(rows, columns), "blending")

        rows = []
        for method, options in WAYS.items():
            made(Source(teddies["lora"]), Source(style), method=method, options=settle_options(method, options))
            told = ", ".join(f"{key} {value}" for key, value in options.items())
            rows.append((f"{method} {told}", row(model, both, out)))
        save(make_grid(rows, columns), "blending-methods")

        rows = []
        for name, form in FORMS.items():
            report = made(Source(teddies["lokr"]), Source(style), form=form)
            told = f"{name}: {out.stat().st_size / 1e6:.1f} MB, error {report.error:.2g}"
            print(told)
            rows.append((told, row(model, both, out)))
        save(make_grid(rows, columns), "blending-forms")
    *_, found = collide(teddies["lora"], style, model=model)
    assert isinstance(found, Collision)
    save(heat_map(found), "blending-collisions")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
