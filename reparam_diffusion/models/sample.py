"""Pictures from a model, through diffusers' own pipelines."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reparam_diffusion.errors import UserError
from reparam_diffusion.models.encode import Encoded, encode
from reparam_diffusion.models.load import Model

if TYPE_CHECKING:
    from PIL.Image import Image

_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>", re.IGNORECASE)


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
    on_step: Callable[[int, int], bool] | None = None,
) -> list[Image]:
    """One picture a seed, from the model as it stands (attached or merged adapters count).

    `on_step(done, total)` is told of progress; when it returns True the drawing ends early with no pictures.
    """
    steps = model.habits.steps if steps is None else steps
    most = int(model.scheduler.config.num_train_timesteps)
    if not 1 <= steps <= most:
        raise UserError(f"{steps} sampling steps are not possible.", do=f"Take 1 to {most}.")
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise UserError("A seed is out of range.", do="Take a whole number from 0 to 9223372036854775807.")
    guidance = model.habits.guidance if guidance is None else guidance
    negative = model.habits.negative if negative is None else negative
    width, height = width or model.size, height or model.size
    _check_size(model, width, height)
    pictures: list[Image] = []
    room = 8 * 128 * 128 if model.device.type == "cpu" else 4 * 1024 * 1024  # pixels drawn at once
    at_once = max(1, min(len(seeds), room // (width * height)))
    with torch.no_grad():
        text = encode(model, [prompt, negative], clip_skip=clip_skip)
        pipe = _pipeline(model)
        rounds = [seeds[start : start + at_once] for start in range(0, len(seeds), at_once)]
        for number, chunk in enumerate(rounds):
            told = _progress(on_step, number * steps, len(rounds) * steps)
            out = pipe(
                **_conditioning(text, len(chunk)),
                num_inference_steps=steps,
                guidance_scale=guidance,
                width=width,
                height=height,
                generator=[torch.Generator().manual_seed(seed) for seed in chunk],
                callback_on_step_end=told,
                output_type="latent",
            ).images
            if getattr(pipe, "was_cancelled", False):
                return []
            pictures += _decoded(model, out, pipe.image_processor)
    return pictures


def _decoded(model: Model, latents: Tensor, processor: Any) -> list[Image]:
    """Latents to pictures in the VAE's own number format, which the pipelines do not always do."""
    config = model.vae.config
    latents = latents.to(model.vae.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
    decoded = [
        model.vae.decode(one[None], return_dict=False)[0] for one in latents
    ]  # one by one: it is the largest part
    pictures: list[Image] = processor.postprocess(torch.cat(decoded), output_type="pil")
    return pictures


def _progress(on_step: Callable[[int, int], bool] | None, before: int, total: int) -> Callable[..., dict[str, Any]]:
    def told(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None and on_step(before + step + 1, total):
            pipe._interrupt = True
            pipe.was_cancelled = True
        return values

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


def _pipeline(model: Model) -> Any:
    """diffusers' pipeline over the model's own parts, with a scheduler of its own."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    from reparam_diffusion.models.load import quiet

    parts: dict[str, Any] = {
        "vae": model.vae,
        "unet": model.unet,
        "text_encoder": model.text_encoders[0],
        "tokenizer": model.tokenizers[0],
        "scheduler": type(model.scheduler).from_config(model.scheduler.config),
    }
    with quiet():
        if model.family == "sdxl":
            pipe = StableDiffusionXLPipeline(
                **parts, text_encoder_2=model.text_encoders[1], tokenizer_2=model.tokenizers[1], add_watermarker=False
            )
        else:
            pipe = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_size(model: Model, width: int, height: int) -> None:
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


def split_tags(prompt: str) -> tuple[str, list[tuple[str, float, float | None]]]:
    """A prompt without its <lora:name:strength:te_strength> tags, and the tags. A strength left out is 1."""
    tags: list[tuple[str, float, float | None]] = []
    for inside in _TAG.findall(prompt):
        name, *numbers = inside.split(":")
        try:
            values = [finite(number) for number in numbers]
        except ValueError:
            values = [0.0] * 3
        if not name.strip() or len(values) > 2:
            raise UserError(f"<lora:{inside}> cannot be read.", do="Write <lora:name:0.8> or <lora:name:0.8:0.5>.")
        tags.append((name.strip(), values[0] if values else 1.0, values[1] if len(values) > 1 else None))
    text = re.sub(r"\s+", " ", _TAG.sub("", prompt)).strip().rstrip(",").strip()
    return text, tags
