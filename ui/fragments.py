"""Small pieces of HTML that every tab uses. Everything that comes from a person or a file is escaped here."""

from __future__ import annotations

import base64
import io
import os
from html import escape
from pathlib import Path
from urllib.parse import quote

import gradio as gr
from PIL import Image, ImageOps

from reparam_diffusion.jobs.datasets import PictureSet

THUMBNAIL = 112  # pixels, twice what is shown
MOST_THUMBNAILS = 12
_served: set[Path] = set()


def serve(folder: Path) -> None:
    """Let the browser fetch the files of this folder, and of nothing around it."""
    folder = folder.resolve()
    if folder not in _served:
        gr.set_static_paths([folder])
        _served.add(folder)


def link_to(file: Path) -> str:
    """The address of a served file."""
    return f"gradio_api/file={quote(str(file.resolve()))}"


def plain_time(seconds: float) -> str:
    """ "12 s", "3 min", "2 h 5 min": no more than a person wants to know."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plain_size(count: int) -> str:
    """ "1.9 MB" for a number of bytes."""
    if count < 1e5:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def thumbnail(file: Path) -> str:
    """A small picture as a data address; empty where it cannot be drawn."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (THUMBNAIL * 2, THUMBNAIL * 2))  # a JPEG decodes straight to a small size
            upright = ImageOps.exif_transpose(image)
            return data_address(upright.convert("RGBA"))
    except (OSError, ValueError, SyntaxError):
        return ""


def data_address(picture: Image.Image) -> str:
    """A small version of an RGB or RGBA picture, cropped square, as a data address."""
    small = ImageOps.fit(picture.convert("RGBA"), (THUMBNAIL, THUMBNAIL))
    flat = Image.new("RGB", small.size, "white")
    flat.paste(small, mask=small.getchannel("A"))
    packed = io.BytesIO()
    flat.save(packed, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}"


def strip_of(chosen: PictureSet) -> str:
    """What was chosen: thumbnails, a count, and each refused file by name with the reason."""
    pictures = chosen.pictures
    captions = sum(picture.caption is not None for picture in pictures)
    shown = "".join(_thumb(picture.path) for picture in pictures[:MOST_THUMBNAILS])
    more = len(pictures) - MOST_THUMBNAILS
    shown += f'<span class="more">+{more}</span>' if more > 0 else ""
    count = f"{len(pictures)} picture{'' if len(pictures) == 1 else 's'} ready"
    count += f", {captions} with a caption" if captions else ""
    masks = sum(picture.mask is not None for picture in pictures)
    count += f", {masks} with a mask" if masks else ""
    count += f", {len(chosen.left_out)} removed" if chosen.left_out else ""
    bad = "".join(f"<li><b>{escape(one.path.name)}</b> is left out. {escape(one.why)}</li>" for one in chosen.refused)
    return f'<div class="strip">{shown}</div><p class="count" role="status">{count}.</p>' + (
        f'<ul class="refused">{bad}</ul>' if bad else ""
    )


def _thumb(file: Path) -> str:
    return f'<img src="{thumbnail(file)}" alt="{escape(file.name)}" width="56" height="56">'


def captions_of(chosen: PictureSet) -> str:
    """Each picture with its caption to edit and a button to leave it out; those left out can be put back."""
    rows = ""
    for picture in chosen.pictures:
        name = escape(picture.path.name)
        rows += (
            f'<li>{_thumb(picture.path)}<textarea data-name="{name}" rows="2" aria-label="Caption of {name}" '
            f'placeholder="None of its own: the template is taken">{escape(picture.caption or "")}</textarea>'
            f'<button type="button" data-name="{name}" aria-label="Leave {name} out" title="Leave out">×</button></li>'
        )
    for picture in chosen.left_out:
        name = escape(picture.path.name)
        rows += (
            f'<li class="left-out">{_thumb(picture.path)}<span class="quiet">{name} is removed from the dataset.</span>'
            f'<button type="button" data-back="{name}" aria-label="Put {name} back" title="Put back">↩</button></li>'
        )
    return f'<ul class="captions">{rows}</ul>'


def age_of(file: Path) -> int:
    """A number that changes with the file, so that a browser does not show an old picture of the same name."""
    try:
        return os.stat(file).st_mtime_ns // 10**6
    except OSError:
        return 0
