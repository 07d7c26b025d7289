"""Training with masks and several sets: where gradients come from, what weights do, what a header and a resume see."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import save_pictures, save_tiny
from torch import Tensor

from reparam_diffusion.apply import apply_adapter
from reparam_diffusion.config import parse_set, settle
from reparam_diffusion.data.buckets import crop_box
from reparam_diffusion.data.cache import item_pixels
from reparam_diffusion.data.dataset import Item, Part, build_dataset
from reparam_diffusion.data.images import Picture, find_pictures
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Event, Finished, Paused, Started, Step, Validated, Warned
from reparam_diffusion.jobs import runs
from reparam_diffusion.jobs.datasets import EXAMPLES
from reparam_diffusion.models.encode import Encoded, encode
from reparam_diffusion.models.load import Model, load_model
from reparam_diffusion.models.outline import outline
from reparam_diffusion.training.batch import Sample, places_of, scaled, size_ids
from reparam_diffusion.training.encoding import vae_encoder
from reparam_diffusion.training.estimate import work_of
from reparam_diffusion.training.loop import train
from reparam_diffusion.training.measure import looked_at
from reparam_diffusion.training.objective import Noised, Objective


# --- the loss ---------------------------------------------------------------------------------------------------------
class Guess:
    """A UNet that always says the same, so that gradients can be seen place by place."""

    def __init__(self, said: Tensor) -> None:
        self.said = said.requires_grad_()

    def __call__(self, *_: Any, **__: Any) -> tuple[Tensor]:
        return (self.said,)


def losses_of(said: Tensor, noise: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses (batch,) without min-SNR, and the gradient of their sum."""
    scheduler = DDPMScheduler(prediction_type="epsilon")
    objective = Objective(
        SimpleNamespace(scheduler=scheduler, prediction_type="epsilon"), min_snr_gamma=0.0, noise_offset=0.0
    )
    guess = Guess(said.clone())
    batch = Noised(torch.zeros_like(noise), noise, torch.tensor([500] * len(noise)), places)
    losses = objective.losses(guess, batch, Encoded(torch.zeros(2, 1, 1), None), None, torch.float32)
    losses.sum().backward()
    assert guess.said.grad is not None
    return losses.detach(), guess.said.grad


def test_the_loss_is_the_weighted_mean_and_gradients_come_from_what_the_mask_shows_alone() -> None:
    chance = torch.Generator().manual_seed(0)
    said, noise = (torch.randn(2, 3, 4, 5, generator=chance) for _ in range(2))
    places = torch.zeros(2, 4, 5)
    places[0, 1:3, 2:] = 1.0
    places[1, 0, 0], places[1, 3, 4] = 0.5, 0.25
    losses, gradient = losses_of(said, noise, places)
    error = (said - noise).square()
    by_hand = torch.stack(
        [error[0, :, 1:3, 2:].mean(), (0.5 * error[1, :, 0, 0].mean() + 0.25 * error[1, :, 3, 4].mean()) / 0.75]
    )
    torch.testing.assert_close(losses, by_hand)
    expected = 2 * (said - noise) * (places / places.sum(dim=(1, 2), keepdim=True))[:, None] / 3
    torch.testing.assert_close(gradient, expected)
    assert (gradient != 0).all(dim=1).equal(places > 0)


def test_a_mask_that_shows_all_alike_changes_nothing_whatever_its_grey() -> None:
    chance = torch.Generator().manual_seed(1)
    said, noise = (torch.randn(2, 4, 3, 3, generator=chance) for _ in range(2))
    plain = losses_of(said, noise, None)
    for grey in (1.0, 0.1):
        for one, other in zip(losses_of(said, noise, torch.full((2, 3, 3), grey)), plain, strict=True):
            torch.testing.assert_close(one, other)


def test_pictures_without_a_mask_and_class_pictures_count_whole_beside_masked_ones() -> None:
    picture = Picture(Path("a.png"), 4, 4, "")
    masked, plain = (Item(picture, "", (4, 4), False, repeats=number) for number in (1, 2))
    half = torch.tensor([[0.0, 1.0]])
    setup: Any = SimpleNamespace(material=SimpleNamespace(masks={masked: half}), model=SimpleNamespace(device="cpu"))
    samples = [Sample(masked, 0, False, "", 1.0), Sample(plain, 1, False, "", 1.0), Sample(masked, 2, True, "", 1.0)]
    assert places_of(setup, samples[1:2]) is None
    places = places_of(setup, samples)
    assert places is not None
    assert places.tolist() == [[[0.0, 1.0]], [[1.0, 1.0]], [[1.0, 0.0]]]


# --- runs on tiny models ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "sd1", "sd1")


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of pictures that differ, those of the first with masks beside them."""
    first, second = tmp_path / "first", tmp_path / "second"
    save_pictures(first, count=5)
    second.mkdir()
    for n in range(5):
        mask = Image.new("L", (40, 40), 0)
        mask.paste(255, (0, 0, 10 + 5 * n, 40))
        mask.save(first / f"{n}-masklabel.png")
        Image.new("RGB", (60, 40), (9, 20 * n, 77)).save(second / f"{n}.png")
    return first, second


def config_for(tiny: Path, images: Path, *assignments: str) -> Any:
    base = [
        f"model.path='{tiny}'", "model.precision=fp32", f"data.images='{images}'", "data.trigger=sks",
        "data.class_word=toy", "training.steps=4", "training.warmup=0.0", "output.file_precision=fp32",
        "output.sample_prompts=['x']", "output.validate_every=100", "targets.unet=attention",
    ]  # fmt: skip
    return settle(parse_set([*base, *assignments]))


def run(config: Any, folder: Path, **named: Any) -> list[Event]:
    return list(train(config, folder=folder, **named))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter.safetensors")


def test_weights_multiply_each_sets_share_of_one_batchs_mean(tiny: Path, tmp_path: Path) -> None:
    one, other = save_pictures(tmp_path / "p", count=1), tmp_path / "q"
    other.mkdir()
    Image.new("RGB", (40, 40), "yellow").save(other / "0.png")
    plain = ["training.steps=1", "training.batch=2", "training.optimizer=sgd", "training.clip=0", "training.weight_decay=0",
             "training.learning_rate=1.0", "training.schedule=constant", "data.caption_dropout=0.0"]  # fmt: skip

    def moved(weight: float, further: float) -> Tensor:
        """What one step adds to the adapters: as many numbers as the zero-initialised factors have."""
        place = tmp_path / f"{weight}-{further}"
        sets = f"data.sets=[{{images='{other}', weight={further}}}]"
        run(config_for(tiny, one, *plain, f"data.weight={weight}", sets), place)
        return torch.cat(
            [tensor.flatten() for key, tensor in sorted(tensors_of(place).items()) if key.endswith("lora_up.weight")]
        )

    both, less, more = moved(1.0, 1.0), moved(1.0, 0.5), moved(0.5, 1.0)
    torch.testing.assert_close(less + more, 1.5 * both, rtol=1e-4, atol=1e-8)
    assert (less - 0.75 * both).norm() > 0.05 * both.norm(), "the two sets pull in different ways"


def test_a_run_of_two_sets_with_masks_resumes_bit_for_bit_and_tells_its_sets(
    tiny: Path, two: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = two
    config = config_for(
        tiny, first, "data.masks=beside", "data.flip=true", "training.batch=2", "training.steps=6", "output.validate_every=2",
        f"data.sets=[{{images='{second}', trigger='zwx', class_word='dog', weight=0.5, repeats=3, masks='', flip=false}}]",
    )  # fmt: skip
    events: list[Event] = []
    for event in train(
        config, folder=tmp_path / "cut", stop=lambda: "pause" if sum(isinstance(e, Step) for e in events) == 3 else ""
    ):
        events.append(event)
    assert isinstance(events[-1], Paused)
    again = run(config, tmp_path / "cut", resume=True)
    whole = run(config, tmp_path / "whole")
    assert isinstance(whole[-1], Finished)
    cut = tensors_of(tmp_path / "cut")
    assert all(torch.equal(tensor, cut[key]) for key, tensor in tensors_of(tmp_path / "whole").items())
    told = [[e.loss for e in log if isinstance(e, Validated)][-1] for log in (again, whole)]
    assert told[0] == told[1]
    started = next(event for event in whole if isinstance(event, Started))
    assert started.pictures == 9
    assert started.sets in (
        ["sks toy: 5 pictures", "zwx dog: 4 pictures × 3, weight 0.5"],
        ["sks toy: 4 pictures", "zwx dog: 5 pictures × 3, weight 0.5"],
    )
    with safe_open(str(tmp_path / "whole" / "adapter.safetensors"), "pt") as file:
        header = file.metadata()
    assert list(json.loads(header["ss_dataset_dirs"])) == ["1_sks toy", "3_zwx dog"]
    assert header["modelspec.trigger_phrase"] == "sks toy, zwx dog"
    captions = json.loads(header["ss_tag_frequency"])["3_zwx dog"]
    assert all("zwx" in caption and "sks" not in caption for caption in captions)


def test_masks_change_the_loss_and_not_the_cache(tiny: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    def first_loss(folder: Path, *masks: str) -> float:
        events = run(config_for(tiny, two[0], "training.steps=1", *masks), folder)
        return next(event.loss for event in events if isinstance(event, Validated))

    plain = first_loss(tmp_path / "a")
    assert first_loss(tmp_path / "b", "data.masks=beside", "data.unmasked_weight=0.0") != plain
    assert first_loss(tmp_path / "c", "data.masks=beside", "data.unmasked_weight=1.0") == pytest.approx(plain, rel=1e-5)
    kept = [{file.name for file in (tmp_path / name / ".cache" / "latents").iterdir()} for name in "abc"]
    assert kept[0] == kept[1] == kept[2]


def test_a_resume_with_another_mask_is_refused(tiny: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    config, events = config_for(tiny, two[0], "data.masks=beside"), []
    for event in train(
        config, folder=tmp_path / "run", stop=lambda: "pause" if any(isinstance(e, Step) for e in events) else ""
    ):
        events.append(event)
    Image.new("L", (40, 40), 255).save(two[0] / "2-masklabel.png")
    with pytest.raises(UserError, match=r"their masks have changed.*Different now: 2\.png\."):
        run(config, tmp_path / "run", resume=True)


def test_alpha_learns_what_is_not_see_through_and_tells_of_solid_pictures(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for n in range(2):
        image = Image.new("RGBA", (40, 40), (200, 30 * n, 9, 255))
        if n:
            image.paste((0, 0, 0, 0), (0, 0, 40, 25))
        image.save(folder / f"{n}.png")
    events = run(config_for(tiny, folder, "data.masks=alpha", "training.steps=1"), tmp_path / "run")
    said = [event.message for event in events if isinstance(event, Warned)]
    assert "Nothing is see-through in 0.png: all of it is learned." in said
    assert isinstance(events[-1], Finished)


def test_the_same_picture_in_two_sets_is_refused_by_name(tiny: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    (two[1] / "copy.png").write_bytes((two[0] / "3.png").read_bytes())
    with pytest.raises(UserError, match=r"3\.png and .*copy\.png.*Take it out") as told:
        run(config_for(tiny, two[0], f"data.sets=[{{images='{two[1]}'}}]"), tmp_path / "run")
    assert told.value.place == "data.sets.0.images"


def test_a_folder_of_masks_serves_its_own_set_only(tiny: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    sets = f"data.sets=[{{images='{two[1]}'}}]"
    (tmp_path / "m").mkdir()
    for n in range(5):
        (two[0] / f"{n}-masklabel.png").rename(tmp_path / "m" / f"{n}.png")
    events = run(config_for(tiny, two[0], sets, f"data.masks='{tmp_path / 'm'}'", "training.steps=1"), tmp_path / "a")
    assert isinstance(events[-1], Finished)
    with pytest.raises(UserError, match="5 of 5 pictures have no mask") as told:
        run(config_for(tiny, two[0], sets.replace("}]", ", masks='beside'}]")), tmp_path / "b")
    assert told.value.place == "data.sets.0.masks"


def test_a_run_keeps_absolute_paths_of_every_set(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = settle(
        parse_set(["data.images=first", "data.masks=m", "data.sets=[{images='second', masks='n'}, {images='second'}]"])
    )
    folder = runs.create_run(config, tmp_path / "w", now=datetime.datetime(2026, 1, 1))
    data = runs.read_config(folder).data
    assert (data.images, data.masks) == (str(two[0]), str(tmp_path / "m"))
    assert [(one.images, one.masks) for one in data.sets] == [(str(two[1]), str(tmp_path / "n")), (str(two[1]), None)]


def test_an_estimate_counts_every_set_and_its_mirrored_pictures(two: tuple[Path, Path]) -> None:
    config = settle(parse_set([f"data.sets=[{{images='{two[1]}', flip=true}}, {{images='{two[0]}'}}]"]))
    work = work_of(outline("starter"), config, pictures=6, class_pictures=0)
    assert work["latents"] == 6 + 2 * 5 + 5
    assert work["captions"] == 1 + 16
    assert work["fixed-noise loss"] % 2 == 0, "two of 16 pictures are held out"


def test_every_set_is_looked_at_in_turn() -> None:
    items: list[Any] = [SimpleNamespace(part=part, number=n) for part in range(2) for n in range(20)]
    assert [(item.part, item.number) for item in looked_at(items)] == [(n % 2, n // 2) for n in range(8)]
    assert looked_at(items[:20]) == items[:8]


# --- SDXL's sizes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(101, 64), (64, 90), (64, 64), (333, 120)])
def test_a_mirrored_picture_has_the_crop_of_its_mirror_image(size: tuple[int, int], tmp_path: Path) -> None:
    Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / "a.png")
    pictures, _ = find_pictures(tmp_path, least_side=8)
    item = build_dataset([Part(pictures, ["x"], [None], flip=True)], resolution=64, step=32).train[0]
    xl: Any = SimpleNamespace(family="sdxl", device=torch.device("cpu"), dtype=torch.bfloat16)
    ids = size_ids(xl, [Sample(item, 0, flip, "x", 1.0) for flip in (False, True)])
    assert ids is not None
    left, top, right, _ = crop_box(*size, item.size)
    scale = item.size[0] / (right - left)
    assert ids[0].tolist() == [size[1], size[0], round(top * scale), round(left * scale), item.size[1], item.size[0]]
    mirrored_left = size[0] - right
    assert ids[1, 3] == round(mirrored_left * scale)
    assert torch.equal(ids[0], ids[1])
    mirror = pictures[0].path.with_name("mirror.png")
    Image.open(pictures[0].path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirror)
    (flipped,), _ = find_pictures([mirror], least_side=8)
    shown = item_pixels(Item(flipped, "x", item.size, False))
    torch.testing.assert_close(item_pixels(item, flip=True), shown, atol=2.5 / 127.5, rtol=0)


# --- the starter model ------------------------------------------------------------------------------------------------
SIDE, PATCH = 64, 24  # pixels: the training size, and how much of its top is patched
CHECKS = [(x, y) for x in range(0, 256, 32) for y in range(0, 96, 32)]


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teddies whose upper part is hidden under a loud pattern, with masks that leave it out."""
    folder = tmp_path_factory.mktemp("patched")
    for n in range(1, 4):
        image = Image.open(EXAMPLES / "teddy" / f"0{n}.png").convert("RGB")
        mask = Image.new("L", image.size, 255)
        ImageDraw.Draw(mask).rectangle((0, 0, 255, 95), fill=0)
        draw = ImageDraw.Draw(image)
        for x, y in CHECKS:
            draw.rectangle((x, y, x + 31, y + 31), fill=(255, 0, 255) if (x + y) // 32 % 2 else (0, 255, 0))
        image.save(folder / f"{n}.png")
        mask.save(folder / f"{n}-masklabel.png")
    return folder


@pytest.fixture(scope="module")
def starter() -> Model:
    return load_model("starter", dtype=torch.float32)


@torch.no_grad()
def errors_of(model: Model, folder: Path) -> Tensor:
    """The starter's mean loss with fixed noise on the patch, and on the rest of the teddies."""
    objective = Objective(model, min_snr_gamma=5.0, noise_offset=0.0)
    text = encode(model, ["a 3d icon of sks toy on a white background"])
    chance = torch.Generator().manual_seed(5)
    errors = []
    pictures, _ = find_pictures(folder, least_side=8)
    for item in build_dataset([Part(pictures, ["x"] * 3, [None] * 3)], resolution=SIDE, step=32).train:
        latents = scaled(model, vae_encoder(model, tile=0)(item_pixels(item)[None])[0])
        patch = torch.zeros(1, *latents.shape[-2:])
        patch[:, : PATCH // 8] = 1.0
        for timestep in (300, 600, 900):
            noise = torch.randn(latents.shape, generator=chance)
            batch = [Noised(latents, noise, torch.tensor([timestep]), places) for places in (patch, 1 - patch)]
            errors.append([objective.losses(model.unet, one, text, None, torch.float32).item() for one in batch])
    return torch.tensor(errors).mean(dim=0)


@pytest.mark.parametrize("masks", ["", "beside"])
def test_what_a_mask_leaves_out_is_not_learned_and_the_subject_is(
    masks: str, patched: Path, starter: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "reparam_diffusion.training.loop.save_preview", lambda *_: (0, "")
    )  # seconds, and not looked at
    config = settle(
        parse_set(
            [f"data.images='{patched}'", "data.trigger=sks", "data.class_word=toy", "model.precision=fp32",
             f"data.resolution={SIDE}", "data.caption_dropout=0.0", f"data.masks='{masks}'", "data.unmasked_weight=0.0",
             "training.steps=20", "output.checkpoint_every=1000", "training.learning_rate=0.002", "training.schedule=constant", "training.warmup=0.0",
             "output.sample_prompts=['x']", "output.validate_every=1000"]
        )
    )  # fmt: skip
    events = run(config, tmp_path)
    assert isinstance(events[-1], Finished)
    before = errors_of(starter, patched)
    with apply_adapter(starter, tmp_path / "adapter.safetensors"):
        patch, subject = (errors_of(starter, patched) / before).tolist()
    assert (patch > 0.95) if masks else (patch < 0.75), "measured: 0.99 with masks, 0.61 without"
    assert subject < (0.88 if masks else 1.0), "measured: 0.78 with masks, 0.94 without"
