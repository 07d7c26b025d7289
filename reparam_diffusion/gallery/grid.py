"""A labelled grid of pictures: rows and columns with their names, for before/after sheets."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP = 6
_TEXT = 15
_LINE = _TEXT + 4
_WIDEST = 180  # pixels of a row's name


def make_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """Rows of equally large pictures; each row's name stands at its left, the columns' names on top, both wrapped."""
    font = ImageFont.load_default(size=_TEXT)
    width, height = rows[0][1][0].size
    sides = [_wrapped(name, font, _WIDEST) for name, _ in rows]
    tops = [_wrapped(name, font, width) for name in columns]
    left = _GAP * 2 + max(round(font.getlength(line)) for lines in sides for line in lines)
    top = max(len(lines) for lines in tops) * _LINE + _GAP * 2
    sheet = Image.new("RGB", (left + len(columns) * (width + _GAP), top + len(rows) * (height + _GAP)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)

    def write(lines: Sequence[str], x: float, y: float, anchor: str) -> None:
        for number, line in enumerate(lines):
            pen.text((x, y + (number - (len(lines) - 1) / 2) * _LINE), line, (40, 40, 40), font=font, anchor=anchor)

    for number, lines in enumerate(tops):
        write(lines, left + number * (width + _GAP) + width / 2, top / 2, "mm")
    for at, (lines, (_, pictures)) in enumerate(zip(sides, rows, strict=True)):
        y = top + at * (height + _GAP)
        write(lines, _GAP, y + height / 2, "lm")
        for number, picture in enumerate(pictures):
            sheet.paste(picture, (left + number * (width + _GAP), y))
    return sheet


def _wrapped(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """A name in lines no wider than `width`, broken between words, inside one only where it is too long by itself."""
    lines = [""]
    for word in name.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line] or [""]
