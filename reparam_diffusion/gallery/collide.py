"""Where two adapters collide: the cosine of their changes and the sizes, by layer, and as a heat map."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.gallery.blend.result import Progress
from reparam_diffusion.gallery.blend.sources import Opened, Source, base_for
from reparam_diffusion.models.load import Model

if TYPE_CHECKING:
    from PIL.Image import Image

_KINDS = (
    ("self q", r"attn1\.to_q"), ("self k", r"attn1\.to_k"), ("self v", r"attn1\.to_v"), ("self out", r"attn1\.to_out"),
    ("text q", r"attn2\.to_q"), ("text k", r"attn2\.to_k"), ("text v", r"attn2\.to_v"), ("text out", r"attn2\.to_out"),
    ("q", r"q_proj"), ("k", r"k_proj"), ("v", r"v_proj"), ("out", r"out_proj"),
    ("feed fwd", r"(\.ff\.|\.mlp\.)"), ("proj", r"proj_(in|out)$"), ("conv", r"conv"), ("rest", r""),
)  # fmt: skip
_CELL, _TOP, _LEFT = 38, 74, 74
_BARS = ("#222222", "#d28b00")


@dataclass(frozen=True)
class Overlap:
    """Two changes of one layer: their sizes, and the cosine of the angle between them (0 where one is silent)."""

    site: str
    first: float
    second: float
    cosine: float


@dataclass(frozen=True)
class Collision:
    """Two adapters, layer by layer, and over all layers."""

    files: tuple[str, str]
    layers: tuple[Overlap, ...]

    @property
    def cosine(self) -> float:
        """The cosine over all layers: 1 the same, 0 nothing to do with each other, −1 opposites."""
        dot = sum(row.first * row.second * row.cosine for row in self.layers)
        size = _size(self.layers, "first") * _size(self.layers, "second")
        return dot / size if size else 0.0

    @property
    def shared(self) -> int:
        """Layers that both change."""
        return sum(row.first > 0 and row.second > 0 for row in self.layers)

    def worst(self, count: int = 5) -> list[Overlap]:
        """The layers where most of a change is undone by the other: opposite and large."""
        return sorted(self.layers, key=lambda row: row.cosine * min(row.first, row.second))[:count]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        rows = [{"layer": r.site, "first": r.first, "second": r.second, "cosine": r.cosine} for r in self.layers]
        return {"files": list(self.files), "cosine": self.cosine, "shared": self.shared, "layers": rows}


def collide(first: Path, second: Path, *, model: Model | str | None = None) -> Iterator[Progress | Collision]:
    """Compare two adapters of any methods; yields progress, then the Collision."""
    files = [read_adapter(path) for path in (first, second)]
    opened = Opened([Source(first), Source(second)], base_for(files, model), files)
    rows = []
    for number, site in enumerate(opened.sites, 1):
        left, right = (layer.change for layer in opened.layers(site))
        sizes = left.norm(), right.norm()
        cosine = left.dot(right) / (sizes[0] * sizes[1]) if min(sizes) > 0 else 0.0
        rows.append(Overlap(site, sizes[0], sizes[1], max(-1.0, min(1.0, cosine))))
        yield Progress(number, len(opened.sites), site)
    yield Collision(_names(first, second), tuple(rows))


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The files' names, with their folders where the names are the same."""
    if first.name != second.name:
        return first.stem, second.stem
    return f"{first.parent.name}/{first.stem}", f"{second.parent.name}/{second.stem}"


def heat_map(found: Collision) -> Image:
    """Blocks down, kinds of layers across; a cell's colour is the cosine of its layers together.

    The two bars below it are the sizes of both changes there, against the largest cell.
    """
    from PIL import Image as Pictures
    from PIL import ImageDraw, ImageFont

    cells: dict[tuple[str, str], list[Overlap]] = {}
    for row in found.layers:
        cells.setdefault((block_of(row.site), kind_of(row.site)), []).append(row)
    blocks = list(dict.fromkeys(sorted((block for block, _ in cells), key=_order)))
    largest = max(_size(rows, side) for rows in cells.values() for side in ("first", "second")) or 1.0
    kinds = [name for name, _ in _KINDS if any(kind == name for _, kind in cells)]
    sheet = Pictures.new("RGB", (_LEFT + len(kinds) * _CELL + 10, _TOP + len(blocks) * _CELL + 30), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    pen.text((8, 6), f"{found.files[0]} and {found.files[1]}: cosine {found.cosine:+.2f}", "black", font)
    for column, kind in enumerate(kinds):
        for line, word in enumerate(kind.split()):
            pen.text((_LEFT + column * _CELL + _CELL / 2, 38 + 14 * line), word, "black", font, anchor="mm")
    for line, block in enumerate(blocks):
        top = _TOP + line * _CELL
        pen.text((8, top + _CELL / 2), block, "black", font, anchor="lm")
        for column, kind in enumerate(kinds):
            if rows := cells.get((block, kind)):
                left = _LEFT + column * _CELL
                value = Collision(found.files, tuple(rows)).cosine
                pen.rectangle((left, top, left + _CELL - 2, top + _CELL - 2), _colour(value), "#999999")
                pen.text((left + _CELL / 2 - 1, top + 12), f"{value:+.2f}", _ink(value), font, anchor="mm")
                for line_of, side in enumerate(("first", "second")):
                    length = (_CELL - 8) * _size(rows, side) / largest
                    bar = top + 22 + 5 * line_of
                    pen.rectangle((left + 3, bar, left + 3 + length, bar + 2), _BARS[line_of])
    told = "blue: the same way, red: against each other, white: apart; bars: the sizes of both changes"
    pen.text((8, sheet.height - 22), told, "#444444", font)
    return sheet


def _size(rows: Sequence[Overlap], side: str) -> float:
    return math.sqrt(sum(getattr(row, side) ** 2 for row in rows))


def block_of(site: str) -> str:
    """ "unet.down_blocks.1…" -> "down 1"; "te1…" -> "text 1"."""
    if not site.startswith("unet."):
        return f"text {site[2]}"
    found = re.match(r"unet\.(down|up)_blocks\.(\d+)", site)
    return f"{found[1]} {found[2]}" if found else "mid" if site.startswith("unet.mid_block") else "edges"


def kind_of(site: str) -> str:
    """What kind of layer a site is, as the heat map's columns have it."""
    return next(name for name, pattern in _KINDS if re.search(pattern, site))


def _order(block: str) -> tuple[int, str]:
    return ("text", "edges", "down", "mid", "up").index(block.split(maxsplit=1)[0]), block


def _colour(cosine: float) -> tuple[int, int, int]:
    """White at 0, blue at 1, red at −1; already a cosine of 0.3 shows."""
    strength = round(215 * min(1.0, abs(cosine)) ** 0.6)
    return (255 - strength, 255 - strength, 255) if cosine >= 0 else (255, 255 - strength, 255 - strength)


def _ink(cosine: float) -> str:
    return "white" if abs(cosine) > 0.55 else "#333333"


def collision_lines(found: Collision) -> list[str]:
    """For a person."""
    lines = [
        f"{found.files[0]} and {found.files[1]}: {found.shared} of {len(found.layers)} layers are changed by both",
        f"cosine over all layers {found.cosine:+.3f} (1 the same, 0 apart, -1 opposites)",
    ]
    rows: Sequence[Overlap] = [row for row in found.worst() if row.cosine < 0]
    if rows:
        lines.append("most against each other:")
        lines += [f"  {row.cosine:+.2f}  {row.site}  (sizes {row.first:.3g} and {row.second:.3g})" for row in rows]
    return lines
