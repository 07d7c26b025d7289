"""The command line's looks at adapter files: doctor, compare. `register` adds it to the program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from reparam_diffusion.files import beside, require_new_file, telling
from reparam_diffusion.jobs.file_commands import Base, Json, Numbers, Workspace, follow, path_of, precision_of
from reparam_diffusion.jobs.signals import cancellable
from reparam_diffusion.printable import say


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (doctor, compare):
        app.command()(cancellable(command))


def doctor(
    file: Annotated[str, typer.Argument(help="A path or a gallery name.")],
    *,
    model: Base = "",
    repair: Annotated[Path | None, typer.Option(help="Write the file anew here, without what is broken.")] = None,
    precision: Numbers = "fp16",
    workspace: Workspace = Path("workspace"),
    as_json: Json = False,
) -> None:
    """Say what is wrong with an adapter file, which programs open it rightly, and mend what can be mended."""
    from reparam_diffusion.gallery.doctor import diagnose, diagnosis_lines
    from reparam_diffusion.gallery.doctor import repair as mend
    from reparam_diffusion.models.load import load_model

    path = path_of(file, workspace)
    if repair is not None:
        require_new_file(repair, sources=[path])
    base = load_model(model, device="cpu") if model else None
    found = diagnose(path, base)
    say(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(diagnosis_lines(found)))
    if repair is not None:
        follow(mend(path, repair, model=base, precision=precision_of(precision)), as_json=as_json)
        if not as_json:
            say(f"Repaired: {repair}")


def compare(
    first: Annotated[str, typer.Argument(help="A path or a gallery name.")],
    second: Annotated[str, typer.Argument(help="Another one, for the same base model.")],
    *,
    model: Base = "",
    picture: Annotated[Path | None, typer.Option(help="Write a heat map here, as PNG.")] = None,
    workspace: Workspace = Path("workspace"),
    as_json: Json = False,
) -> None:
    """Show where two adapters pull against each other, layer by layer."""
    from reparam_diffusion.gallery.collide import Collision, collide, collision_lines, heat_map

    paths = path_of(first, workspace), path_of(second, workspace)
    if picture is not None:
        require_new_file(picture, sources=paths)
    steps = collide(*paths, model=model or None)
    found = follow(steps, as_json=as_json)
    assert isinstance(found, Collision)
    say(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(collision_lines(found)))
    if picture is not None:
        with telling(picture), beside(picture) as hidden:
            heat_map(found).save(hidden, "PNG")
        if not as_json:
            say(f"Heat map: {picture}")
