"""What can be checked is checked before anything is written; a full disk ends a run with a sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_worker import fake_train
from run_folders import NOW, new_run
from tiny_pipelines import save_pictures, save_tiny

from reparam_diffusion import events as e
from reparam_diffusion.config import TrainConfig, parse_set, settle
from reparam_diffusion.data import disk_cache
from reparam_diffusion.data.cache import TensorStore
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import event_log, launchers, runs, worker
from reparam_diffusion.models.outline import outline
from reparam_diffusion.training import prepare as preparing
from reparam_diffusion.training import state
from reparam_diffusion.training.estimate import cost_of, work_of
from reparam_diffusion.training.loop import train


def config_with(tmp_path: Path, *more: str) -> TrainConfig:
    model = tmp_path / "model"
    if not model.is_dir():
        save_tiny(model, "sd1")
        save_pictures(tmp_path / "pictures", count=3)
    base = [
        f"model.path='{model}'", "model.precision=fp32", "model.device=cpu", f"data.images='{tmp_path / 'pictures'}'",
        "data.trigger=sks", "training.steps=4", "output.checkpoint_every=2", "output.sample_every=1000",
    ]  # fmt: skip
    return settle(parse_set([*base, *more]))


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("model.path=nowhere-at-all", "model.path"),
        ("model.path=nobody/has-this", "model.path"),
        ("model.path='{tmp}'", ""),
        ("model.vae=nowhere.safetensors", "model.vae"),
        ("model.vae='{tmp}'", "model.vae"),
        ("model.vae='{tmp}/text.txt'", "model.vae"),
        ("training.start_from='{tmp}/none.safetensors'", "training.start_from"),
        ("targets.unet=['nothing*']", "targets.unet"),
    ],
)
def test_what_cannot_be_is_told_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, place: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("no weights")
    config = config_with(tmp_path, setting.format(tmp=tmp_path))
    with pytest.raises(UserError) as error:
        launchers.new_run(config, tmp_path / "ws", now=NOW)
    assert error.value.place.startswith(place)
    with pytest.raises(UserError):
        list(train(config, folder=tmp_path / "run"))
    assert not (tmp_path / "ws").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["data.images='{tmp}/none'", "data.masks='{tmp}/none'", "data.images=''"])
def test_images_that_are_not_there_are_told_in_python_before_a_folder_is_made(tmp_path: Path, setting: str) -> None:
    with pytest.raises(UserError) as error:
        list(train(config_with(tmp_path, setting.format(tmp=tmp_path)), folder=tmp_path / "run"))
    assert error.value.place.startswith("data.") and not (tmp_path / "run").exists()


def test_a_vae_that_is_not_there_has_no_estimate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="VAE") as error:
        cost_of(config_with(tmp_path, "model.vae=none"), pictures=3, workspace=tmp_path, threads=1)
    assert error.value.place == "model.vae"


# --- a full disk -----------------------------------------------------------------------------------------------------
def test_a_disk_that_is_full_for_events_ends_the_run_with_a_sentence(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = new_run(workspace), os.write

    def full(fd: int, data: bytes) -> int:
        if b'"step": 6' in data and b"Step" in data:
            return write(fd, data[:10])  # a short write is how a full disk begins
        return write(fd, data)

    monkeypatch.setattr(event_log.os, "write", full)
    last = list(worker.work(folder, train=fake_train))[-1]
    assert isinstance(last, e.Failed) and "disk is full" in last.what
    told = runs.state_of(folder)
    assert told.state == "failed" and "disk is full" in told.message and told.checkpoint == 5
    assert not (folder / ".reserve").exists()
    monkeypatch.undo()
    assert isinstance(list(worker.work(folder, resume=True, train=fake_train))[-1], e.Finished)


def test_a_disk_that_is_full_for_a_checkpoint_leaves_the_one_before_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, saved = config_with(tmp_path), state.torch.save

    def full(what: dict[str, object], place: Path) -> None:
        if what["step"] == 4:
            Path(place).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(what, place)

    monkeypatch.setattr(state.torch, "save", full)
    with pytest.raises(UserError, match="disk is full"):
        list(train(config, folder=tmp_path / "run"))
    assert state.steps_saved(tmp_path / "run") == [2]
    assert not [file for file in (tmp_path / "run").rglob("*") if ".part" in file.name or file.name.startswith(".0")]
    monkeypatch.undo()
    assert isinstance(list(train(config, folder=tmp_path / "run", resume=True))[-1], e.Finished)


# --- class images ----------------------------------------------------------------------------------------------------
def events_of(config: TrainConfig, folder: Path) -> Iterator[e.Event]:
    return train(config, folder=folder)


@pytest.mark.parametrize("more", [[], ["training.batch=2", "training.accumulation=2"], ["data.flip=true"]])
def test_only_class_images_that_a_batch_shows_are_encoded_and_the_estimate_counts_them(
    tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with(tmp_path, "prior.weight=1.0", "prior.images=5", "prior.steps=1", *more)
    for number, size in enumerate([(96, 48), (48, 96), (64, 64)]):
        save_pictures(tmp_path / f"more{number}", count=1, size=size)
        for file in sorted((tmp_path / f"more{number}").glob("*.png")):
            file.rename(tmp_path / "pictures" / f"more{number}-{file.name}")
    encoded: list[tuple[str, bool]] = []
    plain = preparing.Latents.get

    def get(self, item, flip):  # type: ignore[no-untyped-def]
        before = set(self._cache.store._held)
        found = plain(self, item, flip)
        encoded.extend((key, flip) for key in set(self._cache.store._held) - before)
        return found

    monkeypatch.setattr(preparing.Latents, "get", get)
    told = [one for one in events_of(config, tmp_path / "runs" / "one") if isinstance(one, e.Prepared)]
    done = max(one.total for one in told if one.phase == "latents")
    assert len(encoded) == done, "each is encoded before the first step, and nothing else is"
    from reparam_diffusion.data.images import sides_of

    sides = sides_of(config.data.images)
    base = outline(config.model.path)
    assert work_of(base, config, pictures=len(sides), class_pictures=0, sides=sides)["latents"] == done
    assert done < 2 * len(sides) + 5 * len(set(sides))


# --- caches ----------------------------------------------------------------------------------------------------------
def test_caches_are_measured_bounded_and_cleared(tmp_path: Path) -> None:
    import torch

    store = TensorStore(tmp_path / ".cache" / "latents")
    for number in range(4):
        store.get(f"{number}", lambda: {"mean": torch.zeros(1000)})
    files = sorted((tmp_path / ".cache" / "latents").iterdir(), key=lambda file: file.stat().st_mtime)
    for age, file in enumerate(files):
        os.utime(file, (1000 + age, 1000 + age))
    sizes = disk_cache.cache_sizes(tmp_path)
    assert sizes["latents"] > 16000 and sum(sizes.values()) == sizes["latents"]
    one = files[0].stat().st_size
    assert disk_cache.bound_cache(tmp_path / ".cache", since=1e12, most=3 * one) == one
    assert not files[0].exists() and files[1].exists()
    assert disk_cache.bound_cache(tmp_path / ".cache", since=1001.0, most=0) == 0, "what a run uses stays"
    assert disk_cache.clear_caches(tmp_path) == 3 * one and not any(disk_cache.cache_sizes(tmp_path).values())


def test_what_is_kept_in_memory_has_no_memory_besides_its_own(tmp_path: Path) -> None:
    import torch

    large = torch.zeros(100, 10)
    for _ in range(2):  # built, then read again
        kept = TensorStore(tmp_path).get("key", lambda: {"mean": large[3]})["mean"]
        assert kept.untyped_storage().nbytes() == kept.nbytes
