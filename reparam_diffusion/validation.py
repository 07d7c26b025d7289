"""What is wrong with a setting, in plain English: every complaint of pydantic that our models can cause."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

_WHOLE, _NUMBER, _SWITCH, _GROUP = "a whole number", "a number", "true or false", "a group of settings"
MESSAGES: dict[str, str] = {
    "assertion_error": "is not possible: {error}",
    "bool_parsing": f"must be {_SWITCH}",
    "bool_type": f"must be {_SWITCH}",
    "dict_type": f"must be {_GROUP}",
    "extra_forbidden": "is not a known setting",
    "finite_number": f"must be {_NUMBER}",
    "float_parsing": f"must be {_NUMBER}",
    "float_type": f"must be {_NUMBER}",
    "frozen_instance": "cannot be changed",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": f"must be {_WHOLE}",
    "int_parsing": f"must be {_WHOLE}",
    "int_parsing_size": "is too large",
    "int_type": f"must be {_WHOLE}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be one of {expected}",
    "missing": "must be given",
    "model_attributes_type": f"must be {_GROUP}",
    "model_type": f"must be {_GROUP}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "none_required": "must be empty",
    "string_pattern_mismatch": "is not written correctly",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "string_unicode": "has characters that are not text",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
    "tuple_type": "must be a list",
    "union_tag_invalid": "must be one of {expected_tags}",
    "union_tag_not_found": "must be given",
    "value_error": "is not possible: {error}",
}
"""pydantic's type of an error -> what follows the setting's name. Its words stand for the limits."""
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d+,\d+\s*")
_LONGEST = 60  # characters of a value that are repeated


def explain(error: ValidationError) -> tuple[tuple[int | str, ...], str]:
    """The place of the first mistake, and what to say after the setting's name, without the full stop."""
    first = error.errors(include_url=False)[0]
    return first["loc"], describe(first)


def describe(mistake: Mapping[str, Any]) -> str:
    """One mistake of pydantic's list in plain English, such as "must be at least 1, not 0". Any: pydantic's own."""
    kind, value = mistake["type"], mistake.get("input")
    context = {key: _plain(limit) for key, limit in (mistake.get("ctx") or {}).items()}
    message = MESSAGES[kind].format(**context) if kind in MESSAGES else "cannot be used"
    if isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value) and "number" in message:
        return f'{message}: "{value.strip()}" has a decimal comma, write {value.strip().replace(",", ".")}'
    if kind == "string_type" and isinstance(value, int | float):
        message = "must be text, in quotes"
    if kind == "literal_error" and isinstance(value, str):
        close = difflib.get_close_matches(value, re.findall(r"'([^']*)'", str(context.get("expected", ""))), 1, 0.5)
        if close:
            return f'{message}, not {_shown(value)}. Did you mean "{close[0]}"?'.removesuffix(".")
    if kind in ("value_error", "assertion_error", "missing", "extra_forbidden", "string_too_short"):
        return message
    return f"{message}, not {_shown(value)}" if isinstance(value, str | int | float | bool) else message


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _plain(limit: object) -> object:
    """A limit without a needless ".0"."""
    return f"{limit:g}" if isinstance(limit, float) else limit
