"""Adapter files on a loaded model: applied live with an adjustable strength, or merged for the time of a drawing."""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.data.images import open_picture
from reparam_diffusion.errors import Note, UserError
from reparam_diffusion.formats.read import AdapterFile, read_adapter
from reparam_diffusion.inject import Injection, Merge, attach, merged
from reparam_diffusion.models.habits import DENOISE
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.sample import OnLook, OnStep, draw
from reparam_diffusion.models.weighted import notes_on
from reparam_diffusion.models.words import Word, add_words, set_words, spoken, take_words

if TYPE_CHECKING:
    from PIL.Image import Image

AdapterChoice = tuple[str | Path, float] | tuple[str | Path, float, float | None] | str | Path
"""A file or PEFT folder; with a strength; with a strength for the UNet and another for the text encoders."""


class Applied:
    """An adapter on a model. A context manager: leaving it takes the adapter off."""

    def __init__(self, model: Model, injection: Injection, bound: Bound) -> None:
        self._model, self._injection = model, injection
        self._words = bound.words
        self.unmatched = bound.unmatched
        """(key, why) of what the file holds and this model cannot take."""

    @property
    def sites(self) -> list[str]:
        """The layers that are changed."""
        return list(self._injection.adapters)

    @property
    def words(self) -> list[str]:
        """The learned words that prompts may use now."""
        return [word.text for word in self._words]

    def set_strength(self, strength: float, te_strength: float | None = None, *, match: str = "*") -> None:
        """Change the strength now; `te_strength` None is the same for the text encoders. `match` limits the sites."""
        if match != "*":
            self._injection.set_strength(strength, match=match)
            return
        self._injection.set_strength(strength, match="unet.*")
        self._injection.set_strength(strength if te_strength is None else te_strength, match="te[12].*")

    def remove(self) -> None:
        """Take the adapter off; the model is as it was."""
        self._injection.remove()
        take_words(self._model, self._words)
        self._words = []

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply_adapter(
    model: Model, file_or_folder: str | Path, *, strength: float = 1.0, te_strength: float | None = None
) -> Applied:
    """Put an adapter on a model. Nothing of the base is changed: the model computes W + strength · ΔW.

    Raises UserError when the file cannot be read or nothing in it fits the model.
    """
    bound = bind(model, file_or_folder)
    with ExitStack() as undo:  # after an error, a Ctrl-C too, the model is as it was
        add_words(model, bound.words)
        undo.callback(take_words, model, bound.words)
        injection = attach(model.parts, bound.adapters)
        undo.callback(injection.remove)
        applied = Applied(model, injection, bound)
        applied.set_strength(strength, te_strength)
        undo.pop_all()
    return applied


@dataclass(frozen=True)
class Bound:
    """What a file is on a model: adapters by the model's own layers, learned words, and what does not fit with why."""

    adapters: dict[str, Adapter]
    words: list[Word]
    unmatched: list[tuple[str, str]]
    zero_terminal_snr: bool
    """Whether it was trained on this model with a schedule that ends in pure noise, and so is drawn with."""


def bind(model: Model, file_or_folder: str | Path) -> Bound:
    """Read a file for a model. Raises UserError when nothing in it fits."""
    file = read_adapter(file_or_folder)
    adapters, unmatched = file.match(model.parts)
    words, others = file.words_for(model.parts)
    if not adapters:
        raise UserError(
            f"{Path(file_or_folder).name} does not fit this base model.",
            file.misfit(unmatched, model.family),
            "Use it with the base model it was made for.",
        )
    return Bound(adapters, words, unmatched + others, _ends_in_noise(file, model))


def are_from_noise(model: Model, files: Iterable[str | Path]) -> bool:
    """Whether one of the adapters wants to be drawn from pure noise on this model: zero terminal SNR."""
    return any(_ends_in_noise(read_adapter(file), model) for file in files)


def _ends_in_noise(file: AdapterFile, model: Model) -> bool:
    return file.metadata.get("ss_zero_terminal_snr") == "True" and model.prediction_type == "v_prediction"


def generate(
    model: Model,
    prompt: str,
    *,
    adapters: Sequence[AdapterChoice] = (),
    negative: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    count: int = 1,
    clip_skip: int = 0,
    scheduler: str = "",
    image: str | Path | Image | None = None,
    mask: str | Path | Image | None = None,
    denoise: float = DENOISE,
    on_step: OnStep | None = None,
    on_look: OnLook | None = None,
) -> list[Image]:
    """`count` pictures from seeds seed, seed + 1, …, with the adapters merged in for the time of the drawing.

    Steps, guidance, negative prompt and scheduler default to the model's own. `image` is a picture (or its file) to
    begin from, `denoise` how much of it may change (0 to 1), `mask` white where; see `draw`. `on_step(done, total)` may
    return True to cancel; `on_look` is given early looks. Warns of an adapter's keys that do not fit the model.
    """
    if not prompt.strip():
        raise UserError("The prompt is empty.", do="Say what to draw.")
    if count < 1:
        raise UserError("The number of pictures must be at least 1.")
    seed = secrets.randbelow(2**32) if seed == -1 else seed
    weighted, words, to_noise = [], [], False
    for choice in adapters:
        path, strength = _strengths(choice)
        bound = bind(model, path)
        if bound.unmatched:
            warnings.warn(_left_out(path, bound.unmatched), Note, stacklevel=2)
        weighted.append((bound.adapters, strength))
        words += _spoken_at(bound, strength)
        to_noise |= bound.zero_terminal_snr
    for note in notes_on(model, prompt, negative):
        warnings.warn(note, Note, stacklevel=2)
    with spoken(model, words), merged(model.parts, weighted):
        return draw(
            model,
            prompt,
            negative=negative,
            seeds=range(seed, seed + count),
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            clip_skip=clip_skip,
            scheduler=scheduler,
            image=_picture(image),
            mask=_picture(mask),
            denoise=denoise,
            zero_terminal_snr=to_noise,
            on_step=on_step,
            on_look=on_look,
        )


def _picture(picture: str | Path | Image | None) -> Image | None:
    """A picture as it is, or from its file."""
    return open_picture(picture) if isinstance(picture, str | Path) else picture


class Easel:
    """A model whose merged adapters change from picture to picture, each change at the cost of what differs.

    Files are read once, as long as they stay what they were. `put` says exactly what is on; nothing else ever is.
    """

    def __init__(self, model: Model, *, keep: int = 24) -> None:
        self.model = model
        self._merge = Merge(model.parts)
        self._keep = keep
        self._read: dict[Path, tuple[object, Bound]] = {}
        self.zero_terminal_snr = False
        """Whether one that is put on wants to be drawn from pure noise."""

    def put(self, choices: Sequence[AdapterChoice]) -> list[str]:
        """Have exactly these adapters merged and their words known; says of each file what does not fit."""
        weighted, words, notes = [], [], []
        self.zero_terminal_snr = False
        for choice in choices:
            path, strength = _strengths(choice)
            bound = self._file(Path(path))
            if bound.unmatched:
                notes.append(_left_out(path, bound.unmatched))
            weighted.append((bound.adapters, strength))
            words += _spoken_at(bound, strength)
            self.zero_terminal_snr |= bound.zero_terminal_snr
        set_words(self.model, words)
        self._merge.settle(weighted)
        return notes

    def clear(self) -> None:
        """The model as it was, bit for bit."""
        set_words(self.model, [])
        self._merge.restore()

    def _file(self, path: Path) -> Bound:
        """What is in a file, from before when the file has not changed since."""
        sign = _sign(path)
        known = self._read.pop(path, None)
        if known is None or known[0] != sign:
            known = (sign, bind(self.model, path))
        self._read[path] = known  # the newest last
        while len(self._read) > self._keep:
            del self._read[next(iter(self._read))]
        return known[1]


def _sign(path: Path) -> object:
    """What tells a file (or a PEFT folder) from its next version: sizes and times."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _strengths(choice: AdapterChoice) -> tuple[str | Path, Callable[[str], float]]:
    """The file of a choice, and its strength at each site."""
    if isinstance(choice, str | Path):
        choice = (choice, 1.0)
    path, strength = choice[0], choice[1]
    text = choice[2] if len(choice) == 3 and choice[2] is not None else strength
    if not (math.isfinite(strength) and math.isfinite(text)):
        raise UserError(f"The strength of {Path(path).name} is no number.", do="Use a number such as 0.8.")
    return path, lambda site: strength if site.startswith("unet.") else text


def _spoken_at(bound: Bound, strength: Callable[[str], float]) -> list[Word]:
    """The words of an adapter; they have no strength, but one that is off everywhere brings none."""
    return bound.words if any(strength(part) for part in ("unet.", "te1.")) else []


def _left_out(path: str | Path, unmatched: list[tuple[str, str]]) -> str:
    key, why = unmatched[0]
    return f"{len(unmatched)} keys of {Path(path).name} do not fit this model and are left out, such as {key}: {why}."
