"""Drawing on the command line: any number of adapters at any strength, from noise or from a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reparam_diffusion.errors import UserError
from reparam_diffusion.files import is_same_place
from reparam_diffusion.models.habits import DENOISE
from reparam_diffusion.printable import say

Workspace = Annotated[Path, typer.Option(help="Folder for runs, adapters and pictures.")]


def register(app: typer.Typer) -> None:
    """Add the command to the program's."""
    app.command()(generate)


def generate(
    prompt: Annotated[
        str,
        typer.Option(
            help="What to draw; <lora:name:0.8> calls an adapter of the gallery (two numbers: text encoder, UNet)."
        ),
    ],
    *,
    adapter: Annotated[
        list[str] | None, typer.Option(help="FILE[:strength[:te_strength]] or a gallery name, repeatable.")
    ] = None,
    model: Annotated[str, typer.Option(help='Base model: "starter", a folder, a file or a hub id.')] = "starter",
    negative: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    seed: Annotated[int, typer.Option(help="The first picture's seed; the next ones count up. -1: a random one.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps; the model's own by default.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, max=100, help="How strictly the prompt is obeyed.")] = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many pictures.")] = 1,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    scheduler: Annotated[str, typer.Option(help='Such as "DDIM" or "Euler a"; the model\'s own by default.')] = "",
    clip_skip: Annotated[int, typer.Option(min=0, max=12, help="Text encoder layers to leave out at the end.")] = 0,
    image: Annotated[
        Path | None, typer.Option(help="A picture to start from; it is scaled and cropped to fit.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="A picture that is white where something new is drawn.")] = None,
    denoise: Annotated[
        float, typer.Option(min=0.01, max=1, help="How much of the picture to start from may change.")
    ] = DENOISE,
    vae: Annotated[str, typer.Option(help="A VAE to use instead of the model's own: a folder or a file.")] = "",
    prediction_type: Annotated[
        Literal["auto", "epsilon", "v_prediction"], typer.Option(help="What the model predicts.")
    ] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Number format; auto takes the faster one.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="A .png file, or a folder.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    workspace: Workspace = Path("workspace"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line a picture.")] = False,
) -> None:
    """Draw pictures, with any number of adapters at any strength."""
    from reparam_diffusion.apply import are_from_noise
    from reparam_diffusion.apply import generate as make
    from reparam_diffusion.gallery import images
    from reparam_diffusion.gallery.recipe import filled, make_recipe
    from reparam_diffusion.gallery.shelf import find
    from reparam_diffusion.models.drawing import drawing_dtype
    from reparam_diffusion.models.load import load_model
    from reparam_diffusion.models.lora_tags import parse_tags
    from reparam_diffusion.models.precision import pick_device

    tagged = parse_tags(prompt)
    for note in tagged.notes:
        say(f"Note: {note}", err=True)
    chosen = [_adapter_choice(one, workspace) for one in adapter or []]
    chosen += [(find(tag.name, workspace), tag.strength, tag.text_strength) for tag in tagged.tags]
    _check_out(out, workspace, needs_workspace=image is not None or mask is not None)
    for given in (image, mask):
        if out is not None and given is not None and is_same_place(out, given):
            raise UserError(f"{out} would replace the input.", do="Choose another name for the result.", place="out")
    used = [{"name": path.stem, "strength": strength, "te_strength": te} for path, strength, te in chosen]
    values: dict[str, Any] = {"negative": negative, "steps": steps, "guidance": guidance, "scheduler": scheduler}
    values |= {"prompt": tagged.text, "seed": seed, "width": width, "height": height, "adapters": used, "model": model}
    values |= {"clip_skip": clip_skip, "vae": vae, "prediction_type": prediction_type, "denoise": denoise}
    for name, file in (("image", image), ("mask", mask)):
        values[name] = "" if file is None else images.keep_file(file, workspace, is_mask=name == "mask")
    recipe = make_recipe(values)
    if recipe.seed != seed:
        seed = recipe.seed
        say(f"Seed {seed}", err=True)
    start, white = images.open_sources(recipe, workspace)
    if white is not None and start is None:
        raise UserError("A mask needs the picture that it lies on.", do="Give the picture too, with --image.")
    place = pick_device(device)  # nothing is loaded before what was given is known to be right
    dtype = drawing_dtype(model, precision, place)
    base = load_model(model, device=place, dtype=dtype, vae=vae, prediction_type=prediction_type)
    to_noise = are_from_noise(base, [path for path, _, _ in chosen])
    recipe = filled(recipe, base, None if start is None else start.size, zero_terminal_snr=to_noise)
    with _bar("Drawing", (recipe.steps or 0) * count) as advance, _told_when_full():
        pictures = make(
            base,
            recipe.prompt,
            adapters=chosen,
            negative=recipe.negative,
            seed=seed,
            steps=recipe.steps,
            guidance=recipe.guidance,
            count=count,
            width=recipe.width,
            height=recipe.height,
            clip_skip=clip_skip,
            scheduler=scheduler,
            image=start,
            mask=white,
            denoise=denoise,
            on_step=advance,
        )
    for number, picture in enumerate(pictures):
        own = recipe.model_copy(update={"seed": seed + number})
        path = images.save_picture(picture, own, _place(out, workspace, own.seed, number=number, count=count))
        say(json.dumps({"picture": str(path), "seed": own.seed}) if as_json else str(path))


def _check_out(out: Path | None, workspace: Path, *, needs_workspace: bool) -> None:
    """Raise UserError for a place where no image can be written, before anything is loaded."""
    from reparam_diffusion.files import require_writable
    from reparam_diffusion.workspace import require_workspace

    if out is None or needs_workspace:
        require_workspace(workspace, "images")
    if out is None:
        return
    if out.suffix.lower() not in ("", ".png"):
        raise UserError(
            f"{out.name} is not a PNG.", "Only PNG images keep their settings.", "Name a .png file or a folder."
        )
    if out.suffix and out.is_dir():
        raise UserError(f"{out} is a folder.", "The image cannot replace it.", "Name a .png file, or another folder.")
    require_writable(out if out.suffix else out / "new")


def _place(out: Path | None, workspace: Path, seed: int, *, number: int, count: int) -> Path:
    """Where a picture goes: the file named (numbered when there are several), a folder, or the workspace."""
    from reparam_diffusion.gallery.images import new_name

    if out is None:
        return new_name(workspace, str(seed))
    if out.suffix.lower() == ".png":
        return out if count == 1 else out.with_stem(f"{out.stem}-{number + 1}")
    return out / f"{seed}.png"


def _adapter_choice(text: str, workspace: Path) -> tuple[Path, float, float | None]:
    """FILE[:strength[:te_strength]] -> what generate takes; a name is looked up in the gallery."""
    from reparam_diffusion.gallery.shelf import locate
    from reparam_diffusion.models.lora_tags import split_strengths

    name, numbers = split_strengths(text)
    path = locate(name, workspace)
    return path, numbers[0] if numbers else 1.0, numbers[1] if len(numbers) > 1 else None


@contextmanager
def _told_when_full() -> Iterator[None]:
    """Memory that runs out is told in a sentence. Raises UserError."""
    from reparam_diffusion.models.room import is_out_of_memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "The memory is not enough for this picture.",
            "Drawing it needs more than this device has free.",
            "Choose a smaller size, or wait until no training runs.",
        ) from None


class _bar:
    """A progress bar on standard error that a drawing advances."""

    def __init__(self, label: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.progress = Progress(console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task(label, total=total)

    def __enter__(self) -> Callable[[int, int], bool]:
        self.progress.start()
        return self._advance

    def _advance(self, done: int, total: int) -> bool:
        self.progress.update(self.task, completed=done, total=total)
        return False

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
