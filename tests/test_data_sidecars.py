"""Captions and masks: which image they belong to, in what encoding they are read, and what is told of the others."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from reparam_diffusion.data.check import look_over
from reparam_diffusion.data.images import find_pictures
from reparam_diffusion.data.masks import find_unused_masks, mask_files
from reparam_diffusion.data.text_files import read_texts
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs.datasets import sort_files


def save(*files: Path) -> None:
    """An image each, all different."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        number = hash(str(file)) % 2**24
        Image.new("RGB", (64, 48), (number >> 16, number >> 8 & 255, number & 255)).save(file)


def read(source: Path | list[Path]) -> dict[str, tuple[str | None, str | None]]:
    pictures, _ = find_pictures(source, least_side=8)
    return {
        f"{one.path.parent.name}/{one.path.name}": (one.caption, one.mask and f"{one.mask.parent.name}/{one.mask.name}")
        for one in pictures
    }


def test_images_of_one_name_in_several_folders_keep_their_own_captions_and_masks(tmp_path: Path) -> None:
    for name in ("10_cat", "30_dog"):
        save(tmp_path / name / "image1.png", tmp_path / name / "image1-masklabel.png")
        (tmp_path / name / "image1.txt").write_text(f"of {name}")
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    expected = {f"{name}/image1.png": (f"of {name}", f"{name}/image1-masklabel.png") for name in ("10_cat", "30_dog")}
    assert read(files) == expected
    assert {f"{one.path.parent.name}/image1.png": one.caption for one in sort_files(files[::-1]).pictures} == {
        name: caption for name, (caption, _) in expected.items()
    }
    (tmp_path / "10_cat" / "image1.txt").unlink()
    assert read([file for file in files if file.exists()])["10_cat/image1.png"][0] is None


@pytest.mark.parametrize("kind", ["image1.txt", "IMAGE1.TXT", "image1-masklabel.png"])
def test_a_sidecar_that_fits_several_uploads_is_asked_about(tmp_path: Path, kind: str) -> None:
    files = [tmp_path / str(number) / name for number, name in enumerate(["image1.png", "image1.png", kind])]
    save(*files[:2])
    if kind.endswith("png"):
        save(files[2])
    else:
        files[2].parent.mkdir()
        files[2].write_text("whose?")
    with pytest.raises(UserError, match="could belong to several images") as told:
        sort_files(files)
    assert "2/" not in told.value.what and kind in told.value.what


def test_two_captions_of_one_name_for_one_upload_are_asked_about_unless_they_agree(tmp_path: Path) -> None:
    files = [tmp_path / str(number) / name for number, name in enumerate(["a.png", "a.txt", "a.txt"])]
    save(files[0])
    for file, text in zip(files[1:], ("one", "other"), strict=True):
        file.parent.mkdir()
        file.write_text(text)
    with pytest.raises(UserError, match="several caption files"):
        sort_files(files)
    files[2].write_text("one")
    assert sort_files(files).pictures[0].caption == "one"


def test_names_that_differ_in_case_alone_are_told_apart(tmp_path: Path) -> None:
    save(tmp_path / "A.png", tmp_path / "a.png")
    (tmp_path / "A.txt").write_text("capital")
    (tmp_path / "a.txt").write_text("small")
    assert read(tmp_path) == {f"{tmp_path.name}/A.png": ("capital", None), f"{tmp_path.name}/a.png": ("small", None)}
    (tmp_path / "A.txt").unlink()
    assert read(tmp_path)[f"{tmp_path.name}/A.png"][0] is None


@pytest.mark.parametrize("name", ["x.TXT", "X.txt", "x.Caption", "x.png.TXT"])
def test_endings_in_capitals_are_read_alike_from_folders_lists_and_uploads(tmp_path: Path, name: str) -> None:
    save(tmp_path / "x.png")
    (tmp_path / name).write_text("words")
    assert find_pictures(tmp_path, least_side=8)[0][0].caption == "words"
    assert find_pictures([tmp_path / "x.png"], least_side=8)[0][0].caption == "words"
    assert sort_files(sorted(tmp_path.iterdir())).pictures[0].caption == "words"


@pytest.mark.parametrize(("image", "beside"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_unicode_forms_of_one_name_are_the_same_name(tmp_path: Path, image: str, beside: str) -> None:
    name, other = (unicodedata.normalize(form, "Bär") for form in (image, beside))  # type: ignore[arg-type]
    save(tmp_path / f"{name}.png", tmp_path / f"{other}-masklabel.png", tmp_path / "masks" / f"{other}.png")
    (tmp_path / f"{other}.txt").write_text("a bear")
    pictures, refused = find_pictures(tmp_path, least_side=8)
    assert (pictures[0].caption, pictures[0].mask) == ("a bear", tmp_path / f"{other}-masklabel.png")
    assert mask_files(pictures, str(tmp_path / "masks"), place="data.masks") == [tmp_path / "masks" / f"{other}.png"]
    assert [bad.path.name for bad in refused] == ["masks"]


def test_whatever_is_not_used_is_listed_with_the_reason(tmp_path: Path) -> None:
    save(tmp_path / "a.png", tmp_path / "sub" / "b.png", tmp_path / "gone-masklabel.png")
    for name in ("a.txt", "a.caption", "nobody.txt", "meta.jsonl"):
        (tmp_path / name).write_text("words")
    for source in (tmp_path, [file for file in tmp_path.iterdir() if file.is_file()]):
        pictures, refused = find_pictures(source, least_side=8)
        assert [one.path.name for one in pictures] == ["a.png"]
        why = {bad.path.name: bad.why for bad in refused}
        folders = {"sub"} if source == tmp_path else set()
        assert set(why) == {"gone-masklabel.png", "nobody.txt", "a.caption", "meta.jsonl"} | folders
        assert "a.txt is used" in why["a.caption"] and 'no image "gone"' in why["gone-masklabel.png"]
    said = "\n".join(look_over(pictures, refused, ["words"], trigger="", resolution=8))
    assert all(f"{name} is left out." in said for name in why)


def test_a_duplicates_caption_is_not_dropped_without_a_word(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "b.txt").write_text("only b has one")
    assert "b.txt is not used" in find_pictures(tmp_path, least_side=8)[1][0].why


def test_masks_of_a_folder_that_fit_no_image_or_two_are_told(tmp_path: Path) -> None:
    save(tmp_path / "1" / "a.png", tmp_path / "2" / "a.png", tmp_path / "m" / "A.PNG", tmp_path / "m" / "lone.png")
    pictures, _ = find_pictures([tmp_path / "1" / "a.png"], least_side=8)
    assert mask_files(pictures, str(tmp_path / "m"), place="data.masks") == [tmp_path / "m" / "A.PNG"]
    assert [bad.path.name for bad in find_unused_masks(pictures, str(tmp_path / "m"), place="x")] == ["lone.png"]
    both, _ = find_pictures([tmp_path / "1" / "a.png", tmp_path / "2" / "a.png"], least_side=8)
    with pytest.raises(UserError, match="could be the mask of several images") as told:
        mask_files(both, str(tmp_path / "m"), place="data.masks")
    assert told.value.place == "data.masks"


# --- encodings --------------------------------------------------------------------------------------------------------
def write(folder: Path, texts: list[tuple[str, str]]) -> list[Path]:
    files = []
    for number, (text, encoding) in enumerate(texts):
        files.append(folder / f"{number}.txt")
        files[-1].write_bytes(text.encode(encoding))
    return files


def test_texts_of_many_encodings_in_one_folder_are_read(tmp_path: Path) -> None:
    texts = [
        ("sks toy, 你好", "gb2312"), ("sks toy, ハロー", "shift_jis"), ("sks toy, привет", "cp1251"),
        ("sks toy, plain words", "utf-16-le"), ("sks toy, plain", "utf-16-be"), ("a boy’s toy", "cp1252"),
        ("sks toy, with a mark", "utf-16"), ("一只玩具, sks", "utf-16-le"), ("sks", "utf-32-le"), ("ein Bär", "cp1252"),
        ("ein Bär", "utf-8-sig"), ("sks toy, ハロー", "iso2022_jp"),
    ]  # fmt: skip
    files = write(tmp_path, texts)
    assert [read_texts(files)[file].text for file in files] == [text for text, _ in texts]


@pytest.mark.parametrize(
    ("encoding", "texts"),
    [
        ("cp1251", ["sks собака на траве", "фото sks собака, диван", "зима, снег", "красная машина"]),
        ("koi8_r", ["sks собака на траве", "фото sks собака, диван", "зима, снег", "красная машина"]),
        ("gb18030", ["sks 狗, 草地", "sks 狗 坐在沙发上", "雪地, 冬天", "一只 sks 狗在跑"]),
        ("big5", ["sks 狗, 草地", "sks 狗 坐在沙發上", "雪地", "一隻 sks 狗在跑"]),
        ("cp932", ["sks 犬, 草", "sks 犬がソファに座っている", "雪", "走っている sks 犬"]),
        ("cp949", ["sks 개, 풀밭", "소파에 앉은 sks 개", "달리는 sks 개", "sks 개, 해변"]),
        ("cp1252", ["sks chien à la plage", "un chien sks, forêt", "été", "le garçon et sks"]),
        ("cp1250", ["sks pies na łące", "pies sks, śnieg", "źrebię", "pies sks, plaża, słońce"]),
        ("cp1254", ["sks köpek, çimen", "köpek sks, kış", "güneş", "ağaç altında sks"]),
        ("cp1253", ["sks σκύλος", "σκύλος sks, χιόνι", "sks στην παραλία", "γρασίδι"]),
    ],
)
def test_a_folder_in_one_encoding_is_read_in_it(tmp_path: Path, encoding: str, texts: list[str]) -> None:
    files = write(tmp_path, [(text, encoding) for text in texts])
    read = read_texts(files)
    assert [read[file].text for file in files] == texts
    assert len({read[file].encoding for file in files}) == 1


def test_a_detected_encoding_is_shown_with_what_was_read(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("sks toy, ハロー".encode("shift_jis"))
    for pictures in (find_pictures(tmp_path, least_side=8)[0], sort_files(sorted(tmp_path.iterdir())).pictures):
        said = "\n".join(look_over(pictures, [], [str(pictures[0].caption)], trigger="sks", resolution=8))
        assert "Shift-JIS" in said and "ハロー" in said and "a.png" in said


@pytest.mark.parametrize("raw", [b"\0\1\2\3\xff\xfe\0", b"sks\0toy", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_what_is_no_text_is_no_caption_and_told(tmp_path: Path, raw: bytes) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(raw)
    (picture,), _ = find_pictures(tmp_path, least_side=8)
    assert picture.caption is None or "\0" not in picture.caption
    said = "\n".join(look_over([picture], [], [""], trigger="", resolution=8))
    assert "a.txt is not used" in said or "not UTF-8" in said
