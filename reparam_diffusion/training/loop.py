"""The training loop: one function a person can read aloud. It yields events; it does not log, plot or draw."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from datetime import datetime
from itertools import chain
from pathlib import Path

import torch

from reparam_diffusion.config import TrainConfig, choose_seeds, read_settings, settle, to_toml
from reparam_diffusion.data.folder_layout import expand_folders
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import (
    Event,
    Finished,
    Launched,
    Paused,
    Prepared,
    Ranked,
    Sampled,
    Saved,
    Started,
    Step,
    Stopped,
    Validated,
    Warned,
)
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.precision import name_of
from reparam_diffusion.models.room import give_back
from reparam_diffusion.models.words import Word, spoken
from reparam_diffusion.targets import SitePlan, file_bytes
from reparam_diffusion.training.batch import draw_of, loss_of, samples_at, text_is_live
from reparam_diffusion.training.check import check_images, check_model, check_settings
from reparam_diffusion.training.embedding import check_captions, new_word
from reparam_diffusion.training.facts import ADAPTER, steps_of, write_finished
from reparam_diffusion.training.learner import Learner, plan_run
from reparam_diffusion.training.measure import fixed_noise_loss, save_preview
from reparam_diffusion.training.objective import Objective
from reparam_diffusion.training.optim import learning_rates, notes_on
from reparam_diffusion.training.prepare import Material, prepare, preview_prompts, told_sets
from reparam_diffusion.training.processes import Processes, are_many, is_first
from reparam_diffusion.training.ready import at_work, load_base, make_ready, settled
from reparam_diffusion.training.setup import Setup
from reparam_diffusion.training.start import keep_start
from reparam_diffusion.training.state import State, load_checkpoint, save_checkpoint, steps_saved

Asked = Callable[[], str | bool]
"""Asked before each step: "" or False goes on, "stop" or True ends with an adapter, "pause" with a checkpoint, "sample"
draws the previews now."""


READY = "ready"
"""What the first process says when the pictures and captions are encoded."""


def never() -> str:
    """Nobody asks anything."""
    return ""


def train(
    config: TrainConfig, *, stop: Asked = never, folder: Path | None = None, resume: bool = False
) -> Iterator[Event]:
    """Train one adapter into `folder` (a new one under workspace/runs by default), yielding what happens.

    Ends with Finished, Stopped or Paused, or raises UserError. `resume` goes on from the folder's last checkpoint; a
    finished run stays as it is, with a warning that there was nothing to do.
    """
    begun = time.time()
    config, notes = _check_config(config, resume=resume)
    folder = folder or Path("workspace") / "runs" / datetime.now().strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    yield Launched(pid=os.getpid(), folder=str(folder))
    yield from (Warned(note) for note in notes)
    if resume and steps_of(folder / ADAPTER) == config.training.steps in steps_saved(folder):
        yield Warned(f"There is nothing to do: this run has done all {config.training.steps} steps.")
        yield Finished(config.training.steps, ADAPTER, 0.0)
        return
    config = _with_seeds(config, folder)
    saved = yield from _last_state(folder, config, resume=resume)
    # A resumed run keeps its format.
    model, processes = load_base(config, precision=config.model.precision if saved is None else saved["precision"])
    training = config.training
    objective = Objective(model, min_snr_gamma=training.min_snr_gamma, noise_offset=training.noise_offset)
    start = keep_start(config, folder, is_main=processes.is_main)
    sites = plan_run(model, config, start=start)
    word = new_word(model, config, start=start)
    yield from _notes(model, config, sites, word, objective)
    with spoken(model, [] if word is None else [word]):
        material = yield from _prepared(model, config, folder, processes, stop=stop, saved=saved)
    if material is None:
        return
    setup = Setup(model, config, objective, material, processes, folder, begun)
    learner = Learner(model, config, sites, processes, start=start, word=word)
    first = yield from _picked_up(learner, saved, model)
    make_ready(model, config)
    yield Started(
        method=config.adapter.method,
        steps=training.steps,
        first_step=first,
        sites=len(sites),
        parameters=learner.count,
        file_bytes=file_bytes(sites, config.output.file_precision) + learner.word_bytes,
        device=str(model.device),
        precision=name_of(model.dtype),
        pictures=len(material.dataset.train),
        ranks=learner.ranks(),
        sets=told_sets(config, material),
        processes=processes.ranks,
    )
    look = _Look(setup, learner)
    with learner, at_work(model, config):
        for step in range(first, training.steps + 1):
            asked = processes.agree(str(stop() or ""))
            if asked == "sample":
                yield from processes.only_main(look.draw(step - 1))
            elif asked:
                yield from _ended(look, processes, step - 1, asked)
                return
            clock = time.perf_counter()
            loss = processes.mean(forward_and_backward(setup, learner, step))
            _check_loss(loss, step)
            if step == first:
                learner.check_gradients()
            fresh = learner.kept() if step == 1 else None
            rates = learning_rates(learner.optimizer)
            norm = learner.update(step)
            yield Step(step, loss, rates, time.perf_counter() - clock, norm)
            if fresh is not None:  # the looks before step 1 come after it, since they take minutes on a large model
                with learner.at(fresh):
                    yield from look.at(0)
            yield from look.at(step)
        path = look.finish(training.steps)
        yield Saved(training.steps, path, "adapter")
    yield Finished(training.steps, path, time.time() - begun)


def _ended(look: _Look, processes: Processes, step: int, asked: str) -> Iterator[Event]:
    """The end that was asked for: a checkpoint, and unless it is a pause the adapter and its samples."""
    yield from processes.only_main(look.keep(step))
    if asked == "pause":
        yield Paused(step)
        return
    path = look.finish(step)
    yield from processes.only_main(look.draw(step))
    yield Stopped(step, path)


def forward_and_backward(setup: Setup, learner: Learner, step: int) -> float:
    """Gradients of one optimizer step over its forward passes; returns the mean loss."""
    passes = setup.config.training.accumulation
    total = 0.0
    for micro in range(passes):
        samples = samples_at(setup, step, micro)
        learner.injection.set_draw(draw_of(samples, setup.config, step))
        loss = loss_of(setup, samples, step)
        total += float(loss.detach()) / passes
        penalty = learner.penalty() if micro == 0 else None
        whole = loss / passes if penalty is None else loss / passes + penalty
        learner.scaler.scale(whole).backward()
    learner.injection.set_draw(None)
    return total


def _check_config(config: TrainConfig, *, resume: bool) -> tuple[TrainConfig, list[str]]:
    """The settings with folders in kohya's layout as sets, and notes on them. Raises UserError for what cannot be."""
    data, notes = expand_folders(config.data)
    config = config.model_copy(update={"data": data})
    check_settings(config)
    check_images(config)
    check_model(config, has_start=resume)
    return config, list(notes)


def _check_loss(loss: float, step: int) -> None:
    """Refuse a loss that is no number; all processes see the same one and end alike."""
    if not math.isfinite(loss):
        raise UserError(
            f"The loss became {loss} at step {step}.",
            "The learning rate is too high for these settings, or the model's number format too small.",
            "Start again with a lower learning rate, or with model.precision = fp32.",
        )


class _Look:
    """What is looked at and kept on the way: fixed-noise loss, previews, ranks, checkpoints."""

    def __init__(self, setup: Setup, learner: Learner) -> None:
        config = setup.config
        self.setup, self.config, self.learner = setup, config, learner
        captions = [item.caption for item in setup.material.dataset.train]
        self.prompts = preview_prompts(setup.model, config, captions)
        steps, output = config.training.steps, config.output
        self.checkpoint_every = output.checkpoint_every or max(steps // 5, 1)
        self.validate_every = output.validate_every or max(steps // 10, 1)
        self.sample_every = output.sample_every or steps
        self.ranks = learner.ranks()

    def at(self, step: int) -> Iterator[Event]:
        """What is due after this step (0: the base model). The first process does it, the others wait."""
        last = self.config.training.steps
        due: list[Iterator[Event]] = []
        if step % self.validate_every == 0 or step == last:
            due.append(self._validate(step))
        if step % self.sample_every == 0 or step == last:
            due.append(self.draw(step))
        if step and (step % self.checkpoint_every == 0 or step == last):
            due.append(self.keep(step))
        if due:
            yield from self.learner.processes.only_main(chain.from_iterable(due))

    def draw(self, step: int) -> Iterator[Event]:
        """The preview pictures at this step."""
        if self.prompts:
            give_back()
            with self.learner.averaged():
                for number, prompt in enumerate(self.prompts):
                    if step == 0:
                        yield Prepared("preview pictures", number, len(self.prompts))
                    try:
                        seed, path = save_preview(self.setup, prompt, number, step)
                    except UserError as error:  # such as NaN: the run goes on
                        yield Warned(f'No sample of "{prompt}" at step {step}. {error}')
                        continue
                    yield Sampled(step, prompt, seed, path)

    def keep(self, step: int) -> Iterator[Event]:
        """A checkpoint at this step."""
        state: State = {
            "schema": 1,
            "step": step,
            "precision": name_of(self.setup.model.dtype),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "processes": self.learner.processes.ranks,
            "tile": self.setup.material.latents.tile,
            **self.learner.state(),
        }

        def also(place: Path) -> None:
            write_finished(self.setup, self.learner, step, folder=place)

        folder, count = self.setup.folder, self.config.output.keep_checkpoints
        place = save_checkpoint(folder, step, state, keep=count, also=also)
        yield Saved(step, str(place.relative_to(folder)), "checkpoint")

    def finish(self, step: int) -> str:
        """The finished file, written by the main process; its name."""
        if not self.learner.processes.is_main:
            return ADAPTER
        return write_finished(self.setup, self.learner, step)

    def _validate(self, step: int) -> Iterator[Event]:
        give_back()
        with self.learner.averaged():
            loss = fixed_noise_loss(self.setup)
        held_out = bool(self.setup.material.dataset.held_out)
        best = held_out and step > 0 and self._may_be_best(step) and loss < (self.learner.best or float("inf"))
        if best:
            self.learner.best = loss
            write_finished(self.setup, self.learner, step, name="best.safetensors")
        give_back()
        yield Validated(step, loss, held_out, best)
        ranks = self.learner.ranks()
        if ranks != self.ranks:
            self.ranks = ranks
            yield Ranked(step, ranks)

    def _may_be_best(self, step: int) -> bool:
        """AdaLoRA's ranks must be final before a step may count as the best."""
        share = max(getattr(adapter.plan, "t_final", 0.0) for adapter in self.learner.adapters.values())
        total = self.config.training.steps
        return step >= total - round(share * total)


def _prepared(
    model: Model, config: TrainConfig, folder: Path, processes: Processes, *, stop: Asked, saved: State | None
) -> Generator[Event, None, Material | None]:
    """The material; None when a request ended the run before it was there.

    The first process draws and encodes, the others wait and find it done.
    """
    done = 0 if saved is None else saved["step"]
    tile = None if saved is None else saved.get("tile")
    if not processes.is_main:
        said, _, theirs = processes.wait_for_main().partition(" ")
        if said != READY:
            return None
        tile = int(theirs)
    preparing = prepare(model, config, folder, text_is_live=text_is_live(config), tile=tile, ranks=processes.ranks)
    while True:
        try:
            yield next(preparing)
        except StopIteration as end:
            material: Material = end.value
            break
        if not processes.is_main:
            continue  # the first process has drawn and encoded everything
        asked = stop()
        if asked and asked != "sample":
            processes.agree(str(asked))
            yield Paused(done) if asked == "pause" else Stopped(done, "")
            return None
        processes.agree("")
    if processes.is_main:
        processes.agree(f"{READY} {material.latents.tile}")
    check_captions(config, [item.caption for item in material.dataset.train])
    give_back()
    return material


def _with_seeds(config: TrainConfig, folder: Path) -> TrainConfig:
    """The settings with a number for each seed of -1: the folder's own, else a random one."""
    if -1 not in (config.training.seed, config.output.sample_seed):
        return config
    if are_many():
        raise UserError("A random seed cannot be agreed on here.", do="Give a seed from 0.", place="training.seed")
    settings = folder / "config.toml"
    known = settle(read_settings(settings)) if settings.is_file() else choose_seeds(config)
    training = config.training.model_copy(update={"seed": known.training.seed})
    output = config.output.model_copy(update={"sample_seed": known.output.sample_seed})
    return config.model_copy(update={"training": training, "output": output})


def _last_state(folder: Path, config: TrainConfig, *, resume: bool) -> Generator[Event, None, State | None]:
    """The state to go on from; None at the beginning, also of a run that ended before its first checkpoint.

    Newer checkpoints that are damaged are told.
    """
    settings = folder / "config.toml"
    if not settings.is_file() and is_first():
        settings.write_text(to_toml(config), encoding="utf-8")
    if not resume and steps_saved(folder):
        raise UserError(
            f"{folder} holds a run already.", "Its checkpoints would be mixed up.", "Resume it, or take another folder."
        )
    if not resume or not any((folder / "checkpoints").glob("[0-9]*")):
        return None
    saved, damaged = load_checkpoint(folder)
    if damaged:
        named = f"step {damaged[0]} is" if len(damaged) == 1 else f"steps {', '.join(map(str, reversed(damaged)))} are"
        yield Warned(f"The checkpoint of {named} damaged: the run goes on from step {saved['step']}.")
    if saved["step"] > config.training.steps:
        raise UserError(
            f"This run has done {saved['step']} steps.",
            f"Its settings ask for {config.training.steps}.",
            "Raise training.steps, or start a new run.",
            place="training.steps",
        )
    return saved


def _notes(
    model: Model, config: TrainConfig, sites: list[SitePlan], word: Word | None, objective: Objective
) -> Iterator[Event]:
    """What had to be settled, for some layers each kind once."""
    for told in [*notes_on(config), *settled(model, config)]:
        yield Warned(told)
    if word is not None and word.count != (asked := config.embedding.vectors):
        yield Warned(f"The trigger word has {word.count} vectors, as in the adapter it starts from, not {asked}.")
    if objective.gamma != config.training.min_snr_gamma:
        yield Warned("Min-SNR is off: with zero terminal SNR it would give the last step no weight.")
    notes = Counter(note for site in sites if (note := getattr(site.plan, "note", "")))
    for note, count in notes.items():
        yield Warned(f"In {count} of {len(sites)} layers: {note}.")


def _picked_up(learner: Learner, saved: State | None, model: Model) -> Generator[Event, None, int]:
    """The learner as it was saved; the step it begins with."""
    if saved is None:
        return 1
    learner.load_state(saved)
    yield from _differences(saved, model, learner.processes.ranks)
    return int(saved["step"]) + 1


def _differences(saved: State, model: Model, processes: int) -> Iterator[Event]:
    """What keeps a resumed run from being bit for bit the same."""
    if saved["threads"] != torch.get_num_threads() and model.device.type == "cpu":
        yield Warned(
            f"The run used {saved['threads']} threads, now {torch.get_num_threads()}: sums may round differently."
        )
    if saved["torch"] != str(torch.__version__):
        yield Warned(f"The run used torch {saved['torch']}, now {torch.__version__}: sums may round differently.")
    before = saved.get("processes", 1)
    if before != processes:
        yield Warned(
            f"The run trained in {_counted(before)}, now in {_counted(processes)}: a step shows {processes / before:g} "
            "times as many pictures."
        )


def _counted(processes: int) -> str:
    return "one process" if processes == 1 else f"{processes} processes"
