"""The command line's work on adapter files: blend, convert, resize, export. `register` adds it to the program."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reparam_diffusion.errors import UserError, unknown_name
from reparam_diffusion.files import beside, folder_beside, require_new_file, require_writable, telling
from reparam_diffusion.jobs.signals import cancellable
from reparam_diffusion.printable import say

if TYPE_CHECKING:
    from reparam_diffusion.gallery.blend.forms import Form
    from reparam_diffusion.gallery.blend.result import Report
    from reparam_diffusion.gallery.blend.sources import Source

Sources = Annotated[
    list[str] | None,
    typer.Argument(help="FILE[:strength[:te_strength[:block=factor,…]]], a path or a gallery name."),
]
Workspace = Annotated[Path, typer.Option(help="Folder for runs, adapters and pictures.")]
Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON, every layer included.")]
Base = Annotated[str, typer.Option("--model", help="The base model; needed for OFT, DoRA, (IA)³, GLoRA and pictures.")]
Out = Annotated[Path | None, typer.Option(help="Where to write it; the gallery by default.")]
Numbers = Annotated[str, typer.Option("--precision", help="fp32, fp16 or bf16.")]
As = Annotated[str, typer.Option("--as", help="exact, lora, adalora, loha, lokr, oft or diff.")]
Rank = Annotated[int, typer.Option(min=0, help="Most ranks a layer may have; 0 sets no limit.")]
Energy = Annotated[float, typer.Option(help="Share of each layer's energy to keep, such as 0.95.")]
Size = Annotated[float, typer.Option("--megabytes", help="The file's size; ranks go where they keep the most.")]
Factor = Annotated[int, typer.Option(help="LoKr: size of the small factor.")]
Block = Annotated[int, typer.Option(help="OFT: size of the rotated blocks.")]
Title = Annotated[str, typer.Option(help="The result's name.")]
Picture = Annotated[str, typer.Option(help="Compare the lossless change and the file on this prompt, same seeds.")]

TELL_EVERY = 0.5  # seconds


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (blend, convert, resize, export):
        app.command()(cancellable(command))


def blend(
    sources: Sources = None,
    *,
    method: Annotated[str, typer.Option(help="How; `blend --list` shows all.")] = "sum",
    settings: Annotated[list[str] | None, typer.Option("--set", help="A method's option: key=value.")] = None,
    out: Out = None,
    kind: As = "exact",
    rank: Rank = 0,
    energy: Energy = 0.0,
    megabytes: Size = 0.0,
    factor: Factor = 8,
    block_size: Block = 8,
    model: Base = "",
    precision: Numbers = "fp16",
    title: Title = "",
    picture: Picture = "",
    show_list: Annotated[bool, typer.Option("--list", help="List the methods and their options.")] = False,
    workspace: Workspace = Path("workspace"),
    as_json: Json = False,
) -> None:
    """Blend adapters of any methods for one base model into one file."""
    if show_list:
        _list_methods()
        return
    if not sources:
        raise UserError("No adapters were given.", do="Name files, such as teddy.safetensors:0.8 flat-style:0.6.")
    from reparam_diffusion.gallery.blend.blending import settle_form, settle_options

    chosen = [source_of(text, workspace) for text in sources]
    sizes = {"rank": rank, "energy": energy, "megabytes": megabytes, "factor": factor, "block_size": block_size}
    form = settle_form({"kind": kind, **sizes})
    options = settle_options(method, _values(settings or []))
    name = title or "-".join(source.file.stem for source in chosen)[:48]
    _make(
        chosen, form, out, method=method, options=options, model=model, precision=precision, title=name,
        picture=picture, workspace=workspace, as_json=as_json,
    )  # fmt: skip


def convert(
    source: Annotated[str, typer.Argument(help="FILE[:strength], a path or a gallery name.")],
    *,
    kind: As = "exact",
    rank: Rank = 0,
    energy: Energy = 0.0,
    megabytes: Size = 0.0,
    factor: Factor = 8,
    block_size: Block = 8,
    angle: Annotated[
        bool, typer.Option(help="OFT: let the strength turn the rotation less or further, not scale its change.")
    ] = False,
    out: Out = None,
    model: Base = "",
    precision: Numbers = "fp16",
    title: Title = "",
    picture: Picture = "",
    workspace: Workspace = Path("workspace"),
    as_json: Json = False,
) -> None:
    """Write an adapter as another method that can hold it, and say what that loses."""
    from reparam_diffusion.gallery.blend.blending import settle_form

    chosen = source_of(source, workspace)
    sizes = {"rank": rank, "energy": energy, "megabytes": megabytes, "factor": factor, "block_size": block_size}
    form = settle_form({"kind": kind, **sizes})
    _make(
        [chosen], form, out, method="rotations" if angle else "sum", model=model, precision=precision,
        title=title or f"{chosen.file.stem}-{kind}", picture=picture, workspace=workspace, as_json=as_json,
    )  # fmt: skip


def resize(
    source: Annotated[str, typer.Argument(help="FILE[:strength], a path or a gallery name.")],
    *,
    rank: Rank = 0,
    sv_ratio: Annotated[float, typer.Option(help="Keep singular values of at least the largest over this.")] = 0.0,
    sv_fro: Annotated[float, typer.Option(help="Share of each layer's norm to keep.")] = 0.0,
    sv_cumulative: Annotated[float, typer.Option(help="Share of each layer's sum of singular values to keep.")] = 0.0,
    energy: Energy = 0.0,
    megabytes: Size = 0.0,
    out: Out = None,
    model: Base = "",
    precision: Numbers = "fp16",
    title: Title = "",
    picture: Picture = "",
    workspace: Workspace = Path("workspace"),
    as_json: Json = False,
) -> None:
    """Make a LoRA smaller: the nearest one of lower rank, by any of the usual rules."""
    from reparam_diffusion.gallery.blend.blending import settle_form

    chosen = source_of(source, workspace)
    rules = {"sv_ratio": sv_ratio, "sv_fro": sv_fro, "sv_cumulative": sv_cumulative, "energy": energy}
    form = settle_form({"kind": "lora", "rank": rank, "megabytes": megabytes} | rules)
    _make(
        [chosen], form, out, model=model, precision=precision, title=title or f"{chosen.file.stem}-resized",
        picture=picture, workspace=workspace, as_json=as_json,
    )  # fmt: skip


def export(
    source: Annotated[str, typer.Argument(help="A path or a gallery name.")],
    *,
    out: Annotated[Path, typer.Option(help="A .safetensors file; for peft a folder.")],
    target: Annotated[str, typer.Option("--to", help="lycoris, a1111 (and ComfyUI), diffusers or peft.")] = "lycoris",
    precision: Numbers = "fp16",
    strip: Annotated[bool, typer.Option(help="Leave out paths, captions and everything private.")] = False,
    model: Base = "",
    workspace: Workspace = Path("workspace"),
    as_json: Json = False,
) -> None:
    """Write an adapter for another program, and prove it: the program reads it back, layer by layer."""
    from reparam_diffusion.formats.export import TARGETS, Exported, export_adapter
    from reparam_diffusion.formats.read import read_adapter
    from reparam_diffusion.gallery.blend.sources import base_for

    wanted = one_of(target, TARGETS, "target")
    path = path_of(source, workspace)
    require_writable(out)
    base = base_for([read_adapter(path)], model or None)
    steps = export_adapter(
        path, out, parts=base.parts, family=base.family, target=wanted, precision=precision_of(precision), strip=strip
    )
    done = follow(steps, as_json=as_json)
    assert isinstance(done, Exported)
    say(json.dumps(done.to_dict(), indent=1) if as_json else "\n".join([str(out), *done.sentences()]))


def path_of(name: str, workspace: Path) -> Path:
    """A file or folder by its path, or by its name in the gallery."""
    from reparam_diffusion.gallery.shelf import locate

    return locate(name, workspace)


def source_of(text: str, workspace: Path) -> Source:
    """FILE[:strength[:te_strength[:block=factor,…]]] -> a Source; a name is looked up in the gallery."""
    from reparam_diffusion.gallery.blend.sources import Source
    from reparam_diffusion.models.lora_tags import split_strengths

    words = text.split(":")
    blocks: dict[str, float] = {}
    if "=" in words[-1]:
        blocks = {key: _number(value, text) for key, value in _pairs(words.pop().split(","))}
    name, numbers = split_strengths(":".join(words))
    path = path_of(name, workspace)
    return Source(path, numbers[0] if numbers else 1.0, numbers[1] if len(numbers) > 1 else None, blocks)


def _make(
    sources: list[Source],
    form: Form,
    out: Path | None,
    *,
    model: str,
    precision: str,
    title: str,
    picture: str,
    workspace: Path,
    as_json: bool,
    method: str = "sum",
    options: Any = None,  # the method's own Options
) -> None:
    """Blend, say what was lost, and put the result where it belongs."""
    from reparam_diffusion.gallery.blend.blending import blend_files
    from reparam_diffusion.gallery.blend.result import Report
    from reparam_diffusion.gallery.shelf import add, shelf_of

    sheet = (out or _free_image(workspace, title)).with_suffix(".png")
    if out is not None:
        require_new_file(out, sources=[source.file for source in sources])
    if picture:
        require_new_file(sheet, sources=[source.file for source in sources])
    require_writable(out or shelf_of(workspace))
    with folder_beside(out or shelf_of(workspace) / "result", keep=False) as place:
        target = out or place / "result.safetensors"
        more: dict[str, Any] = {"method": method, "options": options, "model": model or None, "title": title}
        report = follow(
            blend_files(sources, target, form=form, precision=precision_of(precision), **more), as_json=as_json
        )
        assert isinstance(report, Report)
        told = report.to_dict()
        if picture:
            exact = place / "exact.safetensors"
            follow(blend_files(sources, exact, precision="fp32", lossless=True, **more), as_json=as_json)
            told["picture"] = str(_draw(model, picture, exact, target, sheet))
        if out is None:
            told["file"] = str(add(target, workspace, name=title, facts=_notes(target)))
    say(json.dumps(told, indent=1) if as_json else "\n".join(report_lines(report, told)))


def _free_image(workspace: Path, title: str) -> Path:
    """A name for a comparison that no image has yet."""
    from reparam_diffusion.gallery.shelf import make_slug, numbered

    folder = workspace / "images"
    return next(folder / f"{stem}.png" for stem in numbered(make_slug(title)) if not (folder / f"{stem}.png").exists())


def report_lines(report: Report, told: dict[str, object]) -> list[str]:
    """A result for a person: where it is, what it loses, and where most."""
    from reparam_diffusion.maths.loss import ROUNDING, describe_loss

    rows = [f"{told['file']}", f"{len(report.layers)} layers, {report.loss}"]
    if report.error > ROUNDING:
        rows += [f"  {row.site} ({row.form}) {describe_loss(row.error)}" for row in report.worst()]
    rows += [f"Left out of {file}: {key}: {why}." for file, key, why in report.left_out]
    rows += [f"Note: {note}" for note in report.notes]
    return rows + ([f"Before and after: {told['picture']}"] if "picture" in told else [])


def _notes(file: Path) -> dict[str, object]:
    from reparam_diffusion.formats.read import read_adapter

    trigger = read_adapter(file).trigger
    return {"activation text": trigger} if trigger else {}


def _draw(model: str, prompt: str, exact: Path, result: Path, target: Path) -> Path:
    from reparam_diffusion.gallery.ab import ab_picture
    from reparam_diffusion.models.load import load_model

    sheet = ab_picture(load_model(model or "starter"), prompt, [exact], [result], names=("exact", "written"))
    with telling(target), beside(target) as hidden:
        sheet.save(hidden, "PNG")
    return target


def follow(steps: Iterator[Any], *, as_json: bool) -> Any:
    """Run a work to its end with a bar on standard error, or "12 of 80" line by line where that is no terminal.

    Any: progress and the result are told apart by the caller.
    """
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    last: Any = None
    told = 0.0
    with ExitStack() as stack:
        if hasattr(steps, "close"):
            stack.callback(steps.close)  # what was begun is taken away before the error goes on
        bar = stack.enter_context(Bar(console=console, transient=True, disable=as_json or not console.is_terminal))
        task = bar.add_task("Working", total=None)
        for step in steps:
            last = step
            done, total = (
                (step[0], step[1])
                if isinstance(step, tuple)
                else (getattr(step, "done", None), getattr(step, "total", None))
            )
            if total is not None:
                bar.update(task, completed=done, total=total)
                if not as_json and not console.is_terminal and (done == total or time.monotonic() - told > TELL_EVERY):
                    told = time.monotonic()
                    say(f"{done} of {total}", err=True)
    return last


def _list_methods() -> None:
    from reparam_diffusion.gallery.blend import BLENDS

    for name, method in BLENDS.items():
        say(f"{name}  ({method.title}) {method.summary}" + (f"  {method.paper}" if method.paper else ""))
        for option, field in method.options.model_fields.items():
            say(f"    {option} = {field.default}   {field.description}")


def precision_of(text: str) -> Any:
    return one_of(text, ("fp32", "fp16", "bf16"), "precision")


def one_of(text: str, known: Iterable[str], what: str) -> Any:  # Any: one of the caller's literals, checked here
    if text not in known:
        raise unknown_name(what, text, known)
    return text


def _values(settings: list[str]) -> dict[str, float | int]:
    return {
        key: (int(value) if value.lstrip("-").isdigit() else _number(value, key)) for key, value in _pairs(settings)
    }


def _pairs(settings: list[str]) -> Iterator[tuple[str, str]]:
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UserError(f'"{setting}" cannot be read.', do="Write key=value.")
        yield key.strip(), value.strip()


def _number(text: str, where: str) -> float:
    if not _is_number(text):
        raise UserError(f'"{text}" in "{where}" is no number.', do="Write a number such as 0.8.")
    return float(text)


def _is_number(text: str) -> bool:
    from reparam_diffusion.models.sample import finite

    try:
        finite(text)
    except ValueError:
        return False
    return True
