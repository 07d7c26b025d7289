"""Training from pictures to a file, on tiny random models: every method, every family, stop, pause, full disk."""

from __future__ import annotations

import datetime
import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import save_pictures, save_tiny

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.apply import Easel, apply_adapter, generate
from reparam_diffusion.config import parse_set, settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import (
    Event,
    Finished,
    Paused,
    Ranked,
    Sampled,
    Saved,
    Started,
    Step,
    Stopped,
    Validated,
    Warned,
)
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.jobs.runs import create_run
from reparam_diffusion.models.load import load_model
from reparam_diffusion.training.loop import train


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models by name."""
    place = tmp_path_factory.mktemp("models")
    return {
        "sd1": save_tiny(place / "sd1", "sd1"),
        "v": save_tiny(place / "v", "sd1", prediction="v_prediction", zero_snr=True),
        "zero-epsilon": save_tiny(place / "ze", "sd1", zero_snr=True),
        "sdxl": save_tiny(place / "sdxl", "sdxl"),
    }


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


def config_for(model: Path, pictures: Path, *assignments: str) -> Any:
    base = [
        f"model.path='{model}'", "model.precision=fp32", f"data.images='{pictures}'", "data.trigger=sks",
        "data.class_word=toy", "training.steps=4", "output.file_precision=fp32", "output.sample_prompts=['a photo of {trigger}']",
    ]  # fmt: skip
    return settle(parse_set([*base, *assignments]))


def run(config: Any, folder: Path, **named: Any) -> list[Event]:
    return list(train(config, folder=folder, **named))


def of(kind: type[Event], events: Sequence[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_its_file_draws_the_trained_picture(
    method: str, models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    config = config_for(
        models["sd1"], pictures, f"adapter.method={method}", "training.learning_rate=0.05", "training.warmup=0.0",
        "targets.text_encoder=attention+mlp", "training.steps=6", "training.schedule=constant",
    )  # fmt: skip
    events = run(config, tmp_path)
    assert isinstance(events[-1], Finished)
    assert [event.step for event in of(Step, events)] == [1, 2, 3, 4, 5, 6]
    started = of(Started, events)[0]
    assert started.sites > 0 and started.parameters > 0
    first, last = (tmp_path / event.path for event in (of(Sampled, events)[0], of(Sampled, events)[-1]))
    assert first.read_bytes() != last.read_bytes()
    model = load_model(models["sd1"], dtype=torch.float32)
    before = generate(model, "a photo of sks", steps=3)[0]
    after = generate(model, "a photo of sks", adapters=[tmp_path / "adapter.safetensors"], steps=3)[0]
    assert before.tobytes() != after.tobytes()
    assert generate(model, "a photo of sks", steps=3)[0].tobytes() == before.tobytes()
    size = (tmp_path / "adapter.safetensors").stat().st_size
    assert 0.4 < size / (2 * started.file_bytes) < 2.5, "fp32 is twice the fp16 that was told"


@pytest.mark.parametrize("average", ["training.ema=0.5", "training.optimizer=adamw_schedulefree"])
def test_the_untrained_looks_come_after_the_first_step_and_show_no_trace_of_it(
    average: str, models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    if "schedulefree" in average:
        pytest.importorskip("schedulefree")
    config = config_for(
        models["sd1"], pictures, "adapter.method=oft", "training.learning_rate=0.5", "training.warmup=0.0",
        "targets.text_encoder=attention", "training.steps=2", average,
    )  # fmt: skip
    events = run(config, tmp_path)
    told = [(type(event).__name__, event.step) for event in events if isinstance(event, Step | Validated | Sampled)]
    assert told[:3] == [("Step", 1), ("Validated", 0), ("Sampled", 0)]
    preview = of(Sampled, events)[0]
    base = load_model(models["sd1"], dtype=torch.float32)
    drawn = generate(base, preview.prompt, seed=preview.seed)[0]
    with Image.open(tmp_path / preview.path) as image:
        assert image.tobytes() == drawn.tobytes()
    assert of(Validated, events)[0].loss != of(Validated, events)[1].loss


@pytest.mark.parametrize("family", ["sd1", "v", "sdxl"])
def test_every_family_trains_with_its_text_encoders(
    family: str, models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    config = config_for(
        models[family], pictures, "targets.text_encoder=attention+mlp", "targets.unet=all", "training.batch=2",
        "prior.weight=0.5", "prior.images=2", "prior.steps=2", "training.warmup=0.0", "data.caption_dropout=0.0",
    )  # fmt: skip
    events = run(config, tmp_path)
    assert isinstance(events[-1], Finished)
    assert all(torch.isfinite(torch.tensor(event.loss)) for event in of(Step, events))
    assert set(of(Step, events)[0].learning_rates) == ({"unet", "te1", "te2"} if family == "sdxl" else {"unet", "te1"})
    keys = load_file(tmp_path / "adapter.safetensors")
    assert any(key.startswith("lora_te2_text_model_" if family == "sdxl" else "lora_te_text_model_") for key in keys)
    model = load_model(models[family], dtype=torch.float32)
    with apply_adapter(model, tmp_path / "adapter.safetensors") as applied:
        assert not applied.unmatched
        assert len(applied.sites) == of(Started, events)[0].sites


def test_zero_terminal_snr_refuses_epsilon(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="zero-terminal SNR"):
        run(config_for(models["zero-epsilon"], pictures), tmp_path)


def test_zero_terminal_snr_holds_for_training_previews_and_the_header(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", "sd1", prediction="v_prediction")
    first: list[int] = []
    real = torch.nn.Module.__call__

    def watched(module: Any, *args: Any, **named: Any) -> Any:
        if type(module).__name__ == "UNet2DConditionModel" and not torch.is_grad_enabled() and len(args[1:2]):
            first.append(int(torch.as_tensor(args[1]).max()))
        return real(module, *args, **named)

    monkeypatch.setattr(torch.nn.Module, "__call__", watched)
    config = config_for(
        model, pictures, "model.zero_terminal_snr=true", "training.steps=2", "output.validate_every=100"
    )
    events = run(config, tmp_path / "run")
    assert all(torch.isfinite(torch.tensor(event.loss)) for event in of(Step, events))
    assert 999 in first, "previews start at the last timestep"
    header = read_adapter(tmp_path / "run" / "adapter.safetensors").metadata
    assert (header["ss_zero_terminal_snr"], header["ss_min_snr_gamma"]) == ("True", "None")
    assert config.training.min_snr_gamma == 5.0
    assert [event.message for event in of(Warned, events) if "Min-SNR is off" in event.message]

    file = tmp_path / "run" / "adapter.safetensors"
    plain, to_noise = (load_model(model, device="cpu", zero_terminal_snr=asked) for asked in (False, True))
    alike = [generate(one, "a sks", adapters=[file], steps=2)[0].tobytes() for one in (plain, to_noise)]
    assert alike[0] == alike[1] != generate(plain, "a sks", steps=2)[0].tobytes()
    easel = Easel(plain)
    easel.put([file])
    assert easel.zero_terminal_snr
    easel.put([])
    assert not easel.zero_terminal_snr


@pytest.mark.parametrize(("own", "asked"), [("epsilon", "auto"), ("v_prediction", "epsilon")])
def test_zero_terminal_snr_without_v_prediction_is_told_before_a_run_is_made(
    own: str, asked: str, pictures: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", "sd1", prediction=own)
    config = config_for(model, pictures, "model.zero_terminal_snr=true", f"model.prediction_type={asked}")
    with pytest.raises(UserError, match="needs a model with v-prediction"):
        create_run(config, tmp_path / "workspace", now=datetime.datetime.now())
    assert not list((tmp_path / "workspace").glob("runs/*"))


def test_several_methods_share_a_run_by_rules(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    config = config_for(
        models["sd1"], pictures, "targets.unet=all", "training.warmup=0.0",
        "targets.rules=[{match='*attn*', adapter={method='lokr', factor=4}}, {match='*conv*', adapter={method='oft'}}]",
    )  # fmt: skip
    run(config, tmp_path)
    file = read_adapter(tmp_path / "adapter.safetensors")
    assert file.method == "mixed"
    adapters, unmatched = file.match(load_model(models["sd1"]).parts)
    assert not unmatched
    assert {adapter.name for adapter in adapters.values()} == {"lora", "lokr", "oft"}


def test_adalora_tells_its_ranks_and_they_sum_to_the_budget(
    models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    config = config_for(
        models["sd1"], pictures, "adapter.method=adalora", "adapter.init_rank=4", "adapter.target_rank=2",
        "training.steps=20", "training.learning_rate=0.02", "adapter.t_init=0.1", "adapter.t_final=0.3",
    )  # fmt: skip
    events = run(config, tmp_path)
    sites = of(Started, events)[0].sites
    assert sum(of(Ranked, events)[-1].ranks.values()) == 2 * sites
    ranks = read_adapter(tmp_path / "adapter.safetensors").ranks
    assert sum(ranks.values()) == 2 * sites


def test_stop_keeps_an_adapter_and_pause_a_place(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    config = config_for(models["sd1"], pictures, "training.steps=6")
    events: list[Event] = []
    for event in train(config, folder=tmp_path / "a", stop=lambda: "pause" if len(of(Step, events)) == 2 else ""):
        events.append(event)
    assert isinstance(events[-1], Paused) and events[-1].step == 2
    assert not (tmp_path / "a" / "adapter.safetensors").exists()
    events = run(config, tmp_path / "a", resume=True)
    assert of(Step, events)[0].step == 3 and isinstance(events[-1], Finished)
    events = []
    for event in train(config, folder=tmp_path / "b", stop=lambda: len(of(Step, events)) == 1):
        events.append(event)
    assert isinstance(events[-1], Stopped) and (tmp_path / "b" / "adapter.safetensors").is_file()


def test_accumulation_gives_the_gradient_of_one_large_batch(
    models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    same = ["training.steps=2", "training.warmup=0.0", "training.optimizer=sgd", "training.learning_rate=0.1"]
    run(config_for(models["sd1"], pictures, *same, "training.batch=2"), tmp_path / "a")
    run(config_for(models["sd1"], pictures, *same, "training.accumulation=2"), tmp_path / "b")
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in "ab")
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, two[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_gradient_checkpointing_changes_nothing_but_memory(
    family: str, models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    same = ["adapter.dropout=0.3", "adapter.rank_dropout=0.3", "targets.text_encoder=attention+mlp", "training.batch=2",
            "training.warmup=0.0", "training.learning_rate=0.01"]  # fmt: skip
    run(config_for(models[family], pictures, *same), tmp_path / "a")
    run(config_for(models[family], pictures, *same, "training.gradient_checkpointing=true"), tmp_path / "b")
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in "ab")
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, two[key], rtol=1e-5, atol=1e-7)


def test_held_out_pictures_give_a_best_file(models: dict[str, Path], tmp_path: Path) -> None:
    many = save_pictures(tmp_path / "pictures", count=9)
    events = run(config_for(models["sd1"], many, "training.warmup=0.0"), tmp_path / "run")
    assert all(event.held_out for event in of(Validated, events))
    assert any(event.best for event in of(Validated, events)) == (tmp_path / "run" / "best.safetensors").is_file()
    assert of(Started, events)[0].pictures == 8


def test_the_moving_average_is_what_is_saved(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    same = ["training.learning_rate=0.05", "training.warmup=0.0", "training.schedule=constant"]
    run(config_for(models["sd1"], pictures, *same), tmp_path / "a")
    run(config_for(models["sd1"], pictures, *same, "training.ema=0.5"), tmp_path / "b")
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in "ab")
    assert any(not torch.equal(tensor, two[key]) for key, tensor in one.items())


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adafactor", "radam", "nadam", "rmsprop"])
def test_every_optimizer_moves_the_adapter(
    optimizer: str, models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    config = config_for(
        models["sd1"], pictures, f"training.optimizer={optimizer}", "training.steps=2", "training.warmup=0.0",
        "output.sample_every=100", "output.validate_every=100", "targets.unet=attention",
    )  # fmt: skip
    run(config, tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert any(tensor.abs().sum() > 0 for key, tensor in tensors.items() if "up" in key)


def test_a_full_disk_fails_with_a_sentence_and_leaves_the_last_checkpoint_whole(
    models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(models["sd1"], pictures, "training.steps=6", "output.checkpoint_every=2")
    real, calls = torch.save, []

    def full(state: Any, path: Any) -> None:
        calls.append(path)
        if len(calls) > 1:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="disk is full"):
        run(config, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000002"]
    monkeypatch.undo()
    events = run(config, tmp_path, resume=True)
    assert of(Step, events)[0].step == 3


def test_only_the_last_checkpoints_stay(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    config = config_for(models["sd1"], pictures, "output.checkpoint_every=1", "output.keep_checkpoints=2")
    events = run(config, tmp_path)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["000003", "000004"]
    assert [event.step for event in of(Saved, events) if event.kind == "checkpoint"] == [1, 2, 3, 4]


def test_a_resume_with_other_pictures_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path / "pictures")
    config = config_for(models["sd1"], pictures, "training.steps=6")
    events: list[Event] = []
    for event in train(config, folder=tmp_path / "run", stop=lambda: "pause" if of(Step, events) else ""):
        events.append(event)
    (pictures / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png"):
        run(config, tmp_path / "run", resume=True)


def test_no_pictures_and_no_model_are_told(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No images were given"):
        run(settle({"model": {"path": str(models["sd1"])}}), tmp_path / "a")
    with pytest.raises(UserError, match="There is no model at"):
        run(config_for(tmp_path / "nowhere", pictures), tmp_path / "b")
