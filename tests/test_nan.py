"""NaN and infinity in adapters and models: the file and the layer are named, and nothing is written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from reparam_diffusion.__main__ import app
from reparam_diffusion.apply import generate
from reparam_diffusion.errors import UserError
from reparam_diffusion.models.load import Model, load_model

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "lora_unet_" + LAYER.replace(".", "_")


@pytest.fixture(scope="module")
def starter() -> Model:
    return load_model("starter", device="cpu")


@pytest.fixture
def adapter(tmp_path: Path, starter: Model) -> Path:
    """A LoRA on two layers, of which one is broken."""
    import torch

    wide = starter.unet.get_submodule(LAYER).weight.shape[0]
    tensors = {}
    for key in (KEY, KEY.replace("to_q", "to_k")):
        tensors |= {f"{key}.lora_down.weight": torch.randn(2, wide), f"{key}.lora_up.weight": torch.randn(wide, 2)}
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    tensors[f"{KEY}.lora_up.weight"][0, 0] = math.nan
    file = tmp_path / "in" / "broken.safetensors"
    file.parent.mkdir()
    save_file(tensors, file, {"ss_base_model_version": "sd_v1", "ss_sd_model_name": "starter-model"})
    return file


def save_model(starter: Model, place: Path, change: Callable[[dict], None]) -> Path:
    """The starter with other weights in its UNet."""
    import shutil

    assert starter.folder is not None
    shutil.copytree(starter.folder, place)
    (weights,) = (place / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    change(tensors)
    weights.unlink()
    save_file(tensors, weights, {"format": "pt"})
    return place


def break_one(value: float) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        tensors[f"{LAYER}.weight"][0, 0] = value

    return change


def break_all(tensors: dict) -> None:
    for tensor in tensors.values():
        tensor.mul_(math.nan)


def run(*words: object) -> UserError:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(done.exception, UserError), (done.output, done.exception)
    return done.exception


@pytest.mark.parametrize(
    "words",
    [
        ["blend", "{file}", "--out", "{out}"],
        ["blend", "{file}", "--method", "svd", "--out", "{out}"],
        ["convert", "{file}", "--as", "lokr", "--out", "{out}"],
        ["resize", "{file}", "--rank", "1", "--out", "{out}"],
        ["export", "{file}", "--model", "starter", "--out", "{out}"],
        ["export", "{file}", "--model", "starter", "--to", "peft", "--out", "{out}"],
        ["compare", "{file}", "{file}"],
        ["bake", "{file}", "--out", "{out}-folder"],
    ],
    ids=lambda words: " ".join(words[:1] + words[2:4]),
)
def test_a_broken_adapter_is_named_with_its_layer(words: list[str], adapter: Path, tmp_path: Path) -> None:
    error = run(*(word.format(file=adapter, out=tmp_path / "out" / "o.safetensors") for word in words))
    assert "broken.safetensors" in error.what and "not numbers" in error.what
    assert LAYER in error.why and "1 of 2" in error.why
    assert not any((tmp_path / "out").glob("*"))


def test_a_broken_layer_that_is_not_used_does_not_matter(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    words = ["blend", f"{adapter}:1:1:unet.*to_q=0", "--out", str(out)]
    assert CliRunner().invoke(app, words).exit_code == 0


def test_the_doctor_leaves_the_broken_layer_out(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    done = CliRunner().invoke(app, ["doctor", str(adapter), "--repair", str(out)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert LAYER in done.output
    assert not any("to_q" in key for key in load_file(out))


@pytest.mark.parametrize("form", [["--as", "lora", "--rank", "4"], ["--as", "diff"]], ids=str)
@pytest.mark.parametrize("change", [break_one(math.nan), break_one(math.inf), break_all], ids=["nan", "inf", "all"])
def test_extract_names_the_broken_layer(
    change: Callable[[dict], None], form: list[str], starter: Model, tmp_path: Path
) -> None:
    tuned = save_model(starter, tmp_path / "tuned", change)
    out = tmp_path / "o.safetensors"
    for pair in ((tuned, "starter"), ("starter", tuned)):
        error = run("extract", pair[0], "--base", pair[1], *form, "--out", out)
        assert "tuned holds values that are not numbers" in error.what
        assert (f"unet.{LAYER}" in error.why) or change is break_all
        assert not out.exists()


def test_a_broken_base_model_is_not_merged_into(starter: Model, tmp_path: Path) -> None:
    broken = save_model(starter, tmp_path / "base", break_one(math.nan))
    import torch

    wide = starter.unet.get_submodule(LAYER).weight.shape[0]
    file = tmp_path / "a.safetensors"
    save_file({f"{KEY}.lora_down.weight": torch.ones(1, wide), f"{KEY}.lora_up.weight": torch.ones(wide, 1)}, file)
    error = run("bake", file, "--model", broken, "--precision", "fp32", "--out", tmp_path / "merged")
    assert "base holds values" in error.what and LAYER in error.why
    assert not (tmp_path / "merged").exists()


def test_a_nan_image_is_an_error_and_no_black_image(starter: Model, tmp_path: Path) -> None:
    broken = save_model(starter, tmp_path / "base", break_one(math.nan))
    out, workspace = tmp_path / "o.png", tmp_path / "ws"
    error = run(
        "generate", "--prompt", "a cat", "--steps", 1, "--model", broken, "--out", out, "--workspace", workspace
    )
    assert "not numbers" in error.what and LAYER in error.why
    assert not out.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(UserError, match=r"1 of .* layers"):
            generate(load_model(broken, device="cpu"), "a cat", steps=1)


def test_a_broken_layer_is_named_where_generation_leaves_it_out(adapter: Path, starter: Model) -> None:
    with pytest.warns(UserWarning, match=r"broken.safetensors.*to_q.*not numbers"):
        generate(starter, "a cat", adapters=[adapter], steps=1)


def test_a_sample_that_is_nan_is_a_warning_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext
    from types import SimpleNamespace

    from reparam_diffusion.events import Sampled, Warned
    from reparam_diffusion.training import loop

    def save(_: object, prompt: str, number: int, step: int) -> tuple[int, str]:
        if number == 0:
            raise UserError("The image could not be generated.")
        return 7, "samples/1.png"

    monkeypatch.setattr(loop, "save_preview", save)
    look = object.__new__(loop._Look)
    look.prompts, look.learner, look.setup = ["a", "b"], SimpleNamespace(averaged=nullcontext), None
    warned, sampled = look.draw(3)
    assert isinstance(warned, Warned) and '"a" at step 3' in warned.message
    assert isinstance(sampled, Sampled) and sampled.prompt == "b"


def test_an_overflow_of_the_vae_and_of_the_sampling_are_told_apart(starter: Model) -> None:
    import torch

    from reparam_diffusion.models.finite import require_image

    fine, broken = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), math.nan)
    require_image(starter, broken, fine)
    with pytest.raises(UserError, match="VAE overflows"):
        require_image(starter, fine, broken)
    with pytest.raises(UserError, match="while sampling"):
        require_image(starter, broken, broken)
