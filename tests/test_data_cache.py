"""Laws of the caches: asked once, the same from memory and disk, mended when damaged."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from reparam_diffusion.data.cache import LatentCache, TensorStore, TextCache, item_pixels, to_pixels
from reparam_diffusion.data.dataset import Item, Part, build_dataset
from reparam_diffusion.data.images import find_pictures


class Encoder:
    """A stand-in for the VAE that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        assert pixels.shape[:2] == (1, 3)
        assert not torch.is_grad_enabled()
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, mean.abs() + 0.1


@pytest.fixture
def item(tmp_path: Path) -> Item:
    ramp = Image.linear_gradient("L").rotate(90).resize((60, 40)).convert("RGB")
    (tmp_path / "pictures").mkdir()
    ramp.save(tmp_path / "pictures" / "a.png")
    pictures, _ = find_pictures(tmp_path / "pictures", least_side=16)
    return build_dataset([Part(pictures, ["a ramp"], [None])], resolution=96, step=32).train[0]


def test_pixels_run_from_minus_one_to_one() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 127))
    image.putpixel((2, 0), (255, 0, 0))
    pixels = to_pixels(image)
    assert pixels.shape == (3, 2, 3)
    assert pixels[:, 1, 0].tolist() == pytest.approx([-1, 1, 127 / 127.5 - 1])
    assert pixels[:, 0, 2].tolist() == [1, -1, -1]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_picture_is_encoded_once_plain_and_once_mirrored(item: Item, tmp_path: Path, on_disk: bool) -> None:
    encode = Encoder()
    cache = LatentCache(tmp_path / "cache" if on_disk else None, "vae")
    mean, std = cache.get(item, False, encode)
    width, height = item.size
    assert mean.shape == std.shape == (3, height // 8, width // 8)
    assert torch.equal(mean, encode_plainly(item)[0])
    mirrored, _ = cache.get(item, True, encode)
    assert torch.allclose(mirrored, mean.flip(-1), atol=1e-6)
    assert not torch.equal(mirrored, mean)
    assert torch.equal(cache.get(item, False, encode)[0], mean)
    assert encode.calls == 2
    again = LatentCache(tmp_path / "cache" if on_disk else None, "vae")
    assert torch.equal(again.get(item, False, encode)[0], mean)
    assert encode.calls == (2 if on_disk else 3)


def encode_plainly(item: Item) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        mean, std = Encoder()(item_pixels(item)[None])
    return mean[0], std[0]


def test_another_vae_type_or_size_is_another_entry(item: Item, tmp_path: Path) -> None:
    encode = Encoder()
    LatentCache(tmp_path, "vae").get(item, False, encode)
    LatentCache(tmp_path, "other").get(item, False, encode)
    half, _ = LatentCache(tmp_path, "vae", dtype=torch.bfloat16).get(item, False, encode)
    square = Item(item.picture, item.caption, (64, 64), False)
    LatentCache(tmp_path, "vae").get(square, False, encode)
    assert encode.calls == 4
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b"half"])
def test_a_damaged_file_is_mended_silently(item: Item, tmp_path: Path, damage: bytes) -> None:
    encode = Encoder()
    folder = tmp_path / "cache"
    mean, _ = LatentCache(folder, "vae").get(item, False, encode)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
    assert torch.equal(LatentCache(folder, "vae").get(item, False, encode)[0], mean)
    assert encode.calls == 2
    assert file.read_bytes() == whole
    assert [left.name for left in folder.iterdir()] == [file.name]


def test_many_writers_and_readers_never_meet_half_a_file(tmp_path: Path) -> None:
    value = torch.arange(2000.0)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            store = TensorStore(tmp_path)
            if not torch.equal(store.get("key", lambda: {"value": value})["value"], value) or store.trouble:
                wrong.append(store.trouble or "another value")
            for file in tmp_path.glob("*.safetensors"):
                file.unlink(missing_ok=True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert list(tmp_path.glob(".*.part")) == []


def test_a_folder_that_cannot_be_written_is_told_and_memory_serves(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = TensorStore(tmp_path / "file" / "cache")
    assert store.get("key", lambda: {"value": torch.ones(2)})["value"].sum() == 2
    assert store.get("key", dict)["value"].sum() == 2
    assert "cannot be written" in store.trouble


def test_what_is_kept_does_not_follow_the_encoders_own_tensor() -> None:
    value = torch.ones(2)
    store = TensorStore(None)
    store.get("key", lambda: {"value": value})
    value.zero_()
    assert store.get("key", dict)["value"].sum() == 2


def test_text_is_kept_by_caption_encoder_and_clip_skip(tmp_path: Path) -> None:
    calls: list[str] = []

    def encode(caption: str) -> dict[str, Tensor]:
        calls.append(caption)
        return {"hidden": torch.full((1, 4, 8), float(len(caption))), "pooled": torch.ones(1, 8)}

    first = TextCache(tmp_path, "clip")
    kept = first.get("a toy", encode)
    assert kept["hidden"].shape == (1, 4, 8)
    assert torch.equal(TextCache(tmp_path, "clip").get("a toy", encode)["hidden"], kept["hidden"])
    first.get("", encode)
    TextCache(tmp_path, "clip", clip_skip=1).get("a toy", encode)
    TextCache(tmp_path, "other").get("a toy", encode)
    TextCache(None, "clip").get("a toy", encode)
    assert calls == ["a toy", "", "a toy", "a toy", "a toy"]
