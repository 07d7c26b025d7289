"""The workspace's caches on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add this command to the program's."""
    app.command()(cache)


def cache(
    *,
    clear: Annotated[bool, typer.Option("--clear", help="Delete the caches; they are made again when needed.")] = False,
    workspace: Annotated[Path, typer.Option(help="Folder for runs, adapters and images.")] = Path("workspace"),
) -> None:
    """Show how large the workspace's caches are (latents, text embeddings, class images), or clear them."""
    from reparam_diffusion.data.disk_cache import MOST_BYTES, cache_sizes
    from reparam_diffusion.jobs.overview import clear_caches
    from reparam_diffusion.training.estimate import plain_bytes

    if clear:
        typer.echo(f"Cleared {plain_bytes(clear_caches(workspace))}.")
        return
    sizes = cache_sizes(workspace)
    for name, size in sizes.items():
        typer.echo(f"{name:16} {plain_bytes(size):>10}")
    typer.echo(f"{'together':16} {plain_bytes(sum(sizes.values())):>10} (at most {plain_bytes(MOST_BYTES)})")
