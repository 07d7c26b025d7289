"""Finding and opening pictures. A bad one is refused by name with a sentence; the others are kept."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from PIL import Image, UnidentifiedImageError

from reparam_diffusion.data import rgb
from reparam_diffusion.data.sidecars import MASK_ENDING, find_mask, find_sidecar, is_mask, read_caption
from reparam_diffusion.errors import UserError

MOST_MEGAPIXELS = 120
TURNED = "turned upright from its EXIF data"
ON_WHITE = "see-through parts laid on white"
FIRST_FRAME = "first frame of an animation"
EMPTY_CAPTION = "its caption file is empty"
DUPLICATE = "It is the same picture as"  # how a duplicate's refusal begins

_IGNORED = {".txt", ".caption", ".json", ".toml", ".md", ".csv", ".yaml", ".yml", ".ini", ".db", ".npz", ".safetensors"}
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
    """The mask that lies beside it."""


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


def find_pictures(source: str | Path | Sequence[str | Path], *, least_side: int) -> tuple[list[Picture], list[Refused]]:
    """Every usable picture of a folder (not of its sub-folders) or of a list of files, and what was refused.

    `least_side` is the fewest pixels a shorter side may have. Raises UserError when nothing usable is left.
    """
    files = files_of(source)
    pictures: list[Picture] = []
    refused: list[Refused] = []
    first_with: dict[str, str] = {}
    for file in files:
        try:
            picture = _look_at(file, least_side)
        except UserError as error:
            refused.append(Refused(file, " ".join(part for part in (error.why, error.do) if part)))
            continue
        if picture.hash in first_with:
            refused.append(Refused(file, f"{DUPLICATE} {first_with[picture.hash]}. Remove one of them."))
            continue
        first_with[picture.hash] = file.name
        pictures.append(picture)
    if not pictures:
        reasons = "; ".join(f"{bad.path.name}: {bad.why.rstrip('.')}" for bad in refused)
        raise UserError(
            "None of the pictures can be used.", f"{reasons}.", "Choose other pictures.", place="data.images"
        )
    return pictures, refused


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


def files_of(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files to look at, in natural order for a folder, as given for a list. Masks beside pictures are none."""
    files = _listed(source)
    stems = {file.stem for file in files}
    return [file for file in files if not (is_mask(file) and file.stem.removesuffix(MASK_ENDING) in stems)]


def _listed(source: str | Path | Sequence[str | Path]) -> list[Path]:
    if isinstance(source, str | Path):
        if not str(source).strip():
            raise UserError("No pictures were chosen.", do="Choose a folder or some files.", place="data.images")
        path = Path(source).expanduser()
        return _folder(path) if not path.is_file() else [path]
    files: list[Path] = []
    for entry in (entry for entry in source if str(entry).strip()):
        path = Path(entry).expanduser()
        files += _folder(path) if path.is_dir() else [path]
    if not files:
        raise UserError("No pictures were chosen.", do="Choose a folder or some files.", place="data.images")
    return files


def _folder(folder: Path) -> list[Path]:
    """A folder's files in natural order, without hidden ones, captions and settings."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.", do="Check the path.", place="data.images")
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read.", f"{error.strerror}.", place="data.images") from None
    inner = [entry.name for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if not entry.is_dir() and entry.suffix.lower() not in _IGNORED]
    if not files:
        why = f"It has only sub-folders: {', '.join(sorted(inner, key=_natural))}." if inner else "It is empty."
        if len(entries) > len(inner):
            why = "It has files, but no picture among them."
        do = "Choose one of the sub-folders, or put pictures into this one." if inner else "Put pictures into it."
        raise UserError(f"The folder {folder} holds no pictures.", why, do, place="data.images")
    return sorted(files, key=lambda file: _natural(file.name))


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key by which picture2 comes before picture10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name


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
    picture = Picture(file, width, height, opened.hash, None, opened.notes, find_mask(file))
    sidecar = find_sidecar(file)
    if sidecar is None:
        return picture
    try:
        caption = read_caption(sidecar)
    except OSError as error:
        return replace(picture, notes=(*picture.notes, f"its caption {sidecar.name} cannot be read: {error.strerror}"))
    if not caption:
        return replace(picture, notes=(*picture.notes, EMPTY_CAPTION))
    return replace(picture, caption=caption)


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
