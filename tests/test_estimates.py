"""What a run will cost: the file to the byte, memory by its laws, work counted as real runs do it, times kept and scaled."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pipelines import save_pictures, save_tiny
from torch import nn
from typer.testing import CliRunner

from reparam_diffusion import events as e
from reparam_diffusion.__main__ import app
from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import TrainConfig, find_preset, parse_set, settle, to_toml
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.write import write_adapter
from reparam_diffusion.jobs import estimates, locks, runs
from reparam_diffusion.jobs.locks import device_of
from reparam_diffusion.models.load import load_model
from reparam_diffusion.models.outline import outline, shape_of
from reparam_diffusion.models.precision import vae_dtype
from reparam_diffusion.targets import build_adapters, count_parameters, file_bytes
from reparam_diffusion.training.estimate import Cost, Part, cost_of, memory_piece, work_of
from reparam_diffusion.training.estimate_memory import Ledger, count_memory, largest
from reparam_diffusion.training.estimate_pace import Book, Piece, scaled, seconds_of
from reparam_diffusion.training.estimate_probe import Interrupted, probe
from reparam_diffusion.training.learner import plan_run
from reparam_diffusion.training.loop import train
from reparam_diffusion.training.prepare import class_pictures_left
from reparam_diffusion.training.ready import outline_for


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing measured elsewhere counts here, and nothing measured here stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "sd1", "sd1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"), count=9)


def config_for(model: Path | str, pictures: Path, *assignments: str) -> TrainConfig:
    base = [
        f"model.path='{model}'", "model.precision=fp32", f"data.images='{pictures}'", "data.trigger=sks",
        "data.class_word=toy", "training.steps=7", "output.sample_prompts=['a photo of {trigger}']",
    ]  # fmt: skip
    return settle(parse_set([*base, *assignments]))


# --- the file --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_the_file_is_as_large_as_told(method: str, tmp_path: Path) -> None:
    config = settle(find_preset(f"{method}-subject"))
    base = outline("starter")
    sites = plan_run(base, config)
    told = file_bytes(sites)
    model = load_model("starter")
    assert plan_run(model, config) == sites, "an outline is planned like the model"
    finished = [replace(site, plan=site.plan.finished()) for site in sites]
    adapters = build_adapters(model.parts, finished, seed=0)
    header = {"reparam_config": to_toml(config)}
    file = write_adapter(tmp_path / "a.safetensors", adapters, parts=model.parts, family="sd1", metadata=header)
    assert abs(told / file.stat().st_size - 1) < 0.02
    assert abs(file_bytes(sites, "fp32") / told - 2) < 0.5, "fp32 is about twice as large"


def test_a_decomposed_lora_counts_its_magnitudes() -> None:
    plain, dora = (
        plan_run(outline("starter"), settle(parse_set([f"adapter.weight_decompose={word}"])))
        for word in ("false", "true")
    )
    assert count_parameters(dora) - count_parameters(plain) == sum(site.shape[0] for site in dora)


# --- memory ----------------------------------------------------------------------------------------------------------
def test_the_ledger_counts_what_lives_at_once() -> None:
    x = torch.empty(1000, device="meta")
    with Ledger([x]) as ledger:
        y = x + 1  # 4,000 bytes
        z = y[:500]  # a view
        del y
        assert ledger.live == 4000, "a view keeps the whole"
        del z
        assert ledger.live == 0
        x.add_(1)
        w = (x + 1).half()
        assert (ledger.live, ledger.peak) == (2000, 6000)
    assert w.numel() == 1000


def test_the_ledger_counts_what_autograd_keeps() -> None:
    layer = nn.Linear(8, 16, device="meta").requires_grad_(False)
    x = torch.empty(10, 8, device="meta", requires_grad=True)
    with Ledger([x, *layer.parameters()]) as ledger:
        loss = layer(x).sigmoid().square().sum()
        kept = 4 * (10 * 16 + 1)  # the sigmoid's output, once, and the loss
        assert ledger.live == kept
        loss.backward()
    assert x.grad is not None


def test_memory_follows_its_laws(tiny: Path, pictures: Path) -> None:
    base = outline(tiny)

    def peak(*assignments: str, device: str = "cuda") -> int:
        config = config_for(tiny, pictures, "targets.text_encoder=attention", "training.batch=8", *assignments)
        return count_memory(base, config, device).peak

    plain = peak()
    assert peak("training.batch=16") > plain
    assert peak("prior.weight=1.0") == pytest.approx(peak("training.batch=16"), rel=0.05)
    assert peak(device="cpu") > plain, "a processor's libraries come on top"


def test_memory_has_the_moving_average_and_the_largest_bucket_in_it(tiny: Path, pictures: Path) -> None:
    base = outline(tiny)

    def training(*assignments: str) -> int:
        return count_memory(base, config_for(tiny, pictures, *assignments), "cpu").training

    averaged = 4 * count_parameters(plan_run(base, config_for(tiny, pictures)))
    assert training("training.ema=0.9") - training() == pytest.approx(averaged, rel=0.01)
    settings = ["data.resolution=160", "training.batch=8"]
    width, height = largest(base, config_for(tiny, pictures, *settings))
    assert width * height > 160 * 160
    assert largest(base, config_for(tiny, pictures, *settings, "data.buckets=false")) == (160, 160)
    assert training(*settings) > training(*settings, "data.buckets=false")


def test_memory_knows_the_vae_that_is_chosen(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    other = load_model(tiny, device="cpu").vae
    other.register_to_config(force_upcast=False)
    other.save_pretrained(tmp_path / "other")
    cpu, config = torch.device("cpu"), config_for(tiny, pictures)
    chosen = config_for(tiny, pictures, f"model.vae='{tmp_path / 'other'}'")
    outlines = [outline_for(one, cpu).vae for one in (config, chosen)]
    assert [vae_dtype(vae.config, torch.device("cuda")) for vae in outlines] == [torch.float32, torch.float16]
    assert outlines[1].encoder.conv_in.weight.is_meta
    single = config_for(tiny, pictures, "model.vae='one.safetensors'")
    assert outline_for(single, cpu).vae is outline_for(config, cpu).vae


@pytest.mark.parametrize(("device", "words"), [("cpu", "memory for 2 processes"), ("cuda", "GPU memory on each card")])
def test_memory_of_several_processes_is_told_for_what_they_share(device: str, words: str) -> None:
    cost = Cost(3, 1000, 2000, (), 0, 5 * 10**9, device, (), processes=2)
    assert f"It needs about 5.0 GB of {words}" in " ".join(cost.sentences())


def test_processes_on_a_processor_share_its_memory(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    one, two = config_for(tiny, pictures), config_for(tiny, pictures, "launch.processes=2")
    cpu = torch.device("cpu")
    Book().write({memory_piece(shape_of(str(tiny)), one, cpu): 10**9})
    costs = [cost_of(config, pictures=9, workspace=tmp_path, threads=1) for config in (one, two)]
    assert [cost.peak_bytes for cost in costs] == [10**9, 2 * 10**9]


@pytest.mark.parametrize("method", METHODS)
def test_recomputing_saves_memory_and_the_outline_is_left_as_it_was(method: str, tiny: Path, pictures: Path) -> None:
    base = outline(tiny)
    plain, less = (
        count_memory(
            base,
            config_for(
                tiny, pictures, f"adapter.method={method}", "training.batch=8", "targets.text_encoder=attention",
                f"training.gradient_checkpointing={word}",
            ),
            "cuda",
        ).peak
        for word in ("false", "true")
    )  # fmt: skip
    assert less < plain
    modules = [module for part in base.parts.values() for module in part.modules()]
    assert not any("forward" in module.__dict__ or module.training for module in modules)


# --- time ------------------------------------------------------------------------------------------------------------
def test_the_work_is_what_a_run_does(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    config = config_for(
        tiny, pictures, "prior.weight=0.5", "prior.images=2", "prior.steps=1", "output.sample_every=3",
        "output.checkpoint_every=2", "output.validate_every=4", "data.flip=true", "data.held_out=0",
    )  # fmt: skip
    workspace = tmp_path / "w"
    base = outline(tiny)
    left = class_pictures_left(base, config, workspace)
    assert left == 2
    told = work_of(base, config, pictures=9, class_pictures=left)
    events = list(train(config, folder=workspace / "runs" / "one"))
    prepared = {event.phase: event.total for event in events if isinstance(event, e.Prepared)}
    assert told["step"] == sum(isinstance(event, e.Step) for event in events)
    assert told["preview"] == sum(isinstance(event, e.Sampled) for event in events)
    assert told["checkpoint"] == sum(isinstance(event, e.Saved) and event.kind == "checkpoint" for event in events)
    assert told["fixed-noise loss"] == 8 * sum(isinstance(event, e.Validated) for event in events)
    assert told["latents"] == prepared["latents"] and told["class picture"] == prepared["class pictures"]
    assert told["captions"] >= prepared["captions"], "captions may be the same"
    assert class_pictures_left(base, config, workspace) == 0, "class pictures of an earlier run are free"
    more = config.model_copy(update={"prior": config.prior.model_copy(update={"images": 5})})
    assert class_pictures_left(base, more, workspace) == 3
    other = config.model_copy(update={"prior": config.prior.model_copy(update={"steps": 2})})
    assert class_pictures_left(base, other, workspace) == 2


def test_a_runs_pace_is_read_from_its_events() -> None:
    def steps(seconds: list[float]) -> list[e.Event]:
        return [e.Step(n, 1.0, {}, each, None, time=10.0 + n) for n, each in enumerate(seconds, 1)]

    old = [e.Launched(1, "", time=0.0), *steps([9.0] * 9)]
    now: list[e.Event] = [
        e.Launched(1, "", time=0.0),
        e.Prepared("class pictures", 0, 8, time=1.0),
        e.Prepared("class pictures", 8, 8, time=1.001),  # they were there already
        e.Prepared("latents", 0, 4, time=2.0),
        e.Prepared("latents", 4, 4, time=4.0),
        *steps([7.0, 5.0, 3.0, 1.0, 2.0, 1.0]),
        e.Validated(6, 0.5, False, time=20.0),
        e.Sampled(6, "", 0, "", time=21.5),
        e.Saved(6, "", "checkpoint", time=22.0),
    ]
    assert seconds_of([*old, *now], looked_at=4) == {
        "latents": 0.5, "step": 1.0, "fixed-noise loss": 1.0, "preview": 1.5, "checkpoint": 0.5,
    }  # fmt: skip
    assert "step" not in seconds_of([e.Launched(1, "", time=0.0), *steps([1.0] * 5)], looked_at=1), "too few to tell"


def test_amounts_scale_along_the_line_through_the_two_nearest() -> None:
    assert scaled({2.0: 3.0}, 4.0) == 6.0
    assert scaled({1.0: 2.0, 2.0: 3.0, 100.0: 1000.0}, 4.0) == 5.0
    assert scaled({1.0: 3.0, 2.0: 2.0}, 4.0) == 4.0, "noise that falls is no line; the nearest is scaled"


def test_the_book_keeps_the_last_word_and_knows_its_likes(tmp_path: Path) -> None:
    book = Book(tmp_path / "b" / "book.jsonl")
    piece = Piece("step", "here", "rank 8", 2.0)
    assert book.read() == {} and book.expect(piece) is None
    book.write({piece: 1.0})
    book.write({piece: 3.0, replace(piece, exact="rank 4"): 9.0})
    with book.file.open("a") as file:
        file.write('{"unit": "torn\n')
    found = book.expect(piece)
    assert found is not None and (found.seconds, found.is_measured) == (3.0, True)
    twice = book.expect(replace(piece, amount=4.0))
    assert twice is not None and (twice.seconds, twice.is_measured) == (6.0, False), "its own rank comes first"
    other = book.expect(replace(piece, exact="rank 16"))
    assert other is not None and not other.is_measured
    assert book.expect(replace(piece, like="there")) is None and book.expect(replace(piece, unit="preview")) is None


def test_a_sum_with_a_gap_is_not_told() -> None:
    cost = Cost(3, 1000, 2000, (Part("training", 10.0, "measured"), Part("previews", None, "")), 0, None, "cpu", ())
    assert cost.seconds is None
    assert any("not known yet" in line for line in cost.sentences())
    whole = replace(cost, parts=cost.parts[:1], peak_bytes=3_000_000_000)
    assert whole.seconds == 10.0
    assert "It needs about 3.0 GB of memory (estimated)." in whole.sentences()


def test_a_probe_times_every_piece_and_leaves_when_asked(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    config = config_for(tiny, pictures, "prior.weight=1.0", "prior.steps=1", "adapter.method=adalora")
    found = probe(config, tmp_path / "probe", may_go_on=lambda: True)
    assert set(found) == {"loading", "latents", "captions", "class picture", "preview", "fixed-noise loss", "step"}
    assert all(seconds > 0 for seconds in found.values())
    left = iter([True] * 12)
    with pytest.raises(Interrupted):
        probe(config, tmp_path / "other", may_go_on=lambda: next(left, False))


# --- asked for and found out -----------------------------------------------------------------------------------------
@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been started."""
    commands: list[Any] = []

    def start(command: list[str], log: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(pid=os.getpid())

    monkeypatch.setattr(estimates, "start_detached", start)
    monkeypatch.setattr(locks, "device_lock", lambda device: Path(estimates.cache_file(f"{device}.lock")))
    return commands


def test_what_is_not_known_is_found_out_once(tiny: Path, pictures: Path, tmp_path: Path, started: list[Any]) -> None:
    configs = [config_for(tiny, pictures, f"adapter.method={name}") for name in ("lora", "oft")]
    cost = estimates.cost(configs[0], pictures=9, workspace=tmp_path)
    assert cost.seconds is None and cost.peak_bytes is None and cost.parameters > 0
    assert estimates.find_out(configs)
    assert estimates.find_out(configs), "asked again while it is being found out"
    assert len(started) == 1
    estimates.serve()
    for config in configs:
        cost = estimates.cost(config, pictures=9, workspace=tmp_path)
        assert cost.seconds and cost.peak_bytes
        assert {part.source for part in cost.parts} == {"measured on this machine"}
    assert not estimates.find_out(configs)
    assert len(started) == 1
    bigger = config_for(tiny, pictures, "training.batch=4")
    cost = estimates.cost(bigger, pictures=9, workspace=tmp_path)
    training = next(part for part in cost.parts if part.name == "training")
    assert training.source == "estimated from similar work on this machine"


def test_a_run_that_holds_the_device_is_not_disturbed(
    tiny: Path, pictures: Path, tmp_path: Path, started: list[Any]
) -> None:
    config = config_for(tiny, pictures)
    with locks.try_hold(locks.device_lock(device_of(config))) as held:
        assert held
        assert estimates.find_out([config])
        estimates.serve()
        cost = estimates.cost(config, pictures=9, workspace=tmp_path)
        assert cost.peak_bytes and cost.seconds is None
        assert not estimates.find_out([config]), "there is nothing to do until the device is free"
    assert estimates.find_out([config])


def test_what_failed_is_not_tried_again(
    tiny: Path, pictures: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(estimates, "probe", broken)
    config = config_for(tiny, pictures)
    assert estimates.find_out([config])
    estimates.serve()
    assert not estimates.find_out([config])


def test_a_real_run_is_remembered(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    config = config_for(tiny, pictures)
    folder = tmp_path / "w" / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    estimates.remember(folder)
    assert Book().read() == {}, "a run that has not begun shows nothing"
    with runs.EventLog(folder) as log:
        for event in train(config, folder=folder):
            log.append(event)
    estimates.remember(folder)
    units = {piece.unit for piece in Book().read()}
    assert {"step", "preview", "fixed-noise loss", "checkpoint"} <= units


def test_a_dry_run_tells_the_cost(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    settings = [f"--set={key}" for key in (f"model.path='{tiny}'", "adapter.rank=64", "training.steps=5")]
    words = ["train", "--images", str(pictures), "--trigger", "sks", "--dry-run", "--workspace", str(tmp_path)]
    told = CliRunner().invoke(app, [*words, *settings])
    assert told.exit_code == 0, told.output
    assert "layers" in told.output and "a file of about" in told.output and "of memory (estimated)" in told.output
    assert "not known yet" in told.output and "is used" in told.output
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_not_there_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not on this machine"):
        outline("somebody/no-such-model")
    index = {"_class_name": "StableDiffusionPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        outline(tmp_path)


def test_the_book_stays_short_and_keeps_the_newest(tmp_path: Path) -> None:
    book = Book(tmp_path / "book.jsonl")
    rows = {Piece("step", "here", "x" * 400, float(number)): 1.0 for number in range(3000)}
    book.write(rows)
    assert book.file.stat().st_size < 1_000_000
    assert list(book.read()) == list(rows)[1500:]
