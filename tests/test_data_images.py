"""Laws of finding and opening pictures: good ones are seen rightly, bad ones are refused by name."""

from __future__ import annotations

import io
import os
import random
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from reparam_diffusion.data import images
from reparam_diffusion.data.check import look_over
from reparam_diffusion.data.images import Picture, Refused, find_pictures, open_again, open_picture
from reparam_diffusion.errors import UserError

CORNERS = {(0, 0): (200, 30, 30), (1, 0): (30, 180, 30), (0, 1): (30, 30, 200), (1, 1): (240, 200, 40)}


def four_corners(width: int = 48, height: int = 32) -> Image.Image:
    """A picture that is different in every corner."""
    image = Image.new("RGB", (width, height))
    for (across, down), colour in CORNERS.items():
        image.paste(
            colour, (across * width // 2, down * height // 2, (across + 1) * width // 2, (down + 1) * height // 2)
        )
    return image


def good(folder: Path, name: str = "good.png") -> Path:
    four_corners().save(folder / name)
    return folder / name


def the_refused(source: Path, *, least_side: int = 16) -> dict[str, str]:
    good(source, "zz_good.png")
    pictures, refused = find_pictures(source, least_side=least_side)
    assert [picture.path.name for picture in pictures] == ["zz_good.png"]
    return {bad.path.name: bad.why for bad in refused}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_picture_is_turned_as_its_exif_data_say(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{kind}"
    four_corners().save(file, exif=exif)
    with Image.open(file) as raw:
        expected = ImageOps.exif_transpose(raw).convert("RGB")
    (picture,), _ = find_pictures([file], least_side=16)
    assert (picture.width, picture.height) == expected.size
    assert np.array_equal(np.asarray(open_picture(file)), np.asarray(expected))
    assert (images.TURNED in picture.notes) == (orientation != 1)


def test_broken_exif_data_leave_the_picture_as_it_is(tmp_path: Path) -> None:
    four_corners().save(tmp_path / "a.jpg", exif=b"Exif\0\0not tiff at all")
    assert open_picture(tmp_path / "a.jpg").size == (48, 32)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_not_clipped_to_white(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    seen = np.asarray(open_picture(tmp_path / f"a.{suffix}"))
    assert np.abs(seen[..., 0].astype(float) - ramp / 257).max() <= 0.51
    assert seen.shape == (32, 32, 3)


@pytest.mark.parametrize(("top", "kind"), [(65535, np.int32), (255, np.int32), (1.0, np.float32), (255.0, np.float32)])
def test_wide_grey_pictures_keep_their_range(tmp_path: Path, top: float, kind: type) -> None:
    ramp = np.linspace(0, top, 256).astype(kind).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    seen = np.asarray(open_picture(tmp_path / "a.tiff"))[..., 0].astype(float)
    assert np.abs(seen - ramp / top * 255).max() <= 0.51


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_see_through_parts_become_white(tmp_path: Path, mode: str) -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    clear.paste((40, 40, 40, 255), (0, 0, 16, 32))
    image = clear.convert(mode) if mode != "P" else clear.quantize(4)
    image.save(tmp_path / "a.png")
    (picture,), _ = find_pictures(tmp_path, least_side=16)
    seen = open_picture(picture.path)
    assert seen.mode == "RGB"
    assert seen.getpixel((30, 16)) == (255, 255, 255)
    assert max(seen.getpixel((2, 16))) < 50
    assert images.ON_WHITE in picture.notes


def test_a_colour_key_and_a_palette_with_transparency_are_seen(tmp_path: Path) -> None:
    keyed = Image.new("RGB", (32, 32), (10, 20, 30))
    keyed.save(tmp_path / "key.png", transparency=(10, 20, 30))
    assert open_picture(tmp_path / "key.png").getpixel((5, 5)) == (255, 255, 255)
    four_corners().quantize(4).save(tmp_path / "palette.png", transparency=bytes([0, 255, 255, 255]))
    assert (255, 255, 255) in set(open_picture(tmp_path / "palette.png").get_flattened_data())


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    four_corners().convert(mode).save(tmp_path / "a.tiff")
    seen = open_picture(tmp_path / "a.tiff")
    assert (seen.mode, seen.size) == ("RGB", (48, 32))
    if mode in ("P", "CMYK"):
        assert np.abs(np.asarray(seen).astype(int) - np.asarray(four_corners()).astype(int)).max() <= 60


def test_lab_becomes_the_same_colours(tmp_path: Path) -> None:
    lab = ImageCms.profileToProfile(
        four_corners(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    lab.save(tmp_path / "a.tiff")
    difference = np.asarray(open_picture(tmp_path / "a.tiff")).astype(int) - np.asarray(four_corners()).astype(int)
    assert np.abs(difference).max() <= 16  # Lab in 8 bits is coarse


def wide_profile() -> bytes:
    """A small but whole RGB profile: sRGB's with the red and blue primaries exchanged."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", raw[128:132])[0]
    for at in range(132, 132 + 12 * count, 12):
        tag = bytes(raw[at : at + 4])
        if tag in (b"rXYZ", b"bXYZ"):
            raw[at : at + 4] = b"bXYZ" if tag == b"rXYZ" else b"rXYZ"
        if tag == b"desc":
            raw[at : at + 4] = b"dscx"
    return bytes(raw)


def test_an_embedded_colour_profile_is_used(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (250, 0, 0)).save(tmp_path / "a.png", icc_profile=wide_profile())
    red, _, blue = open_picture(tmp_path / "a.png").getpixel((3, 3))
    assert blue > 200
    assert red < 60


def test_a_broken_colour_profile_is_passed_over(tmp_path: Path) -> None:
    for mode in ("RGB", "CMYK", "L"):
        file = tmp_path / f"{mode}.tiff"
        four_corners().convert(mode).save(file, icc_profile=b"\0" * 200)
        assert open_picture(file).size == (48, 32)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame_with_a_note(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    file = tmp_path / f"a.{suffix}"
    frames[0].save(file, save_all=True, append_images=frames[1:])
    (picture,), _ = find_pictures(tmp_path, least_side=16)
    red, _, blue = open_picture(file).getpixel((16, 16))
    assert red > 240
    assert blue < 15
    assert images.FIRST_FRAME in picture.notes


def test_heic_is_opened_by_content_whatever_its_name(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "a.HEIC", "HEIF", quality=90)
    os.link(tmp_path / "a.HEIC", tmp_path / "b.jpg")
    pictures, refused = find_pictures(tmp_path, least_side=16)
    assert [(p.path.name, p.width, p.height) for p in pictures] == [("a.HEIC", 64, 48)]
    assert "a.HEIC" in refused[0].why
    assert (
        max(abs(a - b) for a, b in zip(open_picture(tmp_path / "b.jpg").getpixel((9, 9)), (200, 30, 30), strict=True))
        < 12
    )


def test_heic_without_pillow_heif_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "pip install pillow-heif" in the_refused(tmp_path)["a.heic"]


def test_bad_files_are_refused_by_name_and_the_others_kept(tmp_path: Path) -> None:
    noise = Image.frombytes("RGB", (64, 64), random.Random(3).randbytes(64 * 64 * 3))
    encoded = io.BytesIO()
    noise.save(encoded, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(encoded.getvalue()[: len(encoded.getvalue()) // 2])
    (tmp_path / "head.jpg").write_bytes(encoded.getvalue()[:40])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.png").write_text("not a picture")
    (tmp_path / "line.svg").write_text('<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>')
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom" + b"\0" * 64)
    (tmp_path / "paper.jpg").write_bytes(b"%PDF-1.7 ...")
    (tmp_path / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    Image.new("RGB", (64, 9)).save(tmp_path / "tiny.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    why = the_refused(tmp_path)
    assert "cut short" in why["cut.jpg"]
    assert "cut short" in why["head.jpg"]
    assert "0 bytes" in why["empty.png"]
    assert "not a picture" in why["words.png"]
    assert "SVG" in why["line.svg"]
    assert "video" in why["film.mp4"]
    assert "PDF" in why["paper.jpg"]
    assert "not a picture" in why["program.eps"]
    assert "64 × 9 pixels" in why["tiny.png"]
    assert "at least 16" in why["tiny.png"]
    assert "not a file" in why["pipe.png"]
    assert "not there" in why["gone.png"]
    assert all(reason.endswith(".") for reason in why.values())


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be huge and has a few bytes of data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [11_000, 12_500, 60_000])
def test_a_picture_that_claims_to_be_huge_is_refused_before_decoding(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    assert "120 megapixels" in the_refused(tmp_path)["bomb.png"]


def test_no_damage_ever_escapes_as_another_error(tmp_path: Path) -> None:
    dice = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, kind in enumerate(
        ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000", "ICO", "PPM", "QOI"]
    ):
        whole = io.BytesIO()
        four_corners().save(whole, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
        for trial in range(12):
            raw = bytearray(whole.getvalue())
            for _ in range(dice.randint(1, 8)):
                raw[dice.randrange(min(len(raw), 200))] = dice.randrange(256)
            (tmp_path / f"{number}-{trial}.png").write_bytes(raw[: dice.choice([len(raw), dice.randrange(len(raw))])])
    good(tmp_path)
    pictures, refused = find_pictures(tmp_path, least_side=16)
    assert len(pictures) + len(refused) == 11 * 12 + 1
    assert len(refused) > 40


def test_twins_are_refused_by_name(tmp_path: Path) -> None:
    first = good(tmp_path, "a.png")
    (tmp_path / "b.png").write_bytes(first.read_bytes())
    pictures, refused = find_pictures(tmp_path, least_side=16)
    assert len(pictures) == 1
    assert refused == [Refused(tmp_path / "b.png", "It is the same picture as a.png. Remove one of them.")]
    assert find_pictures([first, first], least_side=16)[1][0].path == first


def test_a_folder_is_read_in_natural_order_without_its_hidden_files_and_folders(tmp_path: Path) -> None:
    for at, name in enumerate(["b10.png", "b9.png", "B1.png", "12.png", "2.png", ".hidden.png"]):
        Image.new("RGB", (32, 32), (at, at, at)).save(tmp_path / name)
    (tmp_path / "inner").mkdir()
    good(tmp_path / "inner")
    for name in ("notes.txt", "a.caption", "x.json", "dataset.toml"):
        (tmp_path / name).write_text("words")
    pictures, refused = find_pictures(str(tmp_path), least_side=16)
    assert [picture.path.name for picture in pictures] == ["2.png", "12.png", "B1.png", "b9.png", "b10.png"]
    assert sorted(bad.path.name for bad in refused) == ["a.caption", "inner", "notes.txt", "x.json"]


@pytest.mark.parametrize(
    ("name", "raw", "caption"),
    [
        ("a.txt", b"  a toy,\n red \r\n", "a toy, red"),
        ("a.txt", b"\xef\xbb\xbfa toy", "a toy"),
        ("a.caption", "Bär".encode("latin-1"), "Bär"),
        ("a.png.txt", "Bär".encode(), "Bär"),
        ("a.txt", "Bär".encode("utf-16"), "Bär"),
        ("a.txt", b" \n", None),
        ("b.txt", b"another's", None),
    ],
)
def test_captions_beside_pictures_are_read(tmp_path: Path, name: str, raw: bytes, caption: str | None) -> None:
    good(tmp_path, "a.png")
    (tmp_path / name).write_bytes(raw)
    (picture,), _ = find_pictures(tmp_path, least_side=16)
    assert picture.caption == caption
    assert (images.EMPTY_CAPTION in picture.notes) == (raw == b" \n")


def test_nothing_usable_is_an_error_that_names_everything(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        find_pictures(tmp_path / "nowhere", least_side=16)
    with pytest.raises(UserError, match="It is empty"):
        find_pictures(tmp_path, least_side=16)
    for nothing in ("", [], [""]):
        with pytest.raises(UserError, match="No pictures were chosen"):
            find_pictures(nothing, least_side=16)
    (tmp_path / "10_sks toy").mkdir()
    with pytest.raises(UserError, match="sub-folders: 10_sks toy"):
        find_pictures(tmp_path, least_side=16)
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_text("words")
    with pytest.raises(UserError, match=r"a\.png: It is empty .*b\.png: It is not a picture"):
        find_pictures(tmp_path, least_side=16)
    with pytest.raises(UserError, match=r"gone\.png: It is not there"):
        find_pictures([tmp_path / "gone.png"], least_side=16)


def test_a_picture_that_changed_since_is_noticed(tmp_path: Path) -> None:
    (picture,), _ = find_pictures([good(tmp_path)], least_side=16)
    assert open_again(picture).size == (48, 32)
    Image.new("RGB", (48, 32)).save(picture.path)
    with pytest.raises(UserError, match=r"good\.png has changed"):
        open_again(picture)


def a_picture(name: str, width: int = 512, height: int = 512, **more: object) -> Picture:
    return Picture(Path(name), width, height, name, **more)  # type: ignore[arg-type]


def test_a_person_is_told_what_matters_before_start() -> None:
    pictures = [
        a_picture("a.png", 100, 90, caption="sks toy on grass", notes=(images.TURNED,)),
        a_picture("b.png", 4000, 3000, caption="a toy on grass", notes=(images.FIRST_FRAME, "first page of several")),
        a_picture("c.png", 512, 2000, notes=(images.EMPTY_CAPTION, images.ON_WHITE)),
    ]
    refused = [Refused(Path("x.png"), f"{images.DUPLICATE} a.png."), Refused(Path("y.png"), "It is empty.")]
    captions = ["sks toy on grass", "a toy on grass", "a toy, grass"]
    said = "\n".join(look_over(pictures, refused, captions, trigger="sks", resolution=512))
    for part in (
        "y.png is left out. It is empty.",
        "1 duplicate is left out: x.png",
        "2 of 3 pictures have a caption file",
        "1 caption file is empty, so the template is taken: c.png",
        '"sks" is missing from 2 captions (b.png, c.png)',
        "share these words: toy, grass.",
        "only 3 pictures",
        "1 picture is smaller than the training size of 512 pixels and will be enlarged, which blurs: a.png",
        "b.png has 1333 times as many pixels as a.png",
        "very long or tall and will be cropped much: c.png",
        "Turned upright from EXIF data: a.png",
        "See-through parts were laid on white: c.png",
        "Only the first frame of an animation is used: b.png",
        "b.png: first page of several.",
    ):
        assert part in said


def test_there_is_nothing_to_say_about_a_good_set() -> None:
    pictures = [a_picture(f"{n}.png") for n in range(8)]
    assert look_over(pictures, [], ["a photo of sks toy"] * 8, trigger="sks", resolution=512) == []
    captioned = [replace(picture, caption="an icon of sks toy on grass") for picture in pictures]
    said = look_over(
        captioned, [], [p.caption for p in captioned], trigger="sks", resolution=512, expected="toy icon of"
    )
    assert said == [one for one in said if "share these words: grass." in one] and said
