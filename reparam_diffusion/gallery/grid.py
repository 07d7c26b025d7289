"""A labelled grid of pictures: rows and columns with their names, for before/after sheets."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP = 6
_TEXT = 15


def make_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """Rows of equally large pictures; each row's name stands at its left, the columns' names on top."""
    font = ImageFont.load_default(size=_TEXT)
    width, height = rows[0][1][0].size
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = _GAP * 2 + max(round(ruler.textlength(name, font=font)) for name, _ in rows)
    top = _TEXT + _GAP * 3
    sheet = Image.new("RGB", (left + len(columns) * (width + _GAP), top + len(rows) * (height + _GAP)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(columns):
        pen.text((left + number * (width + _GAP) + width / 2, top / 2), name, (40, 40, 40), font=font, anchor="mm")
    for at, (name, pictures) in enumerate(rows):
        y = top + at * (height + _GAP)
        pen.text((_GAP, y + height / 2), name, (40, 40, 40), font=font, anchor="lm")
        for number, picture in enumerate(pictures):
            sheet.paste(picture, (left + number * (width + _GAP), y))
    return sheet
