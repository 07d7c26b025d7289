"""The gallery for other programs: named endpoints that gradio_client calls, with plain values in and out."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import gradio as gr

from reparam_diffusion.gallery import catalog, shelf, waste
from reparam_diffusion.gallery.importing import Imported, import_files
from reparam_diffusion.gallery.report import report_of
from ui.door import guarded

Row = dict[str, Any]
"""A JSON object. Any: JSON's own values."""


def add_gallery_api(workspace: Path) -> None:
    """Add the endpoints to the page that is being built."""

    def gallery(query: str = "", sort: str = "newest", base: str = "", method: str = "", limit: int = 100) -> list[Row]:
        """The adapters that have all words of the query; sort is newest, oldest, name or largest."""
        entries = catalog.list_entries(workspace)
        catalog.require_filters(entries, base=base, method=method)
        found = catalog.keep(entries, base=base, method=method)
        return [catalog.row_of(entry) for entry in catalog.sort(catalog.search(found, query), sort)[: max(0, limit)]]

    def gallery_details(stem: str) -> Row:
        """Everything about one adapter: its row of the list, its notes, and its inspect report."""
        file = shelf.at(stem, workspace)
        return {**row_at(file), "notes": shelf.shelved_at(file).facts, "report": report_of(file)}

    def gallery_edit(stem: str, changes: dict[str, Any]) -> Row:
        """Change notes: name, activation text, negative text, preferred weight, tags, description or notes."""
        return row_at(shelf.edit(stem, workspace, changes).file)

    def gallery_bin(stem: str) -> str:
        """Move an adapter to the bin; gives the key to restore it with."""
        return waste.put(stem, workspace, now=datetime.datetime.now())

    def gallery_binned() -> list[Row]:
        """What is in the bin, the last deleted first."""
        return [{"key": one.key, "name": one.shelved.name, "deleted": one.when} for one in waste.list_bin(workspace)]

    def gallery_restore(key: str) -> Row:
        """Put something from the bin back on the shelf."""
        return row_at(waste.restore(key, workspace))

    def gallery_import(files: list[str] | None) -> list[Row]:
        return [imported_row(one) for one in import_files([Path(file) for file in files or []], workspace)]

    def row_at(file: Path) -> Row:
        return catalog.row_of(catalog.entry_at(file, workspace))

    for endpoint in (gallery, gallery_details, gallery_edit, gallery_bin, gallery_binned, gallery_restore):
        told = guarded(endpoint, workspace, plain=True)
        gr.api(told, api_name=endpoint.__name__, api_description=endpoint.__doc__)
    with gr.Row(visible=False):  # uploads need a component, which checks that they are uploads
        files, became = gr.File(file_count="multiple", label="Files"), gr.JSON(label="What became of each")
    files.upload(guarded(gallery_import, workspace, plain=True), files, became, api_name="gallery_import")


def imported_row(one: Imported) -> Row:
    """What became of one file, as plain values."""
    stem = shelf.stem_of(one.file) if one.file else ""
    return {"name": one.name, "stem": stem, "why": one.why, "is_new": one.is_new, "report": one.report}
