"""Reads the text that programs put into PNG, JPEG and WebP images, and the settings in it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.comfyui import read_comfyui
from reparam_diffusion.gallery.infotext import read_infotext
from reparam_diffusion.gallery.json_metadata import read_json
from reparam_diffusion.gallery.recipe import Recipe
from reparam_diffusion.gallery.restore import Restored

TEXT, EXACT = "parameters", "reparam"
"""PNG text chunks: A1111's, which other programs read too, and ours, which loses nothing."""
_JSON = {"invokeai_metadata": "InvokeAI", "sd-metadata": "InvokeAI", "fooocus_scheme": "Fooocus"}
_EXIF, _COMMENT, _MAKE, _MODEL = 0x8769, 0x9286, 0x010F, 0x0110
_MOST = 2_000_000  # characters of a text that is looked into


def read_metadata(file: Path) -> Restored:
    """What an image was made from, by us or by another program. Raises UserError when it does not say."""
    chunks = read_chunks(file)
    try:
        return Restored(Recipe.model_validate_json(chunks[EXACT]))
    except (KeyError, ValidationError):  # another program's, or of another version: its plain text tells the same
        pass
    if chunks.get(TEXT, "").lstrip().startswith("{"):
        return read_json(chunks[TEXT], "SwarmUI" if "sui_image_params" in chunks[TEXT] else "another program")
    if TEXT in chunks:
        return read_infotext(chunks[TEXT])
    for key, program in _JSON.items():
        if key in chunks:
            return read_json(chunks[key], program)
    if "prompt" in chunks and chunks["prompt"].lstrip().startswith("{"):
        return read_comfyui(chunks["prompt"], is_workflow=False)
    if "workflow" in chunks:
        return read_comfyui(chunks["workflow"], is_workflow=True)
    if chunks.get("Comment", "").lstrip().startswith("{"):
        return read_json(chunks["Comment"], "NovelAI")
    if "seed" in chunks and "prompt" in chunks:
        return read_json(chunks, "Easy Diffusion")
    raise UserError(
        "There are no settings in this image.",
        "It may have been edited, or sent through a chat that removes them.",
        "Use the original file.",
    )


def read_chunks(file: Path) -> dict[str, str]:
    """The texts in an image by their names. Raises UserError for what is not an image or cannot be read."""
    try:
        with Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as image:
            image.load()  # text may stand behind the pixels
            chunks = {str(key): value[:_MOST] for key, value in image.info.items() if isinstance(value, str)}
            exif = image.getexif()
            comment = exif.get_ifd(_EXIF).get(_COMMENT) if exif else None
            for value in (exif.get(_MAKE), exif.get(_MODEL)):
                key, colon, text = str(value or "").partition(":")
                if colon and key.lower() in ("prompt", "workflow"):  # ComfyUI's WebP
                    chunks.setdefault(key.lower(), text[:_MOST])
    except UnidentifiedImageError:
        raise UserError("This is not a PNG, JPEG or WebP image.", do="Only these carry settings.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError("This image cannot be read.", f"{error}.", "Use another one.") from None
    if isinstance(comment, bytes | str) and TEXT not in chunks:
        text = _decode_comment(comment)
        if text:
            chunks[TEXT] = text[:_MOST]
    return chunks


def _decode_comment(comment: bytes | str) -> str:
    """EXIF's UserComment: eight bytes that name the encoding, then the text."""
    if isinstance(comment, str):
        return comment.strip("\x00 ")
    kind, body = comment[:8], comment[8:]
    if kind == b"UNICODE\x00":
        little = body[1:2] == b"\x00" and body[:1] != b"\x00"  # no byte order is given
        return body.decode("utf-16-le" if little else "utf-16-be", errors="replace").strip("\x00 ")
    if kind in (b"ASCII\x00\x00\x00", bytes(8)):
        return body.decode("utf-8", errors="replace").strip("\x00 ")
    return comment.decode("utf-8", errors="replace").strip("\x00 ")
