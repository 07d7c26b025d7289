"""Laws of masks: they lie on their pictures whatever turn, size and crop, and what is wrong with one is told by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from reparam_diffusion.data.cache import item_pixels
from reparam_diffusion.data.dataset import Item, Part, build_dataset
from reparam_diffusion.data.images import Picture, find_pictures
from reparam_diffusion.data.masks import Mask, find_masks, mask_files, read_mask
from reparam_diffusion.errors import UserError
from reparam_diffusion.training.batch import Sample, places_of

KINDS = ("alpha", "stored", "own tag", "upright", "smaller")
TURNED = [(kind, orientation) for kind in KINDS for orientation in range(1, 9)]
"""EXIF orientations. A mask as stored that has the upright shape, too, is taken as upright: only turns by 90° tell."""


def blob(size: tuple[int, int]) -> Image.Image:
    """Greys without any symmetry and without sharp edges, as filters ring there."""
    image = Image.new("L", (size[0] // 10, size[1] // 10), 20)
    draw = ImageDraw.Draw(image)
    draw.ellipse((0, 1, size[0] // 20, size[1] // 16), fill=250)
    draw.rectangle((size[0] // 14, size[1] // 13, size[0] // 11, size[1] // 11), fill=140)
    return image.resize(size, Image.Resampling.BICUBIC)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def upright(stored: Image.Image, orientation: int) -> Image.Image:
    """A stored picture as a viewer shows it, by Pillow's own reading of the tag."""
    stored = stored.copy()
    stored.info["exif"] = exif_of(orientation).tobytes()
    return ImageOps.exif_transpose(stored)


def drawn(folder: Path, kind: str, orientation: int, size: tuple[int, int]) -> tuple[Item, Mask]:
    """A picture whose red is its mask (1 - red for "alpha", which is laid on white), in a bucket of another shape."""
    grey = blob(size)
    masks = folder / "masks"
    masks.mkdir()
    if kind == "alpha":
        black = Image.new("L", size, 0)
        Image.merge("RGBA", (black, black, black, grey)).save(folder / "a.png", exif=exif_of(orientation))
    else:
        Image.merge("RGB", (grey, grey, grey)).save(folder / "a.png", exif=exif_of(orientation))
    match kind:
        case "stored":
            grey.save(masks / "a.png")
        case "own tag":
            grey.save(masks / "a.png", exif=exif_of(orientation))
        case "upright":
            upright(grey, orientation).save(masks / "a.png")
        case "smaller":
            turned = upright(grey, orientation)
            turned.resize((turned.width // 2, turned.height // 2), Image.Resampling.BOX).save(masks / "a-masklabel.png")
    pictures, _ = find_pictures(folder, least_side=8)
    where = "alpha" if kind == "alpha" else str(masks)
    (mask,) = find_masks(pictures, where, rest=0.0, place="data.masks")
    assert mask is not None
    data = build_dataset([Part(pictures, ["x"], [mask])], resolution=64, step=32)
    return data.train[0], mask


@pytest.mark.parametrize(
    ("kind", "orientation"), [one for one in TURNED if one[0] != "stored" or one[1] in (1, 5, 6, 7, 8)]
)
def test_a_mask_lies_on_its_picture_after_turn_scaling_crop_and_flip(
    kind: str, orientation: int, tmp_path: Path
) -> None:
    item, mask = drawn(tmp_path, kind, orientation, (220, 150))
    assert item.size[0] * item.picture.height != item.size[1] * item.picture.width, "something is cropped"
    found = read_mask(mask, item.picture, item.size, pixels_per_latent=8)
    assert found.shape == (item.size[1] // 8, item.size[0] // 8)
    setup = SimpleNamespace(material=SimpleNamespace(masks={item: found}), model=SimpleNamespace(device="cpu"))
    for flip in (False, True):
        red = (item_pixels(item, flip)[0] + 1) / 2
        seen = torch.nn.functional.avg_pool2d((1 - red if kind == "alpha" else red)[None], 8)[0]
        (places,) = places_of(setup, [Sample(item, 0, flip, "", 1.0)])
        torch.testing.assert_close(places, seen, atol=0.03, rtol=0)
        assert seen.max() - seen.min() > 0.5, "the drawing must show where it lies"
        assert (places - seen.flip(-1)).abs().max() > 0.2, "and which way round"


def picture_and_mask(folder: Path, mask: Image.Image | None, name: str = "a") -> list[Picture]:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (60, 40), (ord(name[0]), 0, 0)).save(folder / f"{name}.png")
    if mask is not None:
        mask.save(folder / f"{name}-masklabel.png")
    return find_pictures(folder, least_side=8)[0]


def masked(pictures: list[Picture], masks: str = "beside", rest: float = 0.0) -> list[Mask | None]:
    return find_masks(pictures, masks, rest=rest, place="data.sets.0.masks")


def test_rest_is_what_black_counts_and_greys_lie_between(tmp_path: Path) -> None:
    ramp = Image.new("L", (60, 40), 0)
    ramp.paste(255, (20, 0, 40, 40))
    ramp.paste(51, (40, 0, 60, 40))
    pictures = picture_and_mask(tmp_path, ramp)
    (mask,) = masked(pictures, rest=0.25)
    assert mask is not None
    found = read_mask(mask, pictures[0], (60, 40), pixels_per_latent=20)
    torch.testing.assert_close(found, torch.tensor([[0.25, 1.0, 0.25 + 0.75 * 0.2]] * 2))


def test_a_mean_over_each_latent_is_taken(tmp_path: Path) -> None:
    quarter = Image.new("L", (60, 40), 0)
    quarter.paste(255, (0, 0, 10, 10))
    pictures = picture_and_mask(tmp_path, quarter)
    (mask,) = masked(pictures)
    assert mask is not None
    found = read_mask(mask, pictures[0], (60, 40), pixels_per_latent=20)
    assert found.tolist() == [[0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_masks_are_no_images_and_a_lone_one_is_listed(tmp_path: Path) -> None:
    white = Image.new("L", (60, 40), 255)
    picture_and_mask(tmp_path, white)
    white.convert("RGB").save(tmp_path / "lone-masklabel.png")
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "b.webp")
    Image.new("L", (60, 40), 200).save(tmp_path / "b-masklabel.jpg")
    pictures, refused = find_pictures(tmp_path, least_side=8)
    assert {picture.path.name: picture.mask and picture.mask.name for picture in pictures} == {
        "a.png": "a-masklabel.png",
        "b.webp": "b-masklabel.jpg",
    }
    assert [bad.path.name for bad in refused] == ["lone-masklabel.png"]


def test_see_through_parts_of_a_mask_are_black(tmp_path: Path) -> None:
    cut_out = Image.new("RGBA", (60, 40), (255, 255, 255, 0))
    cut_out.paste((255, 255, 255, 255), (0, 0, 20, 40))
    pictures = picture_and_mask(tmp_path, cut_out)
    (mask,) = masked(pictures)
    assert mask is not None
    assert read_mask(mask, pictures[0], (60, 40), pixels_per_latent=20).tolist() == [[1.0, 0.0, 0.0]] * 2


def test_without_transparency_the_whole_picture_counts(tmp_path: Path) -> None:
    assert masked(picture_and_mask(tmp_path, None), "alpha") == [None]
    assert masked(picture_and_mask(tmp_path, None), "") == [None]


BLACK, WHITE = Image.new("L", (60, 40), 3), Image.new("L", (60, 40), 255)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (None, r"1 of 1 pictures has no mask: a\.png\..*a-masklabel\.png.*all-white"),
        (BLACK, r"a-masklabel\.png is black all over"),
        (Image.new("L", (60, 60), 255), r"another shape.*60 × 60 pixels, and a\.png is 60 × 40"),
    ],
)
def test_what_is_wrong_with_a_mask_is_told_with_its_place(mask: Image.Image | None, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as told:
        masked(picture_and_mask(tmp_path, mask))
    assert told.value.place == "data.sets.0.masks"


def test_a_damaged_mask_a_missing_folder_and_missing_files_are_told(tmp_path: Path) -> None:
    pictures = picture_and_mask(tmp_path / "p", WHITE)
    for name in ("b", "c"):
        pictures = picture_and_mask(tmp_path / "p", None, name)
    with pytest.raises(UserError, match=r'There is no folder .*nowhere.*write "alpha" or "beside"'):
        masked(pictures, str(tmp_path / "nowhere"))
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match=r"The folder .*m holds no masks"):
        masked(pictures, str(tmp_path / "m"))
    WHITE.save(tmp_path / "m" / "b.png")
    with pytest.raises(UserError, match=r"2 of 3 pictures have no mask: a\.png, c\.png\..*of its own name in"):
        masked(pictures, str(tmp_path / "m"))
    for name in ("a", "c"):
        (tmp_path / "m" / f"{name}.png").write_bytes((tmp_path / "m" / "b.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"a\.png cannot be used. It is damaged") as told:
        masked(pictures, str(tmp_path / "m"))
    assert told.value.place == "data.sets.0.masks"


def test_a_see_through_picture_and_what_a_crop_leaves_of_a_mask_are_told(tmp_path: Path) -> None:
    Image.new("RGBA", (60, 40), (1, 2, 3, 0)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png is see-through all over"):
        masked(find_pictures(tmp_path, least_side=8)[0], "alpha")
    edge = Image.new("L", (60, 40), 0)
    edge.paste(255, (0, 0, 4, 40))
    pictures = picture_and_mask(tmp_path, edge)
    (mask,) = masked(pictures)
    assert mask is not None
    with pytest.raises(UserError, match=r"Nothing of a\.png is left.*cropped to 64 × 64"):
        read_mask(mask, pictures[0], (64, 64), pixels_per_latent=8)


def test_a_mask_that_has_changed_is_told(tmp_path: Path) -> None:
    pictures = picture_and_mask(tmp_path, WHITE)
    (mask,) = masked(pictures)
    assert mask is not None
    edge = WHITE.copy()
    edge.putpixel((0, 0), 0)
    edge.save(tmp_path / "a-masklabel.png")
    with pytest.raises(UserError, match=r"a-masklabel\.png has changed"):
        read_mask(mask, pictures[0], (60, 40), pixels_per_latent=20)


def test_names_may_be_compared_as_they_are_spelled_but_never_guessed(tmp_path: Path) -> None:
    pictures = picture_and_mask(tmp_path / "p", None, "my-dog")
    (tmp_path / "m").mkdir()
    WHITE.save(tmp_path / "m" / "My Dog.png")
    with pytest.raises(UserError, match="no mask"):
        mask_files(pictures, str(tmp_path / "m"), place="data.masks")
    spelled = {"place": "data.masks", "spelled": lambda name: name.lower().replace(" ", "-")}
    assert mask_files(pictures, str(tmp_path / "m"), **spelled) == [tmp_path / "m" / "My Dog.png"]
    shutil.copy(tmp_path / "m" / "My Dog.png", tmp_path / "m" / "my-dog.png")
    with pytest.raises(UserError, match="no mask"):
        mask_files(pictures, str(tmp_path / "m"), **spelled)
