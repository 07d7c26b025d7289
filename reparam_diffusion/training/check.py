"""Settings that cannot be, told before anything is made or loaded."""

from __future__ import annotations

from pathlib import Path

from reparam_diffusion.config import TrainConfig
from reparam_diffusion.data.masks import ALPHA, BESIDE
from reparam_diffusion.data.sets import sources_of
from reparam_diffusion.data.source_files import files_of
from reparam_diffusion.errors import UserError
from reparam_diffusion.models.outline import check_vae, outline
from reparam_diffusion.models.parts import make_scheduler
from reparam_diffusion.models.schedulers import down_to_noise
from reparam_diffusion.models.source import find_source
from reparam_diffusion.printable import has_control, printable
from reparam_diffusion.training.embedding import check_trigger
from reparam_diffusion.training.optim import check_optimizer


def check_settings(config: TrainConfig) -> None:
    """Raise UserError, with its place, for settings that exclude each other or need what is not installed."""
    _check_words(config)
    if config.launch.launcher != "ray":  # a cluster may have files that this machine lacks
        _check_model(config.model.path)
        check_vae(config.model.vae)
    check_optimizer(config)
    check_trigger(config)
    _check_noise(config)
    if config.model.block_offload and config.training.compile:
        raise UserError(
            "Compiled blocks cannot be offloaded.",
            do="Switch training.compile or model.block_offload off.",
            place="training.compile",
        )


def _check_words(config: TrainConfig) -> None:
    """Whether words and names are text that can be shown and tokenized: control characters never are."""
    data, output = config.data, config.output
    words: dict[str, str | None] = {
        "data.trigger": data.trigger,
        "data.class_word": data.class_word,
        "data.caption_template": data.caption_template,
        "prior.prompt": config.prior.prompt,
        "embedding.words": config.embedding.words,
        "output.name": output.name,
    }
    words |= {f"output.sample_prompts.{number}": prompt for number, prompt in enumerate(output.sample_prompts)}
    for number, one in enumerate(data.sets):
        for field in ("trigger", "class_word", "caption_template"):
            words[f"data.sets.{number}.{field}"] = getattr(one, field)
    for place, text in words.items():
        if text and has_control(text):
            raise UserError(
                f"{place} has a control character.",
                f"It is {printable(text)[:100]}.",
                "Write it again, with letters only.",
                place=place,
            )


def _check_model(path: str) -> None:
    """Whether a base model that is named by a path is there; a hub id is asked for in its run."""
    if path.count("/") != 1 or path.startswith((".", "/", "~")) or Path(path).exists():
        find_source(path, fetch=False)


def check_model_here(config: TrainConfig) -> None:
    """As `check_model`, before a run is made; a run on a Ray cluster is checked where it trains."""
    if config.launch.launcher != "ray":
        check_model(config)


def check_model(config: TrainConfig, *, has_start: bool = False) -> None:
    """Raise UserError, at its setting, where the base model is not there or does not go with the run's settings.

    Of a hub id the configuration is fetched, a few kilobytes, as the run would do. `has_start` where the run keeps a
    copy of the adapter that it continues from.
    """
    from reparam_diffusion.training.learner import plan_run

    try:
        model = outline(config.model.path, fetch=True)
    except UserError as error:
        raise UserError(error.what, error.why, error.do, place=error.place or "model.path") from None
    if has_start:
        config = config.model_copy(update={"training": config.training.model_copy(update={"start_from": ""})})
    start = config.training.start_from
    if start and not Path(start).expanduser().exists():
        raise UserError(f"There is no adapter at {start}.", do="Check the path.", place="training.start_from")
    plan_run(model, config)


def check_images(config: TrainConfig) -> None:
    """Raise UserError, at its setting, for images or masks that are not there, by their names alone."""
    if not config.data.images:
        raise UserError("No images were given.", do="Set data.images to a folder of images.", place="data.images")
    for source in sources_of(config.data):
        try:
            files_of(source.images)
        except UserError as error:
            raise UserError(error.what, error.why, error.do, place=f"{source.place}.images") from None
        if source.masks not in ("", ALPHA, BESIDE) and not Path(source.masks).expanduser().is_dir():
            raise UserError(
                f"There is no folder of masks at {source.masks}.", do="Check the path.", place=f"{source.place}.masks"
            )


def _check_noise(config: TrainConfig) -> None:
    """Whether the model can be trained down to pure noise; one that is not on this machine is asked in its run."""
    model = config.model
    if not model.zero_terminal_snr or model.prediction_type == "v_prediction":
        return
    try:
        own = make_scheduler(find_source(model.path, fetch=False).configs)
    except UserError:
        return
    if model.prediction_type != "auto":
        own = type(own).from_config(own.config, prediction_type=model.prediction_type)
    down_to_noise(own)
