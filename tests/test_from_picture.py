"""Starting from a picture: what is masked out stays to the bit, and a recipe draws the same again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw
from studio_tiny import FAST, asked, finish, pixels, recipe, tiny_workspace
from tiny_pipelines import save_tiny
from typer.testing import CliRunner

from reparam_diffusion.__main__ import app
from reparam_diffusion.apply import generate
from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import images
from reparam_diffusion.gallery.recipe import make_recipe
from reparam_diffusion.jobs import studio, studio_grid
from reparam_diffusion.models import start
from reparam_diffusion.models.load import load_model
from reparam_diffusion.models.sample import draw
from reparam_diffusion.models.schedulers import SCHEDULERS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "sd1")


@pytest.fixture
def workspace(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny_workspace(tmp_path, tiny, monkeypatch)


def picture(width: int, height: int) -> Image.Image:
    """Noise in colour, in which any crop and any changed pixel shows."""
    chance = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(chance.integers(0, 256, (height, width, 3), dtype=np.uint8))


def spot(size: tuple[int, int]) -> Image.Image:
    """A mask with a white disc left of the middle."""
    mask = Image.new("L", size, 0)
    width, height = size
    ImageDraw.Draw(mask).ellipse((width // 8, height // 4, width // 2, height * 3 // 4), fill=255)
    return mask


def far(one: Image.Image, other: Image.Image) -> float:
    return float(np.mean(np.asarray(ImageChops.difference(one, other))))


@pytest.mark.parametrize(("family", "prediction"), [("sd1", "epsilon"), ("sdxl", "v_prediction")])
def test_what_is_not_masked_stays_to_the_bit_with_every_scheduler(family: str, prediction: str, tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "model", family, prediction=prediction), device="cpu")
    given, mask = picture(32, 40), spot((32, 40))
    keeps = np.asarray(mask) == 0
    for name in SCHEDULERS:
        options = {"steps": 3, "guidance": 2.0, "scheduler": name, "denoise": 0.7}
        drawn = draw(model, "a toy", seeds=[1, 2], image=given, mask=mask, **options)
        for one in drawn:
            assert one.size == given.size
            assert np.array_equal(np.asarray(one)[keeps], np.asarray(given)[keeps]), name
            assert far(one, given) > 0.5, name
        assert drawn[0].tobytes() != drawn[1].tobytes()
        assert draw(model, "a toy", seeds=[1], image=given, mask=mask, **options)[0].tobytes() == drawn[0].tobytes()


def test_a_little_change_stays_nearer_than_a_great_one_with_eight_channels() -> None:
    model = load_model("starter", device="cpu")
    words = "a 3d icon of a red apple on a light blue background"
    apple = draw(model, words, seeds=[1], steps=8)[0]
    options = {"seeds": [1], "steps": 8, "image": apple}
    near, middle, away = (
        draw(model, words.replace("red apple", "blue car"), denoise=d, **options)[0] for d in (0.25, 0.6, 1.0)
    )
    assert far(near, apple) < far(middle, apple) < far(away, apple)
    turned = draw(model, words, denoise=0.3, seeds=[1], steps=8, image=apple.resize((300, 200)))[0]
    assert turned.size == (160, 96)


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    geometry=st.sampled_from([(128, 32), (512, 64), (1024, 32)]),
)
def test_a_picture_of_any_shape_gets_a_size_that_the_model_can_draw(
    width: int, height: int, geometry: tuple[int, int]
) -> None:
    side, step = geometry
    if width % step == height % step == 0:
        width += 1
    got = start.fitting_size((width, height), side=side, step=step)
    assert all(value > 0 and value % step == 0 for value in got)
    assert side**2 / 2 < got[0] * got[1] < side**2 * 2
    assert (got[0] >= got[1]) if width > height * 1.5 else True
    other = start.fitting_size((height, width), side=side, step=step)
    assert other[0] * other[1] == got[0] * got[1]
    assert start.fitting_size((side, side + step), side=side, step=step) == (side, side + step)


def test_the_mask_goes_through_the_same_crop_and_softens_inwards_only() -> None:
    given = picture(90, 40)
    mask = Image.new("L", (180, 80), 0)
    mask.paste(255, (100, 0, 180, 80))  # the right part, at twice the size
    begun = start.make_start(given, mask, denoise=0.5, width=40, height=40, steps=4)
    assert begun.mask is not None and begun.picture.size == begun.mask.size == (40, 40)
    row = np.asarray(begun.mask)[20]
    edge = 50 - 25  # what lies at 50 of 90 lies at 25 of the middle 40
    assert (row[: edge - 1] == 0).all() and (row[edge + 4 :] == 255).all()
    assert np.array_equal(
        np.asarray(begun.finish(Image.new("RGB", (40, 40))))[:, : edge - 1], np.asarray(begun.picture)[:, : edge - 1]
    )


def test_every_cell_that_white_reaches_is_drawn_anew() -> None:
    mask = Image.new("L", (32, 32), 0)
    mask.putpixel((9, 17), 1)
    cells = start._cells(mask, torch.zeros(1, 4, 4, 4))
    assert cells.nonzero().tolist() == [[0, 0, 2, 1]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"denoise": 0.05, "steps": 4}, "leaves no step to draw. Take at least 0.25"),
        ({"denoise": 0.0}, "above 0"),
        ({"denoise": 1.5}, "at most 1"),
        ({"mask": Image.new("L", (32, 64), 255)}, "another shape"),
        ({"mask": Image.new("L", (32, 32), 0)}, "mask is empty"),
        ({"image": None, "mask": Image.new("L", (32, 32), 255)}, "needs the picture"),
    ],
)
def test_what_cannot_be_started_from_is_told(tiny: Path, options: dict[str, object], words: str) -> None:
    model = load_model(tiny, device="cpu")
    with pytest.raises(UserError, match=words):
        generate(model, "a toy", **{"image": picture(32, 32), **FAST, **options})  # type: ignore[arg-type]


# --- the studio and the command line ---------------------------------------------------------------------------------
def test_a_picture_that_was_started_from_another_draws_the_same_again(workspace: Path) -> None:
    image, mask = (images.keep_source(one, workspace) for one in (picture(40, 30), spot((40, 30))))
    folder = asked(workspace, recipe(image=image, mask=mask, denoise=0.8, steps=3))
    finish(workspace)
    file = studio.state_of(folder).pictures[0]
    settings = images.settings_of(file)
    assert (settings.image, settings.mask, settings.denoise) == (image, mask, 0.8)
    with Image.open(file) as drawn:
        text = str(drawn.info["parameters"])
    assert "Denoising strength: 0.8" in text and f"Mask: {mask}" in text
    again = asked(workspace, settings)
    finish(workspace)
    assert pixels(studio.state_of(again).pictures[0]) == pixels(file)
    assert all(one.parent.name != images.SOURCES for one in images.history(workspace, most=9))


def test_a_picture_that_is_gone_is_told_before_anything_is_asked(workspace: Path) -> None:
    name = images.source_name(picture(8, 8))
    with pytest.raises(UserError, match="picture to start from is not there"):
        asked(workspace, recipe(image=name))
    for path in ("images/../adapters/teddy.png", "/etc/passwd", "images/sources/x.png"):
        with pytest.raises(UserError, match="no picture of this workspace"):
            make_recipe({"prompt": "a toy", "image": path})


def test_a_grid_varies_how_much_may_change(workspace: Path) -> None:
    image = images.keep_source(picture(40, 30), workspace)
    request = studio_grid.grid(recipe(image=image), across=("denoise", ["0.5", "1"]), down=("seed", ["1", "2"]))
    assert [one.denoise for one in request.recipes] == [0.5, 1.0, 0.5, 1.0]
    with pytest.raises(UserError, match="no picture to start from"):
        studio_grid.grid(recipe(), across=("denoise", ["0.5"]), down=("seed", ["1"]))


def test_the_same_pixels_are_kept_once_under_the_same_name(workspace: Path, tmp_path: Path) -> None:
    given = picture(20, 10)
    given.save(tmp_path / "mine.bmp")
    assert images.keep_source(given, workspace) == images.keep_file(tmp_path / "mine.bmp", workspace)
    large = images.keep_source(picture(5000, 8), workspace)
    with Image.open(workspace / large) as kept:
        assert kept.width == 4096


def test_the_command_line_starts_from_a_picture(tiny: Path, tmp_path: Path) -> None:
    picture(40, 30).save(tmp_path / "in.png")
    spot((40, 30)).save(tmp_path / "mask.png")
    out, workspace = tmp_path / "out.png", tmp_path / "workspace"
    words = [
        "generate",
        "--prompt",
        "a toy",
        "--model",
        str(tiny),
        "--steps",
        "3",
        "--out",
        str(out),
        "--workspace",
        str(workspace),
    ]
    words += ["--image", str(tmp_path / "in.png"), "--mask", str(tmp_path / "mask.png"), "--denoise", "0.7"]
    done = CliRunner().invoke(app, [*words, "--prediction-type", "v_prediction"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    settings = images.settings_of(out)
    assert (settings.denoise, settings.prediction_type, settings.width, settings.height) == (
        0.7,
        "v_prediction",
        36,
        28,
    )
    image, mask = images.open_sources(settings, workspace)
    assert image is not None and mask is not None and image.size == mask.size == (40, 30)
    assert make_recipe(settings.model_dump()) == settings


def test_the_studio_loads_another_base_for_another_prediction(workspace: Path) -> None:
    plain, other = (asked(workspace, recipe(prediction_type=kind)) for kind in ("auto", "v_prediction"))
    finish(workspace)
    first, second = (pixels(studio.state_of(folder).pictures[0]) for folder in (plain, other))
    assert first != second


def test_a_recipe_in_text_keeps_what_it_starts_from(tiny: Path) -> None:
    from reparam_diffusion.gallery.infotext import read_infotext
    from reparam_diffusion.gallery.recipe import to_text

    name = images.source_name(picture(8, 8))
    full = recipe(
        image=name,
        mask=name,
        denoise=0.35,
        vae="better",
        prediction_type="v_prediction",
        negative="x",
        scheduler="DDIM",
    )
    assert read_infotext(to_text(full)).recipe == full
    text = to_text(recipe(negative="x", scheduler="DDIM")) + ", Denoising strength: 0.7, Mask blur: 4"
    assert not read_infotext(text).recipe.image  # A1111's own pictures name none


def test_a_see_through_mask_is_black_where_it_is_clear(tmp_path: Path) -> None:
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    mask.paste((255, 255, 255, 255), (8, 8, 24, 24))
    mask.save(tmp_path / "mask.png")
    with Image.open(tmp_path / images.keep_file(tmp_path / "mask.png", tmp_path, is_mask=True)) as kept:
        assert kept.mode == "L" and kept.getbbox() == (8, 8, 24, 24)


def test_what_is_wrong_with_a_picture_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    picture(32, 32).save(tmp_path / "mask.png")
    for options, words in (
        (["--image", str(tmp_path / "nope.png")], "nope.png cannot be used"),
        (["--mask", str(tmp_path / "mask.png")], "A mask needs the picture"),
        ([], "no-model"),
    ):
        words_given = ["generate", "--prompt", "a toy", "--model", str(tmp_path / "no-model"), *options]
        said = CliRunner().invoke(app, [*words_given, "--workspace", str(tmp_path)])
        assert words in str(said.exception), options
