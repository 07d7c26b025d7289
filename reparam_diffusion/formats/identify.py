"""What a file says about itself, or lets one guess: the base model's family, the trigger words, what it is instead."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from reparam_diffusion.formats.families import FAMILY_TITLES, UNKNOWN, families_by_layers, family_in_header, layer_sides
from reparam_diffusion.formats.keys import short


def guess_family(
    metadata: Mapping[str, str], sites: Mapping[str, Mapping[str, Tensor]], keys: Iterable[str] = ()
) -> str:
    """The base model's family, a key of FAMILY_TITLES, or "unknown". Where header and shapes differ, the shapes win."""
    told = family_in_header(metadata)
    possible = families_by_layers(sites, keys)
    if told != UNKNOWN and (not possible or told in possible):
        return told
    if possible:
        return possible[0]
    if any(_is_sdxl_name(site) for site in sites):
        return "sdxl"
    widths = [layer_sides(leaves)[1] for site, leaves in sites.items() if re.search(r"attn2_to_[kv]$", site)]
    return next((_WIDTHS[width] for width in widths if width in _WIDTHS), UNKNOWN)


def family_conflict(
    metadata: Mapping[str, str], sites: Mapping[str, Mapping[str, Tensor]], keys: Iterable[str] = ()
) -> str:
    """A sentence where the header names another family than the layers show; empty where they agree."""
    told = family_in_header(metadata)
    possible = families_by_layers(sites, keys)
    if told == UNKNOWN or not possible or told in possible:
        return ""
    return (
        f"Its header says {FAMILY_TITLES[told]}, but its layers are those of {FAMILY_TITLES[possible[0]]}. "
        "The layers decide."
    )


def _is_sdxl_name(site: str) -> bool:
    """Names of SDXL in a file of which no shape decides, such as one for a small model."""
    blocks = re.search(r"transformer_blocks_(\d+)_", site)
    return site.startswith(("te2.encoder_layers_", "unet.add_embedding")) or (
        blocks is not None and int(blocks[1]) >= 2
    )


_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_LONGEST_TRIGGER = 500  # characters


def guess_trigger(metadata: Mapping[str, str]) -> str:
    """The words that call the adapter, as its header has them; empty when it says nothing."""
    for key in ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words"):
        if words := metadata.get(key, "").strip():
            return words[:_LONGEST_TRIGGER]
    for folder in _object(metadata, "ss_dataset_dirs"):
        if found := re.fullmatch(r"\d+_(.+)", folder):  # kohya: "<repeats>_<trigger> <class>"
            return found[1].strip()
    return _tag_of_all(metadata)


def count_pictures(metadata: Mapping[str, str]) -> int:
    """How many pictures an adapter was trained on, each counted once; 0 where its header does not say."""
    folders = _object(metadata, "ss_dataset_dirs").values()
    counts = [folder.get("img_count") for folder in folders if isinstance(folder, dict)]
    return sum(count for count in counts if isinstance(count, int))


def _tag_of_all(metadata: Mapping[str, str]) -> str:
    """The tag that every training picture has, as people who train on tags put their trigger; empty without one."""
    pictures = count_pictures(metadata)
    counts: Counter[str] = Counter()
    for tags in _object(metadata, "ss_tag_frequency").values():
        if isinstance(tags, dict):
            counts.update({str(tag).strip(): count for tag, count in tags.items() if isinstance(count, int)})
    tag, count = counts.most_common(1)[0] if counts else ("", 0)
    return tag if pictures > 1 and count >= pictures else ""


def _object(metadata: Mapping[str, str], key: str) -> dict[str, object]:
    """A JSON object under a key of the header; empty where a foreign header has something else there."""
    try:
        found = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def what_instead(keys: Iterable[str]) -> tuple[str, str]:
    """What a file without any adapter tensor is, and what to do, for a person."""
    names = list(keys)
    if not names:
        return "It has no tensors at all.", "Download or copy it again."
    if any(name.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")) for name in names):
        return "It is a full model, not an adapter.", "Choose it as the base model."
    if {"emb_params", "clip_l", "clip_g"} & set(names) or (len(names) <= 2 and all("." not in name for name in names)):
        return "It is a textual inversion embedding, not an adapter.", "Choose a LoRA, LoHa, LoKr or OFT file."
    if any(name.startswith(("down_blocks.", "up_blocks.", "encoder.down_blocks.")) for name in names):
        return "It holds a model's own weights, not an adapter.", "Choose its folder as the base model."
    shown = ", ".join(short(name, 80) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"Its tensors are called {shown}; no adapter format has such names.", "Choose an adapter file."
