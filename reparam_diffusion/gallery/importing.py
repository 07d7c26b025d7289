"""Files from elsewhere onto the shelf, byte for byte, with what other programs keep beside them.

Each is opened by the reader that will use it before it is taken, so that nothing lies on the shelf that it refuses.
"""

from __future__ import annotations

import html
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from reparam_diffusion.data.images import open_picture
from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import notes, shelf
from reparam_diffusion.gallery.of_run import HASH, RUN
from reparam_diffusion.gallery.report import Report, report_of

MOST_FILES = 200
MOST_BYTES = 4 * 1024**3
LARGEST_SIDE = 1024**2
"""Bytes of a sidecar that are still read."""
PICTURE_SIDE = 768  # pixels
_SIDE = re.compile(r"((\.preview)?\.(png|webp|jpe?g|gif)|\.civitai\.info|\.json|\.txt|\.md)$", re.IGNORECASE)


@dataclass(frozen=True)
class Imported:
    """What became of one dropped file: its place on the shelf and its report, or why it was left out."""

    name: str
    file: Path | None = None
    report: Report | None = None
    why: str = ""
    is_new: bool = True


def import_files(files: Sequence[Path], workspace: Path) -> list[Imported]:
    """Take adapters in, with their .json, .civitai.info and pictures where these came along; refuse the rest by name.

    PEFT's adapter_model.safetensors and adapter_config.json belong together; folders and .zip files are looked into.
    Raises UserError when it is too much at once.
    """
    if not files:
        raise UserError("There is nothing to import.", do="Choose .safetensors files.")
    _check_amount(len(files), sum(file.stat().st_size for file in files))
    told: list[Imported] = []
    with ExitStack() as unpacked:
        loose: list[Path] = []
        for file in files:
            if file.suffix.lower() != ".zip" and not file.is_dir():
                loose.append(file)
                continue
            try:
                folder = file if file.is_dir() else unpacked.enter_context(_unzipped(file))
            except UserError as error:
                told.append(Imported(file.name, why=_told(error)))
                continue
            told += _import_tree(folder, file, workspace) or [Imported(file.name, why="There is no adapter in it.")]
        pair = [file for file in loose if file.name in (shelf.PEFT_WEIGHTS, shelf.PEFT_CONFIG)]
        if {file.name for file in pair} == {shelf.PEFT_WEIGHTS, shelf.PEFT_CONFIG} and len(pair) == 2:
            loose = [file for file in loose if file not in pair]
            told.append(_import_pair(pair, workspace))
        told += _import_loose(loose, workspace)
    return told


def _check_amount(count: int, size: int) -> None:
    if count > MOST_FILES:
        raise UserError(f"These are {count} files.", f"At most {MOST_FILES} go at once.", "Take them in portions.")
    if size > MOST_BYTES:
        raise UserError("These files are more than 4 GB together.", do="Take them in portions.")


def _told(error: UserError) -> str:
    return " ".join(part for part in (error.why or error.what, error.do) if part)


# --- containers ------------------------------------------------------------------------------------------------------
@contextmanager
def _unzipped(archive: Path) -> Iterator[Path]:
    """A folder with an archive's files, for the body only. Raises UserError where it is broken or too much."""
    with tempfile.TemporaryDirectory(prefix="reparam-import-") as folder:
        try:
            with zipfile.ZipFile(archive) as opened:
                inside = [info for info in opened.infolist() if not info.is_dir()]
                _check_amount(len(inside), sum(info.file_size for info in inside))
                for info in inside:
                    opened.extract(info, folder)  # leaves out "..", drives and leading slashes
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise UserError(f"{archive.name} cannot be opened.", f"It is no usable .zip file ({error}).") from None
        yield Path(folder)


def _import_tree(folder: Path, archive: Path, workspace: Path) -> list[Imported]:
    """What is in a folder or an archive: PEFT folders, and single files."""
    insides = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
    peft: list[Path] = []
    for inside in insides:
        if shelf.is_peft(inside) and not any(outer in inside.parents for outer in peft):
            peft.append(inside)
    told = [_take(one, archive.stem if one == folder else one.name, {}, workspace) for one in peft]
    loose = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(one in file.parents for one in peft) and not _is_litter(file, folder)
    ]
    return told + _import_loose(loose, workspace)


def _is_litter(file: Path, folder: Path) -> bool:
    """What archivers of one system leave in archives: hidden files and __MACOSX."""
    return any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)


def _import_pair(pair: Sequence[Path], workspace: Path) -> Imported:
    """PEFT's two files, dropped side by side, as the folder that they were."""
    with tempfile.TemporaryDirectory(prefix="reparam-import-") as place:
        for file in pair:
            shutil.copyfile(file, Path(place) / file.name)
        return _take(Path(place), _base_name(Path(place) / shelf.PEFT_CONFIG), {}, workspace)


def _base_name(config: Path) -> str:
    """What a PEFT configuration says of its origin, for want of a name."""
    base = notes.read_notes(config).get("base_model_name_or_path")
    return f"peft {PurePosixPath(base).name}" if isinstance(base, str) and base else "peft adapter"


# --- single files ----------------------------------------------------------------------------------------------------
def _import_loose(files: Sequence[Path], workspace: Path) -> list[Imported]:
    """Adapters, each with the sidecars that bear its name."""
    adapters: dict[str, Path] = {}
    sides: dict[str, dict[str, Path]] = {}
    doubles = []
    for file in files:
        stem, ending = _parted(file.name)
        if ending:
            sides.setdefault(stem.lower(), {})[ending.lower()] = file
        elif stem.lower() in adapters:
            doubles.append(file)
        else:
            adapters[stem.lower()] = file
    taken = [_take(file, _parted(file.name)[0], sides.pop(stem, {}), workspace) for stem, file in adapters.items()]
    taken += [_take(file, _parted(file.name)[0], {}, workspace) for file in doubles]
    alone = [file for group in sides.values() for file in group.values()]
    return taken + [Imported(file.name, why="It is no adapter, and none of its name came with it.") for file in alone]


def _parted(name: str) -> tuple[str, str]:
    """(name, ending) of a sidecar; of anything else the name without its last ending, and ""."""
    found = _SIDE.search(name)
    return (name[: found.start()], found[0]) if found else (name.rpartition(".")[0] or name, "")


def _take(file: Path, name: str, sides: dict[str, Path], workspace: Path) -> Imported:
    """Put one adapter on the shelf, if it is one."""
    shown = name if file.is_dir() else file.name
    try:
        report = report_of(file)
        facts = _facts_of(report) | _from_civitai(sides.get(".civitai.info")) | _from_sidecar(sides.get(".json"))
        facts = notes.fitting({"name": name} | facts)
        before = shelf.names_in(shelf.shelf_of(workspace))
        with _as_png(sides) as picture:
            added = shelf.add(file, workspace, name=name, thumbnail=picture, facts=facts)
    except UserError as error:
        return Imported(shown, why=_told(error))
    except OSError as error:
        return Imported(shown, why=f"It could not be copied: {error.strerror or error}.")
    return Imported(shown, added, report | {"file": shown}, is_new=added.name not in before)


def _facts_of(report: Report) -> notes.Notes:
    """What the file itself says."""
    return {
        "activation text": report["trigger"],
        "sd version": notes.SD_VERSIONS.get(report["base"], "Unknown"),
        "description": report["metadata"].get("modelspec.description", ""),
    }


def _read(file: Path | None) -> notes.Notes:
    return notes.read_notes(file) if file is not None and file.stat().st_size <= LARGEST_SIDE else {}


def _from_sidecar(file: Path | None) -> notes.Notes:
    """A1111's notes, but for what only we may say."""
    return {key: value for key, value in _read(file).items() if key not in (RUN, HASH) and value not in ("", [], 0)}


def _from_civitai(file: Path | None) -> notes.Notes:
    """The notes out of a .civitai.info, as Civitai Helper writes it."""
    found = _read(file)
    model = found.get("model")
    model = model if isinstance(model, dict) else {}
    about = notes.as_text(found.get("description")) or notes.as_text(model.get("description"))
    facts: notes.Notes = {
        "name": model.get("name"),
        "activation text": found.get("trainedWords"),
        "description": _without_markup(about),
        "tags": model.get("tags"),
    }
    return {key: value for key, value in facts.items() if value}


def _without_markup(text: str) -> str:
    """The words of a description in HTML."""
    return html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"(?i)<br\s*/?>|</p>", "\n", text))).strip()


@contextmanager
def _as_png(sides: dict[str, Path]) -> Iterator[Path | None]:
    """The picture that came along, as a PNG of a moderate size; None where there is none, or no usable one."""
    pictures = [sides[ending] for ending in shelf.PICTURES if ending in sides]
    with tempfile.TemporaryDirectory(prefix="reparam-import-") as folder:
        picture = Path(folder) / "picture.png"
        for file in pictures:
            with suppress(UserError):  # a broken picture must not keep its adapter out
                image = open_picture(file)
                image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
                image.save(picture)
                break
        yield picture if picture.is_file() else None
