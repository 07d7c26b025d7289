"""Controls made from settings models: the field's type, default, bounds and help say everything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

import gradio as gr
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Values = Mapping[str, Any]
"""Settings by their place, such as "training.steps". Any: each setting has its own type."""


def control_for(field: FieldInfo, name: str, value: Any) -> gr.components.Component:
    """The control of one setting: switch, choice, number or text. Any: the setting's own type."""
    label = field.title or name.replace("_", " ").capitalize()
    about = field.description or ""
    kind = field.annotation
    if kind is bool:
        return gr.Checkbox(value=value, label=label, info=about)
    if get_origin(kind) is Literal:
        return gr.Dropdown(list(get_args(kind)), value=value, label=label, info=about)
    if kind is int:
        return gr.Number(value=value, precision=0, label=label, info=about)
    if kind is float:
        low, high = _bound(field, "ge"), _bound(field, "le", "lt")
        if low == 0 and high == 1 and not 0 < value < 0.01:
            return gr.Slider(0, 0.99 if _bound(field, "lt") else 1, value=value, step=0.01, label=label, info=about)
        return gr.Number(value=value, step=_stride(value), label=label, info=about)
    return gr.Textbox(value=value, label=label, info=about, max_lines=1)


def _stride(value: float) -> float:
    """What one press of a number's arrow adds: a tenth of its first digit's place."""
    return float(10.0 ** (math.floor(math.log10(abs(value))) - 1)) if value else 0.1


def _bound(field: FieldInfo, *names: str) -> float | None:
    """The first of the named bounds that the field has."""
    for constraint in field.metadata:
        for name in names:
            bound = getattr(constraint, name, None)
            if bound is not None:
                return float(bound)
    return None


class Form:
    """Controls by the place of their setting, and what they showed before a person touched them."""

    def __init__(self) -> None:
        self.controls: dict[str, gr.components.Component] = {}

    def add(self, settings: BaseModel, prefix: str, names: Iterable[str] | None = None) -> None:
        """Draw the controls of a settings model here, all of them or those named."""
        fields = type(settings).model_fields
        for name in names or (name for name in fields if name != "method"):
            self.controls[f"{prefix}.{name}"] = control_for(fields[name], name, getattr(settings, name))

    def keep(self, place: str, control: gr.components.Component) -> gr.components.Component:
        """Take in a control that was drawn by hand."""
        self.controls[place] = control
        return control

    def read(self, values: Mapping[gr.components.Component, Any]) -> dict[str, Any]:
        """What gradio hands to a handler, by place. Any: as above."""
        return {place: values[control] for place, control in self.controls.items()}

    def refreshed(self, values: Values, before: Values, after: Values) -> dict[gr.components.Component, Any]:
        """Updates for controls whose default has changed and that nobody has touched. Any: gradio's updates."""
        return {
            self.controls[place]: gr.update(value=new)
            for place, new in after.items()
            if before.get(place) != new and _is_equal(values[place], before.get(place))
        }


def _is_equal(shown: Any, default: Any) -> bool:  # Any: values of any setting
    if isinstance(shown, float) and isinstance(default, int | float):
        return abs(shown - default) <= 1e-9 * max(1.0, abs(default))
    return bool(shown == default)


def nested(values: Values) -> dict[str, Any]:
    """{"training.steps": 4} -> {"training": {"steps": 4}}; empty controls are left to the preset."""
    total: dict[str, Any] = {}
    for place, value in values.items():
        if value is None or value == "":
            continue
        *groups, last = place.split(".")
        spot = total
        for group in groups:
            spot = spot.setdefault(group, {})
        spot[last] = value
    return total
