"""Pictures from a model, through diffusers' own pipelines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.decode import Watcher, decode, look
from reparam_diffusion.models.encode import Encoded
from reparam_diffusion.models.habits import DENOISE
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.pipeline import pipeline_over
from reparam_diffusion.models.room import empty_cache, give_back, is_out_of_memory
from reparam_diffusion.models.schedulers import down_to_noise, make_scheduler
from reparam_diffusion.models.start import Starter, fitting_size, make_start
from reparam_diffusion.models.weighted import encode_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

LOOKS, LOOK_EVERY = 6, 10
"""How many early looks there are at a picture, and after how many steps there is one at the latest."""

OnStep = Callable[[int, int], bool]
"""(steps done, of how many); True ends the drawing early."""
OnLook = Callable[[int, "list[Image]"], None]
"""(number of the first picture, early looks at it and those drawn with it)."""


def draw(
    model: Model,
    prompt: str,
    *,
    negative: str | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    clip_skip: int = 0,
    scheduler: str = "",
    image: Image | None = None,
    mask: Image | None = None,
    denoise: float = DENOISE,
    zero_terminal_snr: bool = False,
    on_step: OnStep | None = None,
    on_look: OnLook | None = None,
) -> list[Image]:
    """One picture a seed, from the model as it stands (attached or merged adapters count).

    `scheduler` is one of SCHEDULERS, "" the model's own. With `image` drawing begins from it, scaled to cover the size
    and cropped around its middle; no size is then the one nearest to its proportions. `denoise` (0 to 1) is how much
    may change, `mask` is white where; elsewhere the image's pixels stay as they are. `zero_terminal_snr` begins at pure
    noise, as an adapter may have been trained. `on_step(done, total)` is told of progress; when it returns True the
    drawing ends early with no pictures.
    """
    steps = model.habits.steps if steps is None else steps
    guidance = model.habits.guidance if guidance is None else guidance
    negative = model.habits.negative if negative is None else negative
    if not (width and height):
        own = _own_size(model, image)
        width, height = width or own[0], height or own[1]
    _check(model, seeds, steps=steps, width=width, height=height)
    start = None
    if mask is not None and image is None:
        raise UserError("A mask needs the picture that it lies on.", do="Give the picture too.")
    if image is not None:
        start = make_start(image, mask, denoise=denoise, width=width, height=height, steps=steps)
    with torch.no_grad():
        text = encode_prompts(model, [prompt, negative], clip_skip=clip_skip)
        fresh = make_scheduler(down_to_noise(model.scheduler) if zero_terminal_snr else model.scheduler, scheduler)
        watcher = None if on_look is None else Watcher(fresh)
        options = {"vae": model.vae, "tokenizers": model.tokenizers, "scheduler": fresh, "device": model.device}
        pipe = pipeline_over(model.parts, **options, from_picture=start is not None)
        pipe.set_progress_bar_config(disable=True)
        starter = None if start is None else Starter(model, start, fresh)
        if start is not None and starter is not None:
            pipe.prepare_latents = starter.prepare_latents
            begin: dict[str, Any] = {"image": start.picture, "strength": start.denoise}
        else:
            begin = {"width": width, "height": height}
        pictures: list[Image] = []

        def early() -> None:
            if on_look is not None and watcher is not None and watcher.clean is not None:
                on_look(len(pictures), look(model, watcher.clean))

        def latents(chunk: Sequence[int]) -> Tensor:
            with model.using(model.unet):
                return pipe(
                    **_conditioning(text, len(chunk)),
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(seed) for seed in chunk],
                    callback_on_step_end=_progress(
                        on_step, early, starter, before=len(pictures), now=len(chunk), total=len(seeds)
                    ),
                    output_type="latent",
                    **begin,
                ).images

        for out in _sparing(pipe, latents, seeds, room=at_once(model.device, width, height)):
            if getattr(pipe, "was_cancelled", False):
                return []
            give_back()
            with model.without(model.unet):
                drawn = decode(model, out)
            pictures += drawn if start is None else [start.finish(picture) for picture in drawn]
    return pictures


def _own_size(model: Model, image: Image | None) -> tuple[int, int]:
    """Width and height where nobody says: the model's own square, or what fits the picture that is begun from."""
    side = model.size
    return (side, side) if image is None else fitting_size(image.size, side=side, step=model.size_step)


def _sparing(
    pipe: Any, latents: Callable[[Sequence[int]], Tensor], seeds: Sequence[int], *, room: int
) -> Iterator[Tensor]:
    """The latents of `room` seeds at a time; of half as many when the memory runs out, at last of one in slices.

    Any: diffusers' pipeline. Slices are slower, and change nothing but the rounding.
    """
    is_sliced, done = False, 0
    try:
        while done < len(seeds):
            chunk = seeds[done : done + room]
            try:
                out = latents(chunk)
            except (RuntimeError, MemoryError) as error:
                if is_sliced or not is_out_of_memory(error):
                    raise
                out = None  # outside the handler nothing holds what was being computed
            if out is None:
                room = len(chunk) // 2
                if not room:
                    is_sliced, room = True, 1
                    pipe.enable_attention_slicing()
                empty_cache()
                continue
            done += len(chunk)
            yield out
    finally:
        if is_sliced:
            pipe.disable_attention_slicing()


def at_once(device: torch.device, width: int, height: int) -> int:
    """How many pictures of a size are drawn side by side."""
    room = 8 * 128 * 128 if device.type == "cpu" else 4 * 1024 * 1024  # pixels
    return max(1, room // (width * height))


def _progress(
    on_step: OnStep | None, early: Callable[[], None], starter: Starter | None, *, before: int, now: int, total: int
) -> Callable[..., dict[str, Any]]:
    """What the pipeline calls after each step: tells how far it is, gives early looks, and hears of a cancel.

    `now` of `total` pictures are being drawn, after those `before`. What is to stay of a picture that they began from
    is put back.
    """

    def told(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps = pipe.num_timesteps  # Heun goes twice through most
        if on_step is not None and on_step(before * steps + now * (step + 1), total * steps):
            pipe._interrupt = True
            pipe.was_cancelled = True
        elif (step + 1) % min(max(2, steps // LOOKS), LOOK_EVERY) == 0 and step + 1 < steps:
            early()
        return values if starter is None else {"latents": starter.put_back(values["latents"], step, steps)}

    return told


def _conditioning(text: Encoded, count: int) -> dict[str, Any]:
    values = {
        "prompt_embeds": text.hidden[:1].repeat(count, 1, 1),
        "negative_prompt_embeds": text.hidden[1:].repeat(count, 1, 1),
    }
    if text.pooled is not None:
        values |= {
            "pooled_prompt_embeds": text.pooled[:1].repeat(count, 1),
            "negative_pooled_prompt_embeds": text.pooled[1:].repeat(count, 1),
        }
    return values


def _check(model: Model, seeds: Sequence[int], *, steps: int, width: int, height: int) -> None:
    """Raises UserError for what this model cannot draw."""
    most = int(model.scheduler.config.num_train_timesteps)
    if not 1 <= steps <= most:
        raise UserError(f"{steps} sampling steps are not possible.", do=f"Take 1 to {most}.")
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise UserError("A seed is out of range.", do="Take a whole number from 0 to 9223372036854775807.")
    step = model.size_step
    if width % step or height % step or min(width, height) < step:
        raise UserError(
            f"The size {width} x {height} does not fit this model.",
            f"Sides must be multiples of {step} pixels.",
            f"Try {max(step, round(width / step) * step)} x {max(step, round(height / step) * step)}.",
        )


def finite(text: str) -> float:
    """A number from text. Raises ValueError for anything else, "nan" and "inf" included."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number to multiply with")
    return value
