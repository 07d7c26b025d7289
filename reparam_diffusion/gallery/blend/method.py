"""What a blend method is: one function from what each file does to a layer to what the blend does to it.

    def blend(layers: Sequence[Layer], options: Options) -> Change | Adapter

It gets every file of the blend, in order, also those that leave this layer alone, and adds what it needs as Options.
`register` makes it known; the command line, the forms and the laws pick it up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.changes import change_of
from reparam_diffusion.maths.change import Change, nothing, total

Made = Change | Adapter
"""What a layer of a blend is: a change in any form, or an adapter that says it better."""


class Options(BaseModel):
    """Settings of a method; a subclass documents every field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True)
class Layer:
    """What one file does to one layer: its adapter there, if any, and how strongly it is wanted."""

    site: str
    module: nn.Module
    source: str
    """Names the file, for random draws: its hash."""
    strength: float
    adapter: Adapter | None

    @cached_property
    def change(self) -> Change:
        """Δ at strength 1; nothing where the file leaves the layer alone."""
        if self.adapter is None:
            return nothing(tuple(self.module.weight.shape))  # type: ignore[arg-type]  # a carrier's weight
        return change_of(self.adapter, self.module)

    @cached_property
    def wanted(self) -> Change:
        """s · Δ."""
        return self.change.scaled(self.strength)


@dataclass(frozen=True)
class BlendMethod:
    """A registered method."""

    name: str
    title: str
    summary: str
    paper: str
    """Where it is from; empty for plain arithmetic."""
    blend: Callable[[Sequence[Layer], Any], Made]
    """Any: each method takes its own Options."""
    options: type[Options] = Options
    lossless: Callable[[Sequence[Layer]], Made] | None = None
    """The change that the method cuts down, against which its loss is measured; None where it cuts nothing off."""
    fewest: int = 1
    most: int | None = None

    def check(self, files: int) -> None:
        """Raise UserError for a number of files that the method has no meaning for."""
        if files < self.fewest or (self.most is not None and files > self.most):
            number = str(self.fewest) if self.most == self.fewest else f"at least {self.fewest}"
            raise UserError(f"{self.title} takes {number} adapters.", f"There are {files}.", place="method")


def add_changes(layers: Sequence[Layer]) -> Change:
    """Σ sⱼ·Δⱼ, nothing cut off."""
    return total([layer.wanted for layer in layers])


BLENDS: dict[str, BlendMethod] = {}


def register(method: BlendMethod) -> BlendMethod:
    """Make a method known. Raises ValueError for a name that is taken."""
    if method.name in BLENDS:
        raise ValueError(f"the blend {method.name} is registered already")
    BLENDS[method.name] = method
    return method
