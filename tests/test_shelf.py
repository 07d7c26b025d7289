"""The shelf keeps every adapter, under a name that a person finds again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import shelf


def adapter(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "adapter.safetensors"
    file.write_bytes(content)
    return file


def test_another_adapter_of_the_same_name_gets_a_number_and_overwrites_nothing(tmp_path: Path) -> None:
    first = shelf.add(adapter(tmp_path, b"one"), tmp_path, name="My Teddy!")
    second = shelf.add(adapter(tmp_path, b"two"), tmp_path, name="my teddy")
    third = shelf.add(adapter(tmp_path, b"three"), tmp_path, name="my-teddy")
    assert [file.name for file in (first, second, third)] == [
        "my-teddy.safetensors",
        "my-teddy-2.safetensors",
        "my-teddy-3.safetensors",
    ]
    assert [file.read_bytes() for file in (first, second, third)] == [b"one", b"two", b"three"]


def test_the_same_bytes_stand_on_the_shelf_once_and_keep_their_notes(tmp_path: Path) -> None:
    first = shelf.add(adapter(tmp_path, b"one"), tmp_path, name="teddy")
    first.with_suffix(".json").write_text('{"notes": "mine"}')
    assert shelf.add(adapter(tmp_path, b"one"), tmp_path, name="teddy") == first
    assert json.loads(first.with_suffix(".json").read_text()) == {"notes": "mine"}
    assert [file.name for file in sorted((tmp_path / "adapters").iterdir())] == ["teddy.json", "teddy.safetensors"]


def test_notes_carry_the_sidecar_keys_of_a1111(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(b"png")
    added = shelf.add(
        adapter(tmp_path, b"x"), tmp_path, name="t", thumbnail=picture, facts={"activation text": "sks toy"}
    )
    notes = json.loads(added.with_suffix(".json").read_text())
    assert notes["activation text"] == "sks toy"
    assert {"preferred weight", "notes", "description", "sd version"} <= notes.keys()
    assert added.with_suffix(".png").read_bytes() == b"png"


def test_an_adapter_is_found_by_every_name_it_has(tmp_path: Path) -> None:
    added = shelf.add(adapter(tmp_path, b"x"), tmp_path, name="Mein Bär")
    for name in ("Mein Bär", "mein bär", "mein-bär", "mein-bär.safetensors", str(added)):
        assert shelf.find(name, tmp_path) == added


def test_a_wrong_name_is_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gallery is empty"):
        shelf.find("teddi", tmp_path)
    shelf.add(adapter(tmp_path, b"x"), tmp_path, name="teddy")
    with pytest.raises(UserError, match='Did you mean "teddy"'):
        shelf.find("teddi", tmp_path)


def test_broken_notes_hide_no_adapter(tmp_path: Path) -> None:
    added = shelf.add(adapter(tmp_path, b"x"), tmp_path, name="teddy")
    added.with_suffix(".json").write_text("{")
    assert [(one.file, one.name) for one in shelf.list_adapters(tmp_path)] == [(added, "teddy")]


@pytest.mark.parametrize(
    ("name", "slug"),
    [("../../etc/passwd", "etc-passwd"), ("", "adapter"), ("!!!", "adapter"), ("熊", "熊"), ("A" * 99, "a" * 48)],
)
def test_a_slug_is_a_safe_file_name(name: str, slug: str) -> None:
    assert shelf.make_slug(name) == slug
