"""A drawn picture carries what it was drawn from, and gives it back whole, also to and from other programs."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import images
from reparam_diffusion.gallery.grid import make_grid
from reparam_diffusion.gallery.infotext import read_infotext
from reparam_diffusion.gallery.recipe import Recipe, Use, make_recipe, to_text
from reparam_diffusion.models.lora_tags import parse_tags
from reparam_diffusion.models.schedulers import SCHEDULERS

PICTURE = Image.new("RGB", (16, 8), "teal")
WORDS = (
    st.text(string.ascii_letters + string.digits + " ,.()äß熊-", min_size=1, max_size=40).map(str.strip).filter(bool)
)
NAMES = st.text(string.ascii_lowercase + string.digits + "-_/. äß", min_size=1, max_size=30).map(str.strip).filter(bool)
STRENGTHS = st.integers(-200, 200).map(lambda n: n / 100)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes with every value filled in, as a picture is saved with."""
    uses = st.builds(Use, name=NAMES, strength=STRENGTHS, te_strength=st.none() | STRENGTHS)
    return Recipe(
        prompt=draw(st.text(max_size=80, min_size=1)),
        negative=draw(st.text(max_size=40)),
        adapters=tuple(draw(st.lists(uses, max_size=8))),
        seed=draw(st.integers(0, 2**63 - 1)),
        steps=draw(st.integers(1, 1000)),
        guidance=draw(st.floats(0, 100)),
        scheduler=draw(st.sampled_from(list(SCHEDULERS))),
        width=draw(st.integers(8, 8192)),
        height=draw(st.integers(8, 8192)),
        clip_skip=draw(st.integers(0, 12)),
        model=draw(st.sampled_from(["starter", "someone/some-model", "my model, v2"])),
    )


@given(recipe=recipes())
def test_a_saved_picture_gives_its_recipe_back_whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = images.save_picture(PICTURE, recipe, tmp_path_factory.getbasetemp() / "whole.png")
    assert images.settings_of(file) == recipe
    with Image.open(file) as opened:
        assert opened.tobytes() == PICTURE.tobytes()


@given(recipe=recipes(), prompt=WORDS, negative=WORDS, guidance=st.integers(0, 1000))
def test_the_text_for_other_programs_says_the_same(recipe: Recipe, prompt: str, negative: str, guidance: int) -> None:
    plain = parse_tags(prompt).text
    if not plain:
        return
    told = recipe.model_copy(update={"prompt": plain, "negative": negative, "guidance": guidance / 10, "model": "m"})
    back = read_infotext(to_text(told)).recipe
    linked = [
        use.model_copy(update={"te_strength": None}) if use.te_strength == use.strength else use
        for use in told.adapters
    ]
    assert back == told.model_copy(update={"adapters": tuple(linked)})


def test_the_text_of_a1111_is_understood() -> None:
    text = (
        "masterpiece, a (red:1.2) fox\nin the snow <lora:fox:0.8> <lora:style:te=0.5:unet=1>\n"
        "Negative prompt: blurry,\nlowres\n"
        "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 4294967295, Size: 512x768, "
        'Model hash: abc, Model: dream, Clip skip: 2, Lora hashes: "fox: 1, style: 2", Version: v1.10.1'
    )
    recipe = read_infotext(text).recipe
    assert recipe.prompt == "masterpiece, a (red:1.2) fox in the snow"
    assert recipe.negative == "blurry,\nlowres"
    assert recipe.adapters == (Use(name="fox", strength=0.8), Use(name="style", strength=1.0, te_strength=0.5))
    assert (recipe.steps, recipe.guidance, recipe.seed) == (30, 6.5, 4294967295)
    assert (recipe.width, recipe.height, recipe.clip_skip, recipe.model) == (512, 768, 1, "dream")
    assert recipe.scheduler == "DPM++ 2M Karras"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just a comment",
        "\nSteps: 20, Seed: 1",
        "Steps: 20, Seed: 1",
        "<lora:only-a-tag:1>\nSteps: 20, Seed: 1",
        "w" * 2_000_000,
        "Steps: " * 300_000,
    ],
)
def test_hostile_text_gives_one_sentence(text: str, tmp_path: Path) -> None:
    note = PngInfo()
    note.add_text("parameters", text, zip=True)
    note.add_text("reparam", '{"prompt": 1, "evil": true}')
    PICTURE.save(tmp_path / "p.png", pnginfo=note)
    with pytest.raises(UserError):
        images.settings_of(tmp_path / "p.png")


def test_what_carries_no_settings_is_told(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "plain.png")
    PICTURE.save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("hello")
    Image.effect_noise((64, 64), 50).save(tmp_path / "torn.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:600])
    for name, words in (
        ("plain.png", "no settings"),
        ("photo.jpg", "no settings"),
        ("text.png", "not a PNG, JPEG or WebP"),
        ("torn.png", "cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            images.settings_of(tmp_path / name)


def test_a_picture_says_nothing_of_the_machine_it_was_drawn_on(tmp_path: Path) -> None:
    (tmp_path / "private" / "dream").mkdir(parents=True)
    recipe = Recipe(
        prompt="a", negative="", steps=1, guidance=1, scheduler="DDIM", width=16, height=8,
        model=str(tmp_path / "private" / "dream"),
    )  # fmt: skip
    file = images.save_picture(PICTURE, recipe, tmp_path / "p.png")
    assert b"private" not in file.read_bytes()
    assert images.settings_of(file).model == "dream"


def test_the_history_is_the_newest_first_and_names_never_clash(tmp_path: Path) -> None:
    recipe = Recipe(prompt="a", negative="", steps=1, guidance=1, scheduler="DDIM", width=16, height=8)
    files = [images.save_picture(PICTURE, recipe, images.new_name(tmp_path, "7")) for _ in range(5)]
    assert len(set(files)) == 5
    old = tmp_path / "images" / "2020-01-01" / "235959-1.png"
    old.parent.mkdir()
    PICTURE.save(old)
    (tmp_path / "images" / "2020-01-01" / ".half.png").touch()
    assert images.history(tmp_path, most=9)[-1] == old
    assert set(images.history(tmp_path, most=9)) == {*files, old}
    assert images.history(tmp_path, most=2) == images.history(tmp_path, most=9)[:2]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": " <lora:x:1> "}, "prompt is empty"),
        ({"prompt": "a", "steps": 0}, "Steps must be at least 1"),
        ({"prompt": "a", "seed": 2**63}, "Seed must be less"),
        ({"prompt": "a", "adapters": [{"name": "x", "strength": 11}]}, "strength of adapter 1 must be at most 10"),
        ({"prompt": "a", "adapters": [{"name": "x<y"}]}, "none of < > :"),
        ({"prompt": "a", "colour": "red"}, "Colour is not a known setting"),
    ],
)
def test_a_mistake_in_a_recipe_names_its_place(values: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_recipe(values)


def test_a_sheet_has_room_for_every_picture_and_wraps_long_names() -> None:
    pictures = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green", "blue", "black")]
    long = "a very long name of a prompt part that no column could hold " + "m" * 40
    sheet = make_grid([("one", pictures[:2]), (long, pictures[2:])], ["left", long])
    assert sheet.width < 64 * 2 + 250
    colours = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height) or []}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0)} <= colours
    assert (
        sum(count for count, colour in sheet.getcolors(sheet.width * sheet.height) or [] if colour == (255, 0, 0))
        == 64 * 48
    )
