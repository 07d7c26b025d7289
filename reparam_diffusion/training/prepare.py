"""Everything before the first step: pictures, captions, class pictures, latents and text embeddings."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reparam_diffusion.config import TrainConfig
from reparam_diffusion.data.cache import TextCache
from reparam_diffusion.data.captions import caption_for, fill
from reparam_diffusion.data.check import look_over, note_unused_masks, some_of
from reparam_diffusion.data.dataset import Dataset, Item, Part, build_dataset
from reparam_diffusion.data.disk_cache import bound_cache, mark_used
from reparam_diffusion.data.images import Picture, find_pictures
from reparam_diffusion.data.masks import Mask, read_mask
from reparam_diffusion.data.sets import Found, Source, find_all, sources_of
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Event, Prepared, Warned
from reparam_diffusion.files import beside, write_whole
from reparam_diffusion.models.encode import encode, is_too_long
from reparam_diffusion.models.habits import unseen_backgrounds
from reparam_diffusion.models.load import Model
from reparam_diffusion.models.room import is_out_of_memory
from reparam_diffusion.models.sample import draw
from reparam_diffusion.training.class_images import class_sizes, held_out_of
from reparam_diffusion.training.encoding import Latents, encoding_tile, fingerprint

DRAWN_AT_ONCE = 8


@dataclass
class Material:
    """What the loop draws from."""

    dataset: Dataset
    latents: Latents
    texts: TextCache
    class_items: tuple[Item, ...] = ()
    masks: Mapping[Item, Tensor] = field(default_factory=dict)
    """How much the loss counts at each latent (height, width) of an item, unmirrored; all of it where there is none."""


def prepare(
    model: Model, config: TrainConfig, folder: Path, *, text_is_live: bool, tile: int | None = None, ranks: int = 1
) -> Generator[Event, None, Material]:
    """Yields Prepared and Warned events and returns the Material (`material = yield from prepare(…)`).

    `tile` is the one that pictures of this run have been encoded in; None leaves it to the memory. `ranks` is the
    number of processes.
    """
    data = config.data
    if not data.images:
        raise UserError("No pictures were given.", do="Set data.images to a folder of pictures.", place="data.images")
    found = find_all(data, least_side=max(32, model.size // 4))
    captions = [captions_of(model, one.source, one.pictures) for one in found]
    resolution = data.resolution or model.size
    for one, theirs in zip(found, captions, strict=True):
        yield from _notes(model, one, theirs, resolution, is_one_of_several=len(found) > 1)
    for caption in dict.fromkeys(caption for theirs in captions for caption in theirs):
        if is_too_long(model, caption):
            yield Warned(f'This caption is longer than the model reads and is cut: "{caption[:60]}…"')
    dataset = build_dataset(
        [_part(one, theirs) for one, theirs in zip(found, captions, strict=True)],
        resolution=resolution,
        step=model.size_step,
        buckets=data.buckets,
        held_out=held_out_of(data, sum(len(one.pictures) for one in found)),
        seed=config.training.seed,
    )
    masks = {
        item: read_mask(item.mask, item.picture, item.size, pixels_per_latent=model.pixels_per_latent)
        for item in (*dataset.train, *dataset.held_out)
        if item.mask is not None
    }
    fix_pictures(folder, found)
    cache, begun = cache_folder(folder), time.time()
    class_items: tuple[Item, ...] = ()
    if config.prior.weight:
        class_items = yield from _class_pictures(model, config, cache / "class")
    encoders = "".join(fingerprint(encoder) for encoder in model.text_encoders) + str(model.dtype)
    if tile is None:
        tile = encoding_tile(model, [item.size for item in (*dataset.train, *dataset.held_out)])
        if tile:
            yield Warned(f"Pictures are encoded in tiles of {tile} pixels: the memory is not enough for whole ones.")
    material = Material(
        dataset,
        Latents(model, cache / "latents", tile=tile),
        TextCache(cache / "texts", encoders, clip_skip=config.model.clip_skip),
        class_items,
        masks,
    )
    if len(dataset.held_out) < data.held_out:
        yield Warned(f"{len(dataset.held_out)} pictures are held out, not {data.held_out}: at most a quarter of them.")
    shown = class_sizes(dataset, config.training, count=len(class_items), ranks=ranks)
    yield from _encode_pictures(model, material, [at_size(class_items[number], size) for number, size in shown])
    if material.latents.trouble:
        yield Warned(material.latents.trouble)
    if not text_is_live:
        yield from _encode_texts(model, material, config.model.clip_skip)
    bound_cache(cache, since=begun)
    return material


def _notes(
    model: Model, found: Found, captions: Sequence[str], resolution: int, *, is_one_of_several: bool
) -> Iterator[Event]:
    """What a person should read about one set."""
    source, habits = found.source, model.habits
    notes = look_over(
        found.pictures,
        found.refused,
        captions,
        trigger=source.trigger,
        resolution=resolution,
        expected=f"{source.class_word} {habits.caption} {habits.class_prompt}",
    )
    if source.masks and (whole := [p for p, mask in zip(found.pictures, found.masks, strict=True) if mask is None]):
        notes.append(f"Nothing is see-through in {some_of(whole)}: all of it is learned.")
    if note := note_unused_masks(found.pictures, source.masks):
        notes.append(note)
    for note in notes:
        yield Warned(f"{source.name}: {note}" if is_one_of_several else note)


def _part(found: Found, captions: Sequence[str]) -> Part:
    source = found.source
    return Part(found.pictures, captions, found.masks, source.repeats, source.flip, source.weight)


def told_sets(config: TrainConfig, material: Material) -> list[str]:
    """Each set of several in words; nothing where there is one."""
    sources = sources_of(config.data)
    counts = Counter(item.part for item in material.dataset.train)
    told = []
    for number, source in enumerate(sources):
        words = f"{source.name}: {counts[number]} picture{'' if counts[number] == 1 else 's'}"
        words += f" × {source.repeats}" if source.repeats > 1 else ""
        told.append(words + (f", weight {source.weight:g}" if source.weight != 1 else ""))
    return told if len(sources) > 1 else []


def captions_of(model: Model, source: Source, pictures: Sequence[Picture]) -> list[str]:
    """Each picture's own caption, else the set's template with its trigger and class word."""
    habits = model.habits
    template = source.template or (habits.caption if source.kind == "subject" else habits.style_caption)
    return [
        caption_for(picture, template=template, trigger=source.trigger, class_word=source.class_word)
        for picture in pictures
    ]


def preview_prompts(model: Model, config: TrainConfig, captions: Sequence[str], *, count: int = 2) -> list[str]:
    """The prompts to preview: the config's, else the model's own, on backgrounds that no caption names.

    Sets with a trigger word of their own are previewed too.
    """
    habits = model.habits
    backgrounds = unseen_backgrounds(habits, list(captions), count=count) or [""]
    main, *further = sources_of(config.data)
    filled = [
        fill(template, trigger=source.trigger, class_word=source.class_word, background=background)
        for source in (main, *(one for one in further if one.trigger))
        for template in config.output.sample_prompts
        or (habits.preview if source.kind == "subject" else habits.style_preview)
        for background in (backgrounds if "{background}" in template else [""])
    ]
    return list(dict.fromkeys(filled))


def cache_folder(folder: Path) -> Path:
    """The workspace's cache for a run inside one, else the run's own."""
    return (folder.parent.parent if folder.parent.name == "runs" else folder) / ".cache"


def fix_pictures(folder: Path, found: Sequence[Found]) -> None:
    """Write the pictures' and masks' hashes at the first Start; a resume with others is an error."""
    file = folder / "pictures.json"
    every = [pair for one in found for pair in zip(one.pictures, one.masks, strict=True)]
    now = {
        f"{number} {picture.path.name}": f"{picture.hash} {_mask_told(mask)}{picture.caption or ''}"
        for number, (picture, mask) in enumerate(every, 1)
    }
    if not file.is_file():
        write_whole(file, json.dumps(now, indent=1))
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise UserError(
            "The pictures, their captions or their masks have changed since this run was started.",
            f"Different now: {', '.join(name.partition(' ')[2] for name in changed[:5])}.",
            "Put them back as they were, or start a new run.",
        )


def _mask_told(mask: Mask | None) -> str:
    """A mask in pictures.json; one in the picture itself is told by the picture's hash."""
    return "" if mask is None or mask.is_alpha else f"mask {mask.hash} "


def about_class(model: Model, config: TrainConfig) -> dict[str, Any]:
    """What a set of class pictures shows and how it is drawn, in JSON's types. Any: text, numbers, a list."""
    prior, habits = config.prior, model.habits
    template = prior.prompt or habits.class_prompt
    backgrounds = habits.backgrounds if "{background}" in template else [""]
    word = config.data.class_word or "thing"
    path = Path(config.model.path).expanduser()
    return {
        "model": str(path.resolve()) if path.exists() else config.model.path,
        "prompts": [fill(template, trigger="", class_word=word, background=name) for name in backgrounds or [""]],
        "steps": prior.steps or habits.steps,
        "size": model.size,
    } | ({"base_8bit": True} if config.model.base_8bit else {})


def class_pictures_left(model: Model, config: TrainConfig, workspace: Path) -> int:
    """How many class pictures a run would have to draw; `model` may be an outline."""
    if not config.prior.weight:
        return 0
    about = about_class(model, config)
    places = [file.parent for file in (workspace / ".cache" / "class").glob("*/about.json") if _json(file) == about]
    wanted = [f"{number:04d}.png" for number in range(config.prior.images)]
    return min((sum(not (place / name).is_file() for name in wanted) for place in places), default=len(wanted))


def _json(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _class_pictures(model: Model, config: TrainConfig, folder: Path) -> Generator[Event, None, tuple[Item, ...]]:
    """Pictures of the class from the untouched base model, drawn once for these settings."""
    prior, about = config.prior, about_class(model, config)
    prompts, steps = about["prompts"], about["steps"]
    key = repr((fingerprint(model.unet), fingerprint(model.text_encoders[0]), prompts, steps, model.size))
    place = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    mark_used(place)
    if _json(place / "about.json") != about:  # each of several processes comes by here
        write_whole(place / "about.json", json.dumps(about, indent=1))
    for start in range(0, prior.images, DRAWN_AT_ONCE):
        numbers = [
            n for n in range(start, min(start + DRAWN_AT_ONCE, prior.images)) if not (place / f"{n:04d}.png").is_file()
        ]
        yield Prepared("class pictures", start, prior.images)
        for prompt in dict.fromkeys(prompts[n % len(prompts)] for n in numbers):
            seeds = [n for n in numbers if prompts[n % len(prompts)] == prompt]
            for n, image in zip(seeds, draw(model, prompt, seeds=seeds, steps=steps), strict=True):
                with beside(place / f"{n:04d}.png") as hidden:
                    image.save(hidden, "PNG")
    yield Prepared("class pictures", prior.images, prior.images)
    pictures, _ = find_pictures([place / f"{n:04d}.png" for n in range(prior.images)], least_side=1)
    size = (model.size, model.size)
    return tuple(
        Item(picture, prompts[int(picture.path.stem) % len(prompts)], size, flipped_ok=False) for picture in pictures
    )


def _encode_pictures(model: Model, material: Material, class_items: Sequence[Item]) -> Iterator[Event]:
    """Fill the latent cache: every item, mirrored too where that is allowed, and the class images as they are shown."""
    items = [*material.dataset.train, *material.dataset.held_out]
    work = [(item, False) for item in items] + [(item, True) for item in items if item.flipped_ok]
    work += [(item, False) for item in class_items]
    latents, done = material.latents, 0
    with model.using(model.vae):
        while done < len(work):
            if done % 8 == 0:
                yield Prepared("latents", done, len(work))
            try:
                latents.get(*work[done])
                done += 1
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise  # else outside the handler, where nothing holds what was being computed
            tile, done = latents.shrink([item.size for item, _ in work]), 0  # all of them in the same tiles
            yield Warned(f"The memory ran out: pictures are encoded in tiles of {tile} pixels now.")
    yield Prepared("latents", len(work), len(work))


def at_size(item: Item, size: tuple[int, int]) -> Item:
    """The same picture trained at another size, so that class pictures share a batch with any bucket."""
    return Item(item.picture, item.caption, size, item.flipped_ok)


def _encode_texts(model: Model, material: Material, clip_skip: int) -> Iterator[Event]:
    """Embeddings of every caption that can come, the empty one included."""
    items = [*material.dataset.train, *material.dataset.held_out, *material.class_items]
    captions = list(dict.fromkeys(["", *(item.caption for item in items)]))
    with torch.no_grad(), model.using(*model.text_encoders):
        for done, caption in enumerate(captions):
            if done % 8 == 0:
                yield Prepared("captions", done, len(captions))
            material.texts.get(caption, text_encoder(model, clip_skip))
    yield Prepared("captions", len(captions), len(captions))


def text_encoder(model: Model, clip_skip: int) -> Callable[[str], dict[str, Tensor]]:
    """A caption -> "hidden" (1, tokens, width) and, for SDXL, "pooled" (1, width)."""

    def encode_caption(caption: str) -> dict[str, Tensor]:
        text = encode(model, [caption], clip_skip=clip_skip)
        return {"hidden": text.hidden} | ({} if text.pooled is None else {"pooled": text.pooled})

    return encode_caption
