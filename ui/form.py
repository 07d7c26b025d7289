"""Controls made from settings models: the field's type, default, bounds and help say everything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

import gradio as gr
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from reparam_diffusion.config import DatasetSettings, Rule, parse_set
from reparam_diffusion.errors import UserError
from ui import sets
from ui.literal import literal

Values = Mapping[str, Any]
"""Settings by their place, such as "training.steps". Any: each setting has its own type."""

_WRONG = "wrong"


def control_for(field: FieldInfo, name: str, value: Any) -> gr.components.Component:
    """The control of one setting: switch, choice, number or text. Any: the setting's own type."""
    label = field.title or name.replace("_", " ").capitalize()
    about = literal(field.description or "")
    kind = field.annotation
    if get_args(kind) == (DatasetSettings,):
        return sets.draw_table(value)
    if kind is bool:
        return gr.Checkbox(value=value, label=label, info=about)
    if get_origin(kind) is Literal:
        return gr.Dropdown(list(get_args(kind)), value=value, label=label, info=about)
    if kind is int:
        return gr.Number(value=value, step=1, label=label, info=about)  # no precision: 1.5 is refused, not rounded
    if kind is float:
        # No slider: gradio fails on an emptied one, in every handler, before the setting can be refused.
        is_share = (_bound(field, "ge"), _bound(field, "le", "lt")) == (0, 1) and not 0 < value < 0.01
        return gr.Number(value=value, step=0.01 if is_share else _stride(value), label=label, info=about)
    lines = 3 if get_origin(kind) is list else 1
    about += literal(_HOW_TO_WRITE.get(str(get_args(kind)[:1]), "")) if lines > 1 else ""
    return gr.Textbox(value=as_shown(field, value), label=label, info=about, lines=lines, max_lines=max(lines, 1))


_HOW_TO_WRITE = {
    str((str,)): " One a line.",
    str((Rule,)): " One a line: a glob, the method, its settings, such as: *attn2* lokr factor=4",
}


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


# --- settings as text, and back --------------------------------------------------------------------------------------
def as_shown(field: FieldInfo, value: Any) -> Any:
    """A setting as its control shows it: lists line by line, pairs with commas, sets row by row. Any: any setting."""
    if get_args(field.annotation) == (DatasetSettings,):
        return sets.rows_of(value)
    if isinstance(value, tuple):
        return ", ".join(f"{part:g}" for part in value)
    if isinstance(value, list):
        return "\n".join(_rule_line(part) if isinstance(part, Rule) else str(part) for part in value)
    return value


def as_setting(field: FieldInfo, value: Any, place: str) -> Any:
    """The inverse of `as_shown`. Raises UserError for a rule that cannot be read. Any: any setting."""
    kind = field.annotation
    if get_args(kind) == (DatasetSettings,):
        return sets.sets_of(value)
    if not isinstance(value, str):
        return value
    if get_origin(kind) is tuple:
        return [_number(part) for part in value.split(",")]
    if get_origin(kind) is list:
        lines = [line.strip() for line in value.splitlines() if line.strip()]
        return [_rule_of(line, place) for line in lines] if get_args(kind) == (Rule,) else lines
    if list[str] in get_args(kind):
        parts = [part.strip() for part in value.replace("\n", ",").split(",") if part.strip()]
        return parts if len(parts) > 1 or any(mark in value for mark in "*?[.") else value.strip()
    return value


def _number(text: str) -> Any:  # Any: a number, or the text for pydantic to complain about
    try:
        return float(text)
    except ValueError:
        return text.strip()


def _rule_line(rule: Rule) -> str:
    given = rule.adapter.model_dump(exclude_defaults=True, exclude={"method"})
    words = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()]
    return " ".join([rule.match, rule.adapter.method, *words])


def _rule_of(line: str, place: str) -> dict[str, Any]:
    glob, _, rest = line.partition(" ")
    method, *settings = rest.split()[:1] + rest.split()[1:] or [""]
    if not method:
        raise UserError(f'The rule "{line}" names no method.', do="Write: *attn2* lokr factor=4", place=place)
    return {"match": glob, "adapter": {"method": method, **parse_set(settings)}}


# --- the form --------------------------------------------------------------------------------------------------------
class Form:
    """Controls by the place of their setting, and what they showed before a person touched them."""

    def __init__(self) -> None:
        self.controls: dict[str, gr.components.Component] = {}
        self.fields: dict[str, FieldInfo] = {}

    def add(self, settings: BaseModel, prefix: str, names: Iterable[str] | None = None) -> None:
        """Draw the controls of a settings model here, all of them or those named."""
        fields = type(settings).model_fields
        for name in names or (name for name in fields if name != "method"):
            place = f"{prefix}.{name}"
            self.controls[place] = control_for(fields[name], name, getattr(settings, name))
            self.fields[place] = fields[name]

    def keep(self, place: str, control: gr.components.Component) -> gr.components.Component:
        """Take in a control that was drawn by hand."""
        self.controls[place] = control
        return control

    def read(self, values: Mapping[gr.components.Component, Any]) -> dict[str, Any]:
        """What gradio hands to a handler, by place. Any: as above."""
        return {place: values[control] for place, control in self.controls.items()}

    def settings(self, shown: Values) -> dict[str, Any]:
        """What controls show -> settings. Raises UserError as `as_setting`, and for a control that is empty.

        Another method's own settings are not asked for: nobody sees their controls.
        """
        method, settings = shown.get("method"), {}
        for place, value in shown.items():
            if place.startswith("adapter.") and method and not place.startswith(f"adapter.{method}."):
                continue
            if self._lacks_value(place, value):
                setting = place.replace(f"adapter.{method}.", "adapter.")
                raise UserError(f"{setting}: is empty.", do="Enter a value.", place=setting)
            settings[place] = as_setting(self.fields[place], value, place) if place in self.fields else value
        return settings

    def _lacks_value(self, place: str, value: Any) -> bool:
        """Whether a control is empty where empty means nothing. Any: any setting."""
        if value is None:
            return True
        if not isinstance(value, str) or value.strip():
            return False
        field = self.fields.get(place)
        return place == "model.path" if field is None else field.default not in ("", [])

    def refreshed(self, values: Values, before: Values, after: Values) -> dict[gr.components.Component, Any]:
        """Updates for controls whose default has changed and that nobody has touched. Any: gradio's updates."""
        return {
            self.controls[place]: gr.update(value=new)
            for place, new in after.items()
            if before.get(place) != new and _is_equal(values[place], before.get(place))
        }

    def filled(self, values: Values) -> dict[gr.components.Component, Any]:
        """Updates that make controls show these values, whatever they showed. Any: gradio's updates."""
        return {
            self.controls[place]: gr.update(value=value) for place, value in values.items() if place in self.controls
        }

    def name_setting(self, message: str, place: str, control: str) -> str:
        """An error's message with the setting at its begin ("training.steps must ...") called as its control is."""
        label = getattr(self.controls.get(control), "label", "") or ""
        start = f"{place} "
        return f"{label} {message.removeprefix(start)}" if place and label and message.startswith(start) else message

    def marked(self, place: str, message: str) -> dict[gr.components.Component, Any]:
        """Updates that put a mistake's message at its control. Any: gradio's updates."""
        control = self.controls[place]
        name = _about(control)
        shown = literal(f"⚠ {message}") if name == "info" else f"⚠ {message}"
        return {control: gr.update(**{name: shown}, elem_classes=[_WRONG])}

    def unmarked(self, place: str) -> dict[gr.components.Component, Any]:
        """Updates that take the message off again. Any: gradio's updates."""
        control = self.controls[place]
        name = _about(control)
        return {control: gr.update(**{name: getattr(control, name, "")}, elem_classes=control.elem_classes or [])}


def _about(control: gr.components.Component) -> str:
    """Where a control tells what it is: a table has no line of its own for it."""
    return "label" if isinstance(control, gr.Dataframe) else "info"


def _is_equal(shown: Any, default: Any) -> bool:  # Any: values of any setting
    if isinstance(shown, float) and isinstance(default, int | float):
        return abs(shown - default) <= 1e-9 * max(1.0, abs(default))
    return bool(shown == default)


def nested(values: Values) -> dict[str, Any]:
    """{"training.steps": 4} -> {"training": {"steps": 4}}."""
    total: dict[str, Any] = {}
    for place, value in values.items():
        *groups, last = place.split(".")
        spot = total
        for group in groups:
            spot = spot.setdefault(group, {})
        spot[last] = value
    return total


def by_place(layer: Mapping[str, Any]) -> dict[str, Any]:
    """{"training": {"steps": 4}} -> {"training.steps": 4}, the inverse of `nested`."""
    return {f"{group}.{name}": value for group, values in layer.items() for name, value in values.items()}


def flat(settings: BaseModel, prefix: str = "") -> dict[str, Any]:
    """{"training.steps": 4, …} of settings, as their controls show them."""
    rows: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            rows |= flat(value, f"{prefix}{name}.")
        else:
            rows[f"{prefix}{name}"] = as_shown(field, value)
    return rows
