"""The studio's process: draws what a workspace's requests ask for, one picture of each in turn, and ends when idle.

It keeps the model, the adapters' files and their merge from picture to picture. It holds the device only while it
draws, and after each picture lets a waiting run have it.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reparam_diffusion import events as e
from reparam_diffusion.errors import UserError
from reparam_diffusion.files import beside
from reparam_diffusion.gallery import images
from reparam_diffusion.gallery.recipe import Recipe, filled
from reparam_diffusion.jobs import locks, runs, studio, worker
from reparam_diffusion.jobs.overview import Overview
from reparam_diffusion.models.room import is_out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

    from reparam_diffusion.apply import Easel

IDLE = 600.0  # seconds without a request after which the process ends
LOOK_AGAIN = 0.1  # seconds between two looks for requests
GIVE_WAY = 1.5  # seconds in which a waiting run can take the device


@dataclass(frozen=True)
class Base:
    """A base model as a request asks for it: its name or path, what it is to use otherwise, and where."""

    model: str = ""
    vae: str = ""
    prediction_type: str = "auto"
    device: str = "auto"


def base_of(recipe: Recipe, device: str) -> Base:
    """The base model of a recipe."""
    return Base(recipe.model, recipe.vae, recipe.prediction_type, device)


class Studio:
    """What stays warm: one base model on an easel. `stop` says whether the process was asked to end."""

    def __init__(self, workspace: Path, stop: Callable[[], str] = lambda: "") -> None:
        self.workspace = workspace
        self.stop = stop
        self.overview = Overview(workspace)
        self._easel: Easel | None = None
        self._base = Base()

    def has(self, base: Base) -> bool:
        """Whether this base model is loaded."""
        return self._easel is not None and self._base == base

    def easel(self, base: Base) -> Easel:
        """The easel with this base model; another one takes the place of the one before."""
        if self._easel is None or not self.has(base):
            self.forget()
            from reparam_diffusion.apply import Easel
            from reparam_diffusion.models.drawing import drawing_dtype
            from reparam_diffusion.models.load import load_model
            from reparam_diffusion.models.precision import pick_device

            path, device = _model_path(base.model, self.workspace), pick_device(base.device)
            model = load_model(
                path,
                device=device,
                dtype=drawing_dtype(path, "auto", device),
                vae=_model_path(base.vae, self.workspace) if base.vae else "",
                prediction_type=base.prediction_type,
            )
            self._easel, self._base = Easel(model), base
        return self._easel

    def forget(self) -> None:
        """Let go of the model and its memory."""
        if self._easel is not None:
            import torch

            self._easel = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def make_room(self) -> None:
        """Leave an accelerator's memory to whoever holds it now."""
        if self._easel is None or self._easel.model.device.type == "cpu":
            return
        if locks.is_held(locks.device_lock(locks.device_name(str(self._easel.model.device)))):
            self.forget()


def _model_path(model: str, workspace: Path) -> str:
    """A model of the workspace by its name, else what load_model takes."""
    for place in (workspace / "models" / model, workspace / "models" / f"{model}.safetensors"):
        if place.exists():
            return str(place)
    return model


# --- one request -----------------------------------------------------------------------------------------------------
def draw_request(folder: Path, kept: Studio) -> Iterator[bool]:
    """Draw a request, a picture (or a few side by side) each time; says each time whether it got on.

    Whatever goes wrong is written into the request as its last event.
    """
    with runs.EventLog(folder) as log:
        begun = time.time()
        try:
            yield from _drawn(folder, kept, log)
            if studio.is_asked(folder, "cancel"):
                log.append(e.Cancelled())
            elif kept.stop():
                log.append(e.Failed("The studio was ended.", do="Draw again to start it anew."))
            else:
                log.append(e.Finished(0, "", time.time() - begun))
        except UserError as error:
            log.append(e.Failed(error.what, error.why, error.do))
        except Exception as error:  # The worker's door, for a request: the studio goes on with the next one.
            log.append(_explained(error, kept))
        finally:
            (folder / "todo").unlink(missing_ok=True)


def _explained(error: Exception, kept: Studio) -> e.Failed:
    """What happened, for a person. What was warm is given up: after such an error nothing of it is trusted."""
    traceback.print_exception(error)
    kept.forget()
    if is_out_of_memory(error):
        return e.Failed(
            "The memory is not enough for this picture.",
            "Drawing it needs more than this device has free.",
            "Choose a smaller size, or wait until no training runs.",
        )
    log = studio.log_file(kept.workspace)
    return e.Failed(
        "The drawing broke off through a mistake of ours.",
        f"{type(error).__name__}: {error}".splitlines()[0][:300],
        f"The full report is at the end of {log}; please send it to us.",
    )


def _drawn(folder: Path, kept: Studio, log: runs.EventLog) -> Iterator[bool]:
    request = studio.read_request(folder)
    drawn: list[tuple[Image, Recipe]] = []
    lock = locks.device_lock(locks.device_name(request.device))

    def is_over() -> bool:
        return studio.is_asked(folder, "cancel") or bool(kept.stop())

    while len(drawn) < len(request.recipes) and not is_over():
        with ExitStack() as held:
            if studio.is_asked(folder, "ahead") or held.enter_context(
                locks.try_hold(lock, patience=0.1, holder=locks.Holder("image generation", str(kept.workspace)))
            ):
                drawn += _next_pictures(folder, kept, log, request, first=len(drawn), is_over=is_over)
                got_on = True
            else:
                log.append(e.Prepared(studio.WAITING, 0, 0, locks.describe_holder(lock, kept.workspace)))
                got_on = False
        yield got_on
        while not got_on and locks.is_held(lock) and not (studio.is_asked(folder, "ahead") or is_over()):
            yield False
    if request.rows and len(drawn) == len(request.recipes):
        _save_sheet(kept.workspace, log, request, drawn)


def _next_pictures(
    folder: Path,
    kept: Studio,
    log: runs.EventLog,
    request: studio.Request,
    *,
    first: int,
    is_over: Callable[[], bool],
) -> list[tuple[Image, Recipe]]:
    """The next picture, with those after it that differ in nothing but the seed and find room beside it."""
    from reparam_diffusion.models.sample import at_once, draw
    from reparam_diffusion.models.weighted import notes_on

    begun = time.time()
    asked = request.recipes[first]
    base = base_of(asked, request.device)
    if not kept.has(base):
        log.append(e.Prepared("loading the model", 0, 0))
    easel = kept.easel(base)
    model = easel.model
    image, mask = images.open_sources(asked, kept.workspace)
    for note in easel.put(
        [(studio.adapter_file(u.name, kept.workspace), u.strength, u.te_strength) for u in asked.adapters]
    ):
        log.append(e.Warned(note))
    to_noise = easel.zero_terminal_snr
    recipe = filled(asked, model, None if image is None else image.size, zero_terminal_snr=to_noise)
    for note in notes_on(model, recipe.prompt, recipe.negative):
        log.append(e.Warned(note))
    seeds = _seeds_alike(request.recipes[first:], most=at_once(model.device, recipe.width or 0, recipe.height or 0))
    looks = studio.looks_of(folder)

    def on_step(done: int, total: int) -> bool:
        share = done * len(seeds) / total
        log.append(e.Prepared("drawing", round((first + share) * 1000), len(request.recipes) * 1000))
        return is_over()

    def on_look(number: int, early: Sequence[Image]) -> None:
        for n, picture in enumerate(early, first + number):
            with beside(looks / f"{n}.webp") as hidden:
                picture.save(hidden, "WEBP", quality=85)

    pictures = draw(
        model,
        recipe.prompt,
        negative=recipe.negative,
        seeds=seeds,
        steps=recipe.steps,
        guidance=recipe.guidance,
        width=recipe.width,
        height=recipe.height,
        clip_skip=recipe.clip_skip,
        scheduler=asked.scheduler,
        image=image,
        mask=mask,
        denoise=recipe.denoise,
        zero_terminal_snr=to_noise,
        on_step=on_step,
        on_look=on_look,
    )
    seconds = (time.time() - begun) / max(1, len(pictures))
    drawn = [
        (picture, recipe.model_copy(update={"seed": seed})) for picture, seed in zip(pictures, seeds, strict=False)
    ]
    for n, (picture, own) in enumerate(drawn):
        file = images.save_picture(picture, own, images.new_name(kept.workspace, str(own.seed)))
        log.append(e.Drawn(first + n, _inside(file, kept.workspace), seconds))
    return drawn


def _seeds_alike(recipes: Sequence[Recipe], *, most: int) -> list[int]:
    """The seeds of the first recipe and of those that follow it and differ in the seed only."""
    plain = recipes[0].model_copy(update={"seed": 0})
    seeds = []
    for recipe in recipes[:most]:
        if recipe.model_copy(update={"seed": 0}) != plain:
            break
        seeds.append(recipe.seed)
    return seeds


def _save_sheet(
    workspace: Path, log: runs.EventLog, request: studio.Request, drawn: Sequence[tuple[Image, Recipe]]
) -> None:
    """All pictures of a grid on one sheet, which carries the first one's recipe."""
    from reparam_diffusion.gallery.grid import make_grid

    begun, width = time.time(), len(request.columns)
    pictures = [picture for picture, _ in drawn]
    rows = [(name, pictures[n * width : (n + 1) * width]) for n, name in enumerate(request.rows)]
    file = images.save_picture(make_grid(rows, request.columns), drawn[0][1], images.new_name(workspace, "grid"))
    log.append(e.Drawn(0, _inside(file, workspace), time.time() - begun, sheet=True))


def _inside(file: Path, workspace: Path) -> str:
    return file.relative_to(workspace).as_posix()


# --- the process -----------------------------------------------------------------------------------------------------
def serve(workspace: Path, *, idle: float = IDLE, stop: Callable[[], str] = lambda: "") -> None:
    """Draw requests as they come, until there were none for `idle` seconds. A second studio ends at once."""
    workspace = workspace.resolve()
    kept = Studio(workspace, stop)
    while True:
        with locks.try_hold(studio.studio_lock(workspace), patience=1.0) as held:
            if not held:
                return
            _serve(workspace, kept, idle=idle, stop=stop)
        if stop() or not studio.todo(workspace):  # asked again without the lock: one may have come as it was let go
            return


@dataclass
class _Job:
    """A request that is being drawn, the base model it needs, and whether it waits for the device."""

    folder: Path
    base: Base
    steps: Iterator[bool]
    waits: bool = False


def _serve(workspace: Path, kept: Studio, *, idle: float, stop: Callable[[], str]) -> None:
    """A round gets each request one picture further; those that need another base model wait for its turn."""
    _give_up_lost(workspace)
    jobs: list[_Job] = []
    last = time.monotonic()
    while not stop():
        known = {job.folder for job in jobs}
        jobs += [_new_job(folder, kept) for folder in studio.todo(workspace) if folder not in known]
        leader = next((job.base for job in jobs if not job.waits), None)
        got_on = False
        for job in [job for job in jobs if job.waits or job.base == leader]:
            went = next(job.steps, None)
            job.waits = went is False
            if went is None:
                jobs.remove(job)
                studio.tidy(workspace)
            elif went and any(state.state == "queued" for _, state in kept.overview.look()):
                time.sleep(GIVE_WAY)
            got_on = got_on or bool(went)
        if jobs:
            last = time.monotonic()
        if not got_on:
            kept.make_room()
            time.sleep(LOOK_AGAIN)
        if not jobs and time.monotonic() - last > idle:
            return
    for job in jobs:
        deque(job.steps, maxlen=0)  # each sees that it is over, and says so


def _new_job(folder: Path, kept: Studio) -> _Job:
    try:
        request = studio.read_request(folder)
        base = base_of(request.recipes[0], request.device)
    except UserError:  # drawing it will tell
        base = Base()
    return _Job(folder, base, draw_request(folder, kept))


def _give_up_lost(workspace: Path) -> None:
    """Requests that a killed studio had begun are not begun again: what killed it may do so once more."""
    for folder in studio.todo(workspace):
        events, _ = runs.read_events(folder)
        if any(isinstance(event, e.Prepared) for event in events):
            with runs.EventLog(folder) as log:
                log.append(e.Failed("The studio ended without a word.", "It may have been killed.", "Draw it again."))
            (folder / "todo").unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m reparam_diffusion.jobs.studio_worker WORKSPACE [IDLE SECONDS]`."""
    workspace, *rest = sys.argv[1:] if arguments is None else arguments
    with worker.heeded_signals() as signalled:
        serve(Path(workspace), idle=float(rest[0]) if rest else IDLE, stop=signalled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
