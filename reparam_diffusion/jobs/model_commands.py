"""The command line's work between adapters and whole models: bake, extract. `register` adds it to the program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from reparam_diffusion.files import require_new_file
from reparam_diffusion.jobs.file_commands import (
    Energy,
    Factor,
    Json,
    Numbers,
    Rank,
    Size,
    Title,
    Workspace,
    follow,
    one_of,
    precision_of,
    report_lines,
    source_of,
)
from reparam_diffusion.jobs.signals import cancellable
from reparam_diffusion.printable import say


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (bake, extract):
        app.command()(cancellable(command))


def bake(
    sources: Annotated[list[str], typer.Argument(help="FILE[:strength[:te_strength]], a path or a gallery name.")],
    *,
    out: Annotated[Path, typer.Option(help="A new folder, or a new .safetensors file for a single-file checkpoint.")],
    model: Annotated[str, typer.Option(help="The base model.")] = "starter",
    precision: Numbers = "fp16",
    workspace: Workspace = Path("workspace"),
    as_json: Json = False,
) -> None:
    """Save a model with adapters merged in: a diffusers folder, or a checkpoint in the original names."""
    import torch

    from reparam_diffusion.formats.read import read_adapter
    from reparam_diffusion.gallery.bake import Baked
    from reparam_diffusion.gallery.bake import bake as work
    from reparam_diffusion.models.load import load_model

    chosen = [source_of(text, workspace) for text in sources]
    require_new_file(out, sources=[source.file for source in chosen])
    kind = "checkpoint" if out.suffix == ".safetensors" else "folder"
    base = load_model(model, device="cpu", dtype=torch.float32)
    done = follow(work(base, chosen, out, kind=kind, precision=precision_of(precision)), as_json=as_json)  # type: ignore[arg-type]  # one of two literals
    assert isinstance(done, Baked)
    say(json.dumps(done.to_dict()) if as_json else f"{out}\nThe model {done.loss}.")
    if not as_json and any(read_adapter(source.file).words for source in chosen):
        say("A model has no place for learned words: they are beside it, as -embedding.safetensors files.")


def extract(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model: a folder, a .safetensors file or a hub id.")],
    *,
    base: Annotated[str, typer.Option(help="The model it was tuned from.")],
    out: Annotated[Path, typer.Option(help="The adapter's .safetensors file.")],
    kind: Annotated[str, typer.Option("--as", help="lora, lokr, loha, adalora, diff or exact.")] = "lora",
    rank: Rank = 32,
    energy: Energy = 0.0,
    megabytes: Size = 0.0,
    factor: Factor = 8,
    least: Annotated[float, typer.Option(help="Leave out layers that changed by less than this share.")] = 0.0,
    precision: Numbers = "fp16",
    title: Title = "",
    as_json: Json = False,
) -> None:
    """Make an adapter of what a fine-tuned model has more than its base."""
    import torch

    from reparam_diffusion.gallery.blend.blending import settle_form
    from reparam_diffusion.gallery.blend.result import Report
    from reparam_diffusion.gallery.extract import extract as work
    from reparam_diffusion.models.load import load_model

    one_of(kind, ("exact", "lora", "adalora", "loha", "lokr", "diff"), "form")
    form = settle_form({"kind": kind, "rank": rank, "energy": energy, "megabytes": megabytes, "factor": factor})
    require_new_file(out, sources=[Path(tuned), Path(base)])
    first, second = (load_model(path, device="cpu", dtype=torch.float32) for path in (tuned, base))
    steps = work(first, second, out, form=form, precision=precision_of(precision), least=least, title=title)
    report = follow(steps, as_json=as_json)
    assert isinstance(report, Report)
    told = report.to_dict()
    say(json.dumps(told, indent=1) if as_json else "\n".join(report_lines(report, told)))
