"""How a model is drawn with when memory or time is short: number format, slices, weights in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from studio_tiny import FAST
from tiny_pipelines import save_tiny

from reparam_diffusion import inject
from reparam_diffusion.adapters.lora import LoraSpec
from reparam_diffusion.models import drawing
from reparam_diffusion.models.load import Model, load_model
from reparam_diffusion.models.sample import draw
from reparam_diffusion.targets import build_adapters, plan_sites


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save_tiny(tmp_path_factory.mktemp("models") / "tiny", "sd1"), device="cpu")


def full_above(
    model: Model, monkeypatch: pytest.MonkeyPatch, most: int, *, in_slices: int = 0, error: Exception | None = None
) -> list[tuple[int, str]]:
    """Let the UNet run out of memory for more than `most` latents at once, or more than those with its attention in
    slices; tells what it was called with.
    """
    calls: list[tuple[int, str]] = []
    plain = model.unet.forward

    def hungry(latents: torch.Tensor, *rest: Any, **named: Any) -> Any:
        calls.append((len(latents), type(next(iter(model.unet.attn_processors.values()))).__name__))
        if len(latents) > (in_slices if calls[-1][1] == "SlicedAttnProcessor" else most):
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return plain(latents, *rest, **named)

    monkeypatch.setattr(model.unet, "forward", hungry)
    return calls


@pytest.mark.parametrize(
    ("most", "tried"),
    [
        (4, [(8, "AttnProcessor2_0"), (4, "AttnProcessor2_0")]),
        (1, [(8, "AttnProcessor2_0"), (4, "AttnProcessor2_0"), (2, "AttnProcessor2_0"), (2, "SlicedAttnProcessor")]),
    ],
)
def test_fewer_are_drawn_at_once_when_the_memory_runs_out_and_one_in_slices_at_last(
    model: Model, monkeypatch: pytest.MonkeyPatch, most: int, tried: list[tuple[int, str]]
) -> None:
    seeds, steps = [1, 2, 3, 4], FAST["steps"]
    plain = draw(model, "a toy", seeds=seeds, **FAST)
    told: list[tuple[int, int]] = []
    calls = full_above(model, monkeypatch, most, in_slices=2)
    drawn = draw(model, "a toy", seeds=seeds, on_step=lambda done, total: bool(told.append((done, total))), **FAST)
    assert list(dict.fromkeys(calls)) == tried
    assert sorted(told) == told and told[-1] == (4 * steps, 4 * steps)
    for one, other in zip(plain, drawn, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
    assert {type(one).__name__ for one in model.unet.attn_processors.values()} == {"AttnProcessor2_0"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
    ],
)
def test_memory_of_a_cpu_or_mps_that_runs_out_lowers_the_batch_as_well(
    model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls = full_above(model, monkeypatch, 4, error=error)
    assert len(draw(model, "a toy", seeds=[1, 2, 3, 4], **FAST)) == 4
    assert list(dict.fromkeys(count for count, _ in calls)) == [8, 4]


def test_another_error_while_drawing_stays_what_it_is(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    full_above(model, monkeypatch, 4, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        draw(model, "a toy", seeds=[1, 2, 3, 4], **FAST)


def test_memory_that_is_not_enough_for_one_in_slices_either_is_told(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = full_above(model, monkeypatch, 1)
    with pytest.raises(torch.OutOfMemoryError):
        draw(model, "a toy", seeds=[1, 2], **FAST)
    assert [count for count, _ in calls] == [4, 2, 2]
    assert {type(one).__name__ for one in model.unet.attn_processors.values()} == {"AttnProcessor2_0"}


def test_on_a_cpu_a_large_model_is_drawn_in_the_format_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(drawing, "faster_on_cpu", lambda unet: torch.bfloat16)
    assert drawing.drawing_dtype("starter", "auto", cpu) == torch.float32
    monkeypatch.setattr(drawing, "_REAL", 1_000_000)
    assert drawing.drawing_dtype("starter", "auto", cpu) == torch.bfloat16
    assert drawing.drawing_dtype("starter", "fp32", cpu) == torch.float32
    model = load_model(save_tiny(tmp_path / "tiny", "sdxl"), device="cpu", dtype=torch.bfloat16)
    assert model.vae.dtype == torch.float32
    words = "a (red:1.3) toy"
    half = draw(model, words, seeds=[1], **FAST)[0]
    again = draw(model, words, seeds=[1], image=half, denoise=0.6, **{**FAST, "steps": 3})[0]
    assert again.size == half.size and again.tobytes() != half.tobytes()


def test_merged_weights_stay_where_they_lie(model: Model) -> None:
    targets = {"unet": "attention+mlp", "te1": "attention"}
    adapters = build_adapters(model.parts, plan_sites(model.parts, targets, LoraSpec(rank=2, alpha=2)), seed=0)
    for adapter in adapters.values():
        adapter.up.data.normal_(std=0.1)  # type: ignore[union-attr]  # LoRA's; a fresh one is zero
    weights = {site: inject.find_module(model.parts, site).weight for site in adapters}
    before = {site: (weight.data_ptr(), weight.detach().clone()) for site, weight in weights.items()}
    merge = inject.Merge(model.parts)
    for strength in (1.0, 0.3):
        merge.settle([(adapters, lambda site, strength=strength: strength)])
        for site, weight in weights.items():
            assert weight.data_ptr() == before[site][0]
            assert not torch.equal(weight, before[site][1])
    merge.restore()
    assert all(torch.equal(weight, before[site][1]) for site, weight in weights.items())
