"""The gallery on the command line: look through it, and take in files from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from reparam_diffusion.gallery import catalog

Workspace = Annotated[Path, typer.Option(help="Folder for runs, adapters and pictures.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the program's."""
    app.command()(gallery)
    app.command("import")(take_in)


def gallery(
    query: Annotated[list[str] | None, typer.Argument(help="Words to find in name, trigger, tags or notes.")] = None,
    *,
    sort: Annotated[str, typer.Option(help="newest, oldest, name or largest.")] = "newest",
    base: Annotated[str, typer.Option(help="Only for starter, sd1, sd2, sdxl or unknown.")] = "",
    method: Annotated[str, typer.Option(help="Only of one method, such as loha.")] = "",
    workspace: Workspace = Path("workspace"),
    as_json: Json = False,
) -> None:
    """List the adapters of the gallery, or those that match."""
    from reparam_diffusion.gallery import catalog

    entries = catalog.list_entries(workspace)
    catalog.require_filters(entries, base=base, method=method)
    entries = catalog.keep(entries, base=base, method=method)
    found = catalog.sort(catalog.search(entries, " ".join(query or [])), sort)
    if as_json:
        typer.echo(json.dumps([catalog.row_of(entry) for entry in found], indent=1))
        return
    width = max((len(entry.stem) for entry in found), default=0)
    for entry in found:
        typer.echo(f"{entry.stem:{width}}  {_about(entry)}")
    typer.echo(f"{len(found)} adapter{'' if len(found) == 1 else 's'}.", err=True)


def _about(entry: catalog.Entry) -> str:
    """One adapter in a line, after its stem."""
    from reparam_diffusion.gallery.report import BASES, method_title

    if entry.header is not None and entry.header.problem:
        return entry.header.problem
    parts = [method_title(entry.method), BASES[entry.base] if entry.base != "unknown" else "base not said"]
    parts += [f"{entry.bytes / 1e6:.1f} MB", entry.date, f'"{entry.trigger}"' if entry.trigger else ""]
    parts += [f"strength {entry.strength:g}", entry.name if entry.name != entry.stem else ""]
    return "  ".join(part for part in parts if part)


def take_in(
    files: Annotated[list[Path], typer.Argument(help="Adapters, with their .json and pictures.", exists=True)],
    workspace: Workspace = Path("workspace"),
    as_json: Json = False,
) -> None:
    """Copy adapters from elsewhere into the gallery and say what they hold."""
    from reparam_diffusion.gallery.importing import import_files
    from reparam_diffusion.gallery.report import report_lines
    from reparam_diffusion.gallery.shelf import stem_of

    told = import_files(files, workspace)
    if as_json:
        rows = [{"name": one.name, "file": str(one.file or ""), "why": one.why, "report": one.report} for one in told]
        typer.echo(json.dumps(rows, indent=1))
    for one in () if as_json else told:
        if one.file is None or one.report is None:
            typer.echo(f"{one.name} is left out. {one.why}\n", err=True)
            continue
        is_old = "" if one.is_new else " (it was there already)"
        typer.echo("\n".join([f"Gallery   {stem_of(one.file)}{is_old}", *report_lines(one.report), ""]))
    if not any(one.file for one in told):
        raise typer.Exit(1)
