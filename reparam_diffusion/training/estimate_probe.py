"""Timing the pieces of a run that has not been: real loading, encoding, drawing and steps on made-up pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from reparam_diffusion.config import TrainConfig
from reparam_diffusion.events import Event
from reparam_diffusion.maths.chance import generator
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.sample import draw
from reparam_diffusion.training.batch import text_is_live
from reparam_diffusion.training.embedding import new_word
from reparam_diffusion.training.estimate_pace import Unit, seconds_of
from reparam_diffusion.training.learner import Learner, plan_run
from reparam_diffusion.training.loop import forward_and_backward
from reparam_diffusion.training.measure import fixed_noise_loss
from reparam_diffusion.training.objective import Objective
from reparam_diffusion.training.prepare import prepare, preview_prompts
from reparam_diffusion.training.ready import at_work, load_base, make_ready
from reparam_diffusion.training.setup import Setup

PICTURES = 4
WARM_UP, TIMED = 2, 5
"""Steps that are taken first, and steps whose median counts."""
DENOISED = 4
"""Sampling steps of a timed drawing, the first of which is not counted."""
_BUSY = 0.7
"""Share of the wall's time below which a processor was kept busy by others."""


class Interrupted(Exception):
    """Something more important wants the device."""


def probe(config: TrainConfig, folder: Path, *, may_go_on: Callable[[], bool]) -> dict[Unit, float]:
    """Seconds of each piece of a run's work, timed in an empty folder. Raises Interrupted when it may not go on."""

    def heed() -> None:
        if not may_go_on():
            raise Interrupted

    heed()
    config = _on_made_up_pictures(config, folder / "pictures")
    watch = _Stopwatch(torch.device("cpu"))
    model, processes = load_base(config, precision=config.model.precision)
    taken: dict[Unit, float] = {"loading": watch.seconds()}
    steps = config.prior.steps or model.habits.steps
    heed()
    taken["class picture"] = _drawing(model, model.habits.class_prompt, steps, heed)
    events: list[Event] = []
    preparing = prepare(model, config, folder, text_is_live=text_is_live(config))
    while True:
        heed()
        try:
            events.append(next(preparing))
        except StopIteration as end:
            material = end.value
            break
    prepared = seconds_of(events, looked_at=1, found_below=0.0)  # the folder is new: nothing is found in it
    taken |= {unit: seconds for unit, seconds in prepared.items() if unit != "class picture"}
    training = config.training
    objective = Objective(model, min_snr_gamma=training.min_snr_gamma, noise_offset=training.noise_offset)
    setup = Setup(model, config, objective, material, processes, folder, time.time())
    learner = Learner(model, config, plan_run(model, config), processes, word=new_word(model, config))
    make_ready(model, config)
    with learner, at_work(model, config):
        taken["preview"] = _drawing(model, preview_prompts(model, config, [])[0], model.habits.steps, heed)
        watch = _Stopwatch(model.device)
        fixed_noise_loss(setup)
        taken["fixed-noise loss"] = watch.seconds() / PICTURES
        taken["step"] = _stepping(setup, learner, heed)
    return taken


class _Stopwatch:
    """Seconds on the wall; on a processor that others keep busy, this process's own time shared by its threads."""

    def __init__(self, device: torch.device) -> None:
        self.is_cpu = device.type == "cpu"
        self.wall, self.own = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        wall = time.perf_counter() - self.wall
        own = (time.process_time() - self.own) / torch.get_num_threads()
        return own if self.is_cpu and own < _BUSY * wall else wall


def _on_made_up_pictures(config: TrainConfig, folder: Path) -> TrainConfig:
    """The same run on square noise, with one class picture that is drawn quickly."""
    folder.mkdir(parents=True)
    side = config.data.resolution or 512
    for number in range(PICTURES):
        noise = torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=generator("probe", number))
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    data = {"images": str(folder), "buckets": False, "repeats": 1, "held_out": 0, "masks": "", "sets": []}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "prior": config.prior.model_copy(update={"images": 1, "steps": 1}),
        }
    )


def _drawing(model: Model, prompt: str, steps: int, heed: Callable[[], None]) -> float:
    """Seconds for one picture in so many sampling steps, from a few of them."""
    whole, inner, marks = _Stopwatch(model.device), _Stopwatch(model.device), []

    def on_step(done: int, total: int) -> bool:
        nonlocal inner
        heed()
        if done == 1:
            inner = _Stopwatch(model.device)
        marks.append(inner.seconds())
        return False

    draw(model, prompt, steps=DENOISED, on_step=on_step)
    return whole.seconds() + marks[-1] / (DENOISED - 1) * (steps - DENOISED)


def _stepping(setup: Setup, learner: Learner, heed: Callable[[], None]) -> float:
    """Seconds for one optimizer step."""
    times = []
    for step in range(1, WARM_UP + TIMED + 1):
        heed()
        watch = _Stopwatch(setup.model.device)
        forward_and_backward(setup, learner, step)
        learner.update(step)
        times.append(watch.seconds())
    return median(times[WARM_UP:])
