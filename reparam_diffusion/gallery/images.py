"""Generated pictures on disk: PNGs under images/<date>/ with their settings in the text chunk, as A1111 writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from reparam_diffusion.errors import UserError
from reparam_diffusion.files import beside


def save_pictures(
    pictures: Sequence[Image],
    prompt: str,
    *,
    seed: int,
    facts: Mapping[str, Any],
    out: Path | None,
    workspace: Path,
) -> list[Path]:
    """Save pictures drawn from seed, seed + 1, …; into `out` (a file for one picture, or a folder) or the workspace."""
    if out is not None and out.suffix.lower() == ".png" and len(pictures) == 1:
        targets = [out]
    elif out is not None and out.suffix.lower() == ".png":
        targets = [out.with_stem(f"{out.stem}-{n + 1}") for n in range(len(pictures))]
    else:
        folder = out or workspace / "images" / f"{datetime.now():%Y-%m-%d}"
        stamp = f"{datetime.now():%H%M%S}"
        targets = [folder / f"{stamp}-{seed + n}.png" for n in range(len(pictures))]
    for n, (target, picture) in enumerate(zip(targets, pictures, strict=True)):
        note = PngInfo()
        note.add_text("parameters", parameters_text(prompt, seed=seed + n, size=picture.size, facts=facts))
        try:
            with beside(target) as hidden:
                picture.save(hidden, "PNG", pnginfo=note)
        except OSError as error:
            raise UserError(f"{target} cannot be written.", str(error.strerror), "Choose another place.") from error
    return targets


def parameters_text(prompt: str, *, seed: int, size: tuple[int, int], facts: Mapping[str, Any]) -> str:
    """A1111's "parameters" text: prompt with <lora:…> tags, negative prompt, then a line of settings."""
    tags = "".join(
        f" <lora:{name}:{strength:g}{'' if te is None else f':{te:g}'}>"
        for name, strength, te in facts.get("adapters", ())
    )
    lines = [f"{prompt}{tags}"]
    if facts.get("negative"):
        lines.append(f"Negative prompt: {facts['negative']}")
    lines.append(
        f"Steps: {facts['steps']}, CFG scale: {facts['guidance']:g}, Seed: {seed}, "
        f"Size: {size[0]}x{size[1]}, Model: {facts['model']}"
    )
    return "\n".join(lines)
