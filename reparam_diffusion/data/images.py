"""Finding and opening pictures. A bad one is refused by name with a sentence; the others are kept."""

from __future__ import annotations

import hashlib
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

from PIL import Image, UnidentifiedImageError

from reparam_diffusion.data import rgb
from reparam_diffusion.data.sidecars import Sidecars, match_sidecars
from reparam_diffusion.data.source_files import Files, files_of, sort_source
from reparam_diffusion.data.text_files import Text, make_one_line, read_texts
from reparam_diffusion.errors import UserError

MOST_MEGAPIXELS = 120
TURNED = "turned upright from its EXIF data"
ON_WHITE = "see-through parts laid on white"
FIRST_FRAME = "first frame of an animation"
EMPTY_CAPTION = "its caption file is empty"
DUPLICATE = "It is the same picture as"  # how a duplicate's refusal begins

# No EPS (it runs Ghostscript) and no format that is known by its ending alone.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "PSD", "QOI")
# What Pillow and pillow-heif raise for broken files; each was seen in their decoders.
_BROKEN: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
_ONE_AT_A_TIME = threading.Lock()  # warning filters belong to the process; and decoded pictures are large


@dataclass(frozen=True)
class Picture:
    """A picture that can be used: sides in pixels when upright, `hash` the file's SHA-256."""

    path: Path
    width: int
    height: int
    hash: str
    caption: str | None = None
    notes: tuple[str, ...] = ()
    mask: Path | None = None
    """Its mask file."""
    encoding: str = ""
    """The encoding in which its caption file was read, where that was detected; empty for UTF-8."""
    given_name: str = ""
    """The file name that the user gave it, where a copy has another one."""


@dataclass(frozen=True)
class Refused:
    """A file that cannot be used, and why, with what to do."""

    path: Path
    why: str


@dataclass(frozen=True)
class Opened:
    """A picture upright as 8-bit RGB, see-through parts on white; `alpha` (mode L) where there are any.

    `turn` is what made it upright, None when it was so.
    """

    image: Image.Image
    alpha: Image.Image | None
    turn: Image.Transpose | None
    hash: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """What was read of files: `others` are captions and masks by position among the images known `earlier`."""

    pictures: list[Picture]
    refused: list[Refused]
    others: dict[int, Picture]
    unmatched: list[Path]


def find_pictures(
    source: str | Path | Sequence[str | Path], *, least_side: int, look_beside: bool = True
) -> tuple[list[Picture], list[Refused]]:
    """Every usable image of a folder (not of its sub-folders) or of a list of files, and what is not used, with why.

    `least_side` is the fewest pixels a shorter side may have. Captions and masks are looked for in the same folder, for
    a list only with `look_beside`. Raises UserError when nothing usable is left.
    """
    reading = read_images(sort_source(source, look_beside=look_beside), least_side=least_side)
    if not reading.pictures:
        reasons = "; ".join(f"{bad.path.name}: {bad.why.rstrip('.')}" for bad in reading.refused)
        raise UserError(
            "None of the pictures can be used.", f"{reasons}.", "Choose other pictures.", place="data.images"
        )
    return reading.pictures, reading.refused


def read_images(files: Files, *, least_side: int, earlier: Sequence[Picture] = ()) -> Reading:
    """Open images and match captions and masks with them, and with `earlier` images where none of these fits."""
    names = [picture.path.with_name(picture.given_name or picture.path.name) for picture in earlier]
    matched = match_sidecars(files.images, [*files.sidecars, *files.beside], earlier=names)
    texts = read_texts([file for file in matched.captions if file])
    pictures: list[Picture] = []
    refused: list[Refused] = []
    first_with: dict[str, str] = {}
    for at, file in enumerate(files.images):
        try:
            picture = _look_at(file, least_side)
        except UserError as error:
            refused.append(Refused(file, " ".join(part for part in (error.why, error.do) if part)))
            continue
        if picture.hash in first_with:
            caption = matched.captions[at]
            lost = f" Its caption {caption.name} is not used." if caption and caption not in matched.shared else ""
            refused.append(Refused(file, f"{DUPLICATE} {first_with[picture.hash]}. Remove one of them.{lost}"))
            continue
        first_with[picture.hash] = file.name
        pictures.append(_add_sidecars(picture, matched, at, texts))
    start = len(files.images)
    others = {
        at: _add_sidecars(replace(picture, caption=None, mask=None), matched, start + at, texts)
        for at, picture in enumerate(earlier)
        if matched.captions[start + at] or matched.masks[start + at]
    }
    beside = set(files.beside)
    unmatched = [(file, why) for file, why in matched.unused if file not in beside]
    refused += [Refused(file, why) for file, why in (*unmatched, *files.unused)]
    return Reading(pictures, refused, others, [file for file, _ in unmatched])


def _add_sidecars(picture: Picture, matched: Sidecars, at: int, texts: dict[Path, Text]) -> Picture:
    """The image with its caption and mask, and with notes about a caption that needs a look."""
    file, mask = matched.captions[at], matched.masks[at]
    picture = replace(picture, mask=mask)
    notes = [f"{shared.name} serves all images of its name" for shared in matched.shared if shared in (file, mask)]
    if file is None:
        return replace(picture, notes=(*picture.notes, *notes))
    text = texts[file]
    caption = make_one_line(text.text)
    if text.problem:
        notes.append(f"its caption {file.name} is not used: {text.problem}")
    elif not caption:
        notes.append(EMPTY_CAPTION)
    return replace(picture, caption=caption or None, encoding=text.encoding, notes=(*picture.notes, *notes))


def sides_of(source: str | Path | Sequence[str | Path]) -> list[tuple[int, int]]:
    """Width and height of a source's images, upright, by their headers alone; what cannot be read is left out."""
    return [side for file in files_of(source) if (side := _side_of(file, file.stat().st_mtime_ns)) is not None]


@lru_cache(maxsize=4096)
def _side_of(file: Path, age: int) -> tuple[int, int] | None:
    try:
        with Image.open(file) as image:
            is_turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if is_turned else (image.width, image.height)
    except _BROKEN:
        return None


def open_picture(path: str | Path) -> Image.Image:
    """The picture upright, as 8-bit RGB, see-through parts on white. Raises UserError when it cannot be read."""
    return open_file(Path(path)).image


def open_again(picture: Picture) -> Image.Image:
    """The picture found before. Raises UserError when its file has changed since."""
    return unchanged(open_file(picture.path), picture.path, picture.hash).image


def unchanged(opened: Opened, path: Path, known: str) -> Opened:
    """What was opened, when its hash is the known one. Raises UserError when the file has changed since."""
    if opened.hash != known:
        raise UserError(
            f"{path.name} has changed.",
            "Its file is not the one this run began with.",
            "Put the old file back, or start a new run.",
        )
    return opened


def _look_at(file: Path, least_side: int) -> Picture:
    """What there is to know about one picture; decodes it whole, so that what is found here also opens later."""
    opened = open_file(file)
    width, height = opened.image.size
    if min(width, height) < least_side:
        raise UserError(
            f"{file.name} is too small.",
            f"It is {width} × {height} pixels, and the shorter side needs at least {least_side}.",
            "Use a larger picture.",
        )
    return Picture(file, width, height, opened.hash, None, opened.notes)


def open_file(file: Path) -> Opened:
    """Open, turn and convert. Every way a file can be bad becomes a UserError."""
    if not file.is_file():  # also keeps pipes and devices from being read
        why = "It is not there." if not file.exists() else "It is not a file."
        raise _refusal(file, why, "Check the path.")
    try:
        raw = file.open("rb")
    except OSError as error:
        raise _refusal(file, f"It cannot be read: {error.strerror}.", "Check its permissions.") from None
    with raw, _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd EXIF data and sizes, which are judged here
        head = raw.read(1024)
        if not head:
            raise _refusal(file, "It is empty (0 bytes).", "Copy it anew.")
        try:
            return _decode(file, raw)
        except Image.DecompressionBombError:
            raise _too_large(file, "") from None
        except UnidentifiedImageError:
            raise _unknown(file, head) from None
        except _BROKEN:
            raise _refusal(file, "It is damaged or cut short.", "Copy it anew or save it again.") from None


def _decode(file: Path, raw: io.BufferedReader) -> Opened:
    formats = list(_FORMATS)
    if _register_heif():
        formats.append("HEIF")
    with Image.open(raw, formats=formats) as image:
        width, height = image.size
        if width * height > MOST_MEGAPIXELS * 10**6:
            raise _too_large(file, f"{width} × {height} pixels, ")
        notes = []
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a phone's JPEG with extras
            notes.append(FIRST_FRAME if image.format in ("GIF", "WEBP", "PNG", "AVIF") else "first page of several")
        image.load()
        turn = rgb.turn_of(image)
        flat, alpha = rgb.to_rgb(image if turn is None else image.transpose(turn))
    if turn is not None:
        notes.append(TURNED)
    if alpha is not None:
        notes.append(ON_WHITE)
    raw.seek(0)
    return Opened(flat, alpha, turn, hashlib.file_digest(raw, "sha256").hexdigest(), tuple(notes))


def _register_heif() -> bool:
    """Teach Pillow to open HEIC, when pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _unknown(file: Path, head: bytes) -> UserError:
    """Why nothing could open a file, as well as its first bytes tell."""
    if b"<svg" in head.lower():
        return _refusal(file, "It is an SVG drawing, which has no pixels.", "Save it as PNG.")
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"):
        if not _register_heif():
            return _refusal(
                file,
                "It is a HEIC picture, which needs pillow-heif.",
                "Install it (pip install pillow-heif) or save it as JPEG.",
            )
        return _refusal(file, "It is a HEIC picture, and it is damaged or cut short.", "Copy it anew.")
    if brand in (b"avif", b"avis"):
        return _refusal(file, "It is an AVIF picture that cannot be read here.", "Save it as PNG or JPEG.")
    if brand or head[4:8] in (b"moov", b"mdat") or head.startswith(b"\x1aE\xdf\xa3"):
        return _refusal(file, "It is a video.", "Save single frames of it as PNG.")
    if head.startswith(b"%PDF"):
        return _refusal(file, "It is a PDF document.", "Save its pictures as PNG.")
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM")) or head[8:12] == b"WEBP":
        return _refusal(file, "It is damaged or cut short.", "Copy it anew or save it again.")
    return _refusal(file, "It is not a picture that can be read.", "Use PNG, JPEG, WebP or HEIC.")


def _too_large(file: Path, size: str) -> UserError:
    return _refusal(file, f"It is too large: {size}more than {MOST_MEGAPIXELS} megapixels.", "Make it smaller first.")


def _refusal(file: Path, why: str, do: str) -> UserError:
    return UserError(f"{file.name} cannot be used.", why, do, place="data.images")
