"""Further sets of pictures as a table: one row a set, one column a setting, a button that adds a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from reparam_diffusion.config import DatasetSettings
from ui.door import QUIET

COLUMNS = DatasetSettings.model_fields
NO_WORD = "-"
"""How a cell says that there is no word; an empty one takes the main set's."""
ABOUT = (
    "Pictures from other folders may join the run. What a row leaves empty is as for your pictures above; "
    f"{NO_WORD} means no word. A folder of pictures of the class, with {NO_WORD} as trigger word and a weight of 0.5, "
    "keeps the class as it was."
)
Row = list[str]


def draw_table(sets: Sequence[DatasetSettings]) -> gr.Dataframe:
    """The table and its button."""
    gr.HTML(f'<p class="quiet">{ABOUT}</p>', padding=False)
    table = gr.Dataframe(
        rows_of(sets),
        headers=[field.title or name.replace("_", " ").capitalize() for name, field in COLUMNS.items()],
        column_count=len(COLUMNS),
        type="array",
        datatype="str",
        label="Further sets",
        column_widths=["240px", "120px", "120px", *["110px"] * (len(COLUMNS) - 3)],
        interactive=True,
        buttons=[],
        elem_id="sets",
    )
    add = gr.Button("Add a set of pictures", size="sm", elem_id="add-set")
    add.click(with_a_row, table, table, **QUIET)
    return table


def with_a_row(rows: list[list[Any]] | None) -> list[list[Any]]:
    """The table with one more empty row. Any: what a browser has in its cells."""
    return [*(rows or []), [""] * len(COLUMNS)]


def rows_of(sets: Sequence[DatasetSettings]) -> list[Row]:
    """Sets as the table shows them."""
    return [[_cell(getattr(one, name)) for name in COLUMNS] for one in sets]


def _cell(value: Any) -> str:  # Any: a setting of any type
    match value:
        case None:
            return ""
        case "":
            return NO_WORD
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
    return str(value)


def sets_of(rows: Sequence[Sequence[Any]] | None) -> list[dict[str, str]]:
    """What the table's rows say, as settings for pydantic to read; empty rows are left out. Any: a browser's cells."""
    sets = []
    for row in rows or []:
        cells = {name: "" if cell is None else str(cell).strip() for name, cell in zip(COLUMNS, row, strict=False)}
        if any(cells.values()):
            given = {name: "" if text == NO_WORD else text for name, text in cells.items() if text}
            sets.append({"images": "", **given})
    return sets
