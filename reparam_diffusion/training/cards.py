"""Settings by the memory of a graphics card: partial layers over any preset, and which of them makes a run fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from reparam_diffusion.config import PRESETS, TrainConfig, read_settings, settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.models.room import KEPT_FREE, free_on, memory_of

FOLDER = PRESETS / "cards"


@cache
def cards() -> tuple[int, ...]:
    """The cards that there are settings for, by their memory in GB, the smallest first."""
    return tuple(sorted(int(file.stem) for file in FOLDER.glob("*.toml")))


def card_layer(card: int | str) -> dict[str, Any]:
    """A card's settings, to settle after a preset's; "" has none. Raises UserError. Any: nested settings."""
    if str(card) == "":
        return {}
    text = str(card).lower().removesuffix("gb").strip()
    fitting = [one for one in cards() if text.isdecimal() and one <= int(text)]
    if not fitting:
        known = ", ".join(str(one) for one in cards())
        raise UserError(
            f'There are no settings for a card of "{card}".',
            f"There are some for {known} GB.",
            f"Write its memory in GB; a card below {cards()[0]} GB is too small for SDXL.",
        )
    number = fitting[-1]  # a card in between has the next smaller one's
    layer = read_settings(FOLDER / f"{number}.toml")
    return {group: values for group, values in layer.items() if group not in ("title", "about")}


def with_card(config: TrainConfig, card: int) -> TrainConfig:
    """The same run with a card's settings."""
    return settle(config.model_dump(mode="json"), card_layer(card))


def room_on(device: torch.device) -> int:
    """What a run may take, in bytes: a card's memory less what the desktop has, or what the computer has free."""
    return memory_of(device) - KEPT_FREE if device.type == "cuda" else free_on(device)


@dataclass(frozen=True)
class Advice:
    """What to do about a run that is too large. `unknown` is a run whose memory must be known to say more."""

    sentence: str
    unknown: TrainConfig | None = None


def advise(
    config: TrainConfig, peak: int, *, room: int, memory: int, peak_of: Callable[[TrainConfig], int | None]
) -> Advice:
    """What helps a run that needs `peak` bytes where there are `room`; nothing is said where it fits.

    Tried are the settings of cards up to the device's whole `memory`, the largest first. `peak_of` gives what a run
    needs in bytes, None where that is not known yet.
    """
    if peak <= room:
        return Advice("")
    what = f"It does not fit: about {room / 1e9:.1f} GB are free for it."
    for card in reversed([one for one in cards() if one * 2**30 <= 1.1 * memory] or cards()[:1]):
        less = with_card(config, card)
        needs = peak_of(less)
        if needs is None:
            return Advice(f"{what} What would make it fit is being found out.", less)
        if needs <= room:
            return Advice(
                f"{what} Choose the {card} GB card's settings (--card {card} on the command line): "
                f"then it needs about {needs / 1e9:.1f} GB."
            )
    return Advice(f"{what} No card's settings are enough: choose a smaller data.resolution, or fewer layers.")
