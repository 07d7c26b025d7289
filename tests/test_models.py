"""Base models from folders and single files, with no network: every family's names and shapes, variants, refusals."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from original_names import GOLDEN, original_state
from safetensors.torch import save_file
from tiny_pipelines import save_pictures, save_tiny
from torch import Tensor

from reparam_diffusion.apply import generate
from reparam_diffusion.config import parse_set, settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Finished
from reparam_diffusion.models import checkpoint as checkpoints
from reparam_diffusion.models.checkpoint import TEXT, UNET, VAE, Checkpoint, Kind, read_checkpoint
from reparam_diffusion.models.load import load_model
from reparam_diffusion.models.outline import outline, shape_of
from reparam_diffusion.models.parts import MODEL_CONFIGS, Parts, clip_tokenizers, empty_parts
from reparam_diffusion.models.single_file import fill_parts
from reparam_diffusion.models.source import find_source
from reparam_diffusion.training.loop import train

KINDS: list[Kind] = ["sd1", "sd2-base", "sd2-768-v", "sdxl"]
SMALL = {
    "unet": {"norm_num_groups": 4, "attention_head_dim": 4, "sample_size": 8},
    "vae": {"block_out_channels": [4, 8, 8, 8], "norm_num_groups": 2},
    "text": {"num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 8, "num_attention_heads": 4},
}


@pytest.fixture(scope="module")
def full() -> dict[Kind, Parts]:
    """The real shapes of every kind on the meta device."""
    with torch.device("meta"):
        return {kind: empty_parts(MODEL_CONFIGS / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def small_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our configurations, each layer with few channels; what tells the kinds apart is kept."""
    place = tmp_path_factory.mktemp("assets")
    for file in MODEL_CONFIGS.glob("*/*/*.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "config.json":
            config |= SMALL["text" if "text" in file.parent.name else file.parent.name]
        if file.parent.name == "unet":
            config["block_out_channels"] = [8, 16, 16, 16][: len(config["block_out_channels"])]
        target = place / file.relative_to(MODEL_CONFIGS)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(config), encoding="utf-8")
    return place


@pytest.fixture
def small(small_configs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checkpoints, "MODEL_CONFIGS", small_configs)
    return small_configs


def save_sparse(file: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A .safetensors file with a whole header and as many bytes as it says, all of them holes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, tensor in state.items():
        size = 2 * tensor.numel()
        header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return file


# --- full size, no bytes ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_our_configurations_have_the_shapes_of_the_real_models(kind: Kind, full: dict[Kind, Parts]) -> None:
    table = json.loads(gzip.decompress((GOLDEN / f"keymap_{kind[:4].rstrip('-')}.json.gz").read_bytes()))
    shapes = {key: list(tensor.shape) for key, tensor in full[kind].unet.state_dict().items()}
    assert {key.rpartition(".")[0] for key in shapes} == {path for path, *_ in table["unet"]}
    for path, _, shape, _ in table["unet"]:
        assert shapes[f"{path}.weight"] == shape
    for encoder, (_, rows) in zip(full[kind].text_encoders, table["text_encoders"], strict=True):
        own = {key.removeprefix("text_model."): list(t.shape) for key, t in encoder.state_dict().items()}
        for path, _, shape in (row[:3] for row in rows):
            assert own[f"{path.removeprefix('text_model.')}.weight"] == shape


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_a_full_checkpoint_finds_its_place(kind: Kind, full: dict[Kind, Parts], tmp_path: Path) -> None:
    state = original_state(kind, full[kind])
    metadata = {"modelspec.prediction_type": "v"} if kind == "sd2-768-v" else None
    found = read_checkpoint(save_sparse(tmp_path / "full.safetensors", state, metadata))
    assert (found.kind, found.is_v_prediction) == (kind, kind == "sd2-768-v")
    asked: list[str] = []

    def read(prefix: str) -> dict[str, Tensor]:
        asked.append(prefix)
        return {key: tensor for key, tensor in state.items() if key.startswith(prefix)}

    parts = fill_parts(found, torch.float16, read)
    assert asked == [UNET, VAE, *TEXT[kind]]
    for module, same in zip(
        (parts.unet, parts.vae, *parts.text_encoders),
        (full[kind].unet, full[kind].vae, *full[kind].text_encoders),
        strict=True,
    ):
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in same.state_dict().items()}
    assert {p.dtype for p in parts.vae.parameters()} == {torch.float32}
    assert {p.dtype for e in (parts.unet, *parts.text_encoders) for p in e.parameters()} == {torch.float16}
    assert not any(buffer.is_meta for encoder in parts.text_encoders for buffer in encoder.buffers())
    expected = "v_prediction" if kind == "sd2-768-v" else "epsilon"
    assert parts.scheduler.config.prediction_type == expected


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_pad_as_their_model_was_trained(kind: Kind) -> None:
    tokenizers = clip_tokenizers(MODEL_CONFIGS / kind)
    ends = {"sd1": [49407], "sd2-base": [0], "sd2-768-v": [0], "sdxl": [49407, 0]}[kind]
    assert len(tokenizers) == len(ends)
    for tokenizer, end in zip(tokenizers, ends, strict=True):
        rows = tokenizer(
            ["A photo of a cat, it's 12!", ""], padding="max_length", max_length=77, truncation=True
        ).input_ids
        # CLIP's own ids, as openai/clip-vit-large-patch14 gives them
        start = [49406, 320, 1125, 539, 320, 2368, 267, 585, 568, 272, 273, 256, 49407]
        assert rows[0][:13] == start and rows[1][:2] == [49406, 49407]
        assert rows[0][13:] == [end] * 64 and rows[1][2:] == [end] * 75


# --- small, with numbers ---------------------------------------------------------------------------------------------
def small_file(kind: Kind, configs: Path, file: Path, **extra: Tensor) -> Parts:
    """A random model saved in the original names, and its parts."""
    torch.manual_seed(0)
    parts = empty_parts(configs / kind)
    for module in (parts.unet, parts.vae, *parts.text_encoders):
        for parameter in module.parameters():
            parameter.data.normal_()
    state = {key: tensor.contiguous().clone() for key, tensor in original_state(kind, parts).items()}
    save_file(state | extra, file)
    return parts


@pytest.mark.parametrize("kind", ["sd1", "sd2-768-v", "sdxl"])
def test_a_single_file_brings_every_number(kind: Kind, small: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    parts = small_file(kind, small, file)  # its random biases spread as those of v-prediction do
    model = load_model(file, dtype=torch.float32)
    pairs = [
        (model.unet, parts.unet),
        (model.vae, parts.vae),
        *zip(model.text_encoders, parts.text_encoders, strict=True),
    ]
    for own, theirs in pairs:
        expected = theirs.state_dict()
        assert own.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in own.state_dict().items())
    assert model.family == kind[:4].rstrip("-")
    assert outline(file).size == model.size
    assert shape_of(file) == shape_of(file)


def test_what_a_model_predicts_is_told_by_its_file(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "xl.safetensors"
    small_file("sdxl", small, file)
    assert load_model(file).prediction_type == "epsilon"
    assert load_model(file, prediction_type="v_prediction").prediction_type == "v_prediction"
    small_file("sdxl", small, file, v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    model = load_model(file)
    assert model.prediction_type == "v_prediction"
    assert model.scheduler.config.rescale_betas_zero_snr and model.scheduler.config.timestep_spacing == "trailing"
    assert float(model.scheduler.alphas_cumprod[-1]) < 1e-6


@pytest.mark.parametrize(("spread", "kind"), [(0.02, "sd2-base"), (0.5, "sd2-768-v")])
def test_a_2x_file_that_says_nothing_is_told_by_the_spread_of_one_bias(
    spread: float, kind: Kind, small: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    parts = empty_parts(small / "sd2-base")
    state = {key: tensor.contiguous().clone() for key, tensor in original_state("sd2-base", parts).items()}
    bias = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    state[bias] = torch.linspace(-1, 1, state[bias].numel()) * spread
    save_file(state, tmp_path / "two.safetensors")
    found = read_checkpoint(tmp_path / "two.safetensors")
    assert (found.kind, found.is_v_prediction) == (kind, kind == "sd2-768-v")


def test_another_vae_can_be_chosen(small: Path, tmp_path: Path) -> None:
    small_file("sd1", small, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    other = empty_parts(small / "sd1").vae
    original = original_state("sd1", Parts(empty_parts(small / "sd1").unet, other, [], [], None), text=False)
    names = {key.removeprefix(VAE): tensor.contiguous() for key, tensor in original.items() if key.startswith(VAE)}
    save_file(names, tmp_path / "original.safetensors")
    other.save_pretrained(tmp_path / "vae")
    save_file({key: tensor.contiguous() for key, tensor in other.state_dict().items()}, tmp_path / "vae.safetensors")
    for place in (tmp_path / "vae", tmp_path / "vae.safetensors", tmp_path / "original.safetensors"):
        model = load_model(tmp_path / "model.safetensors", vae=place)
        assert all(torch.equal(t, other.state_dict()[key]) for key, t in model.vae.state_dict().items())
    with pytest.raises(UserError, match="There is no VAE"):
        load_model(tmp_path / "model.safetensors", vae=tmp_path / "nowhere")


# --- folders ---------------------------------------------------------------------------------------------------------
def test_a_folder_with_only_half_precision_files_loads(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "sdxl")
    plain = load_model(folder).unet.state_dict()
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    half = load_model(folder).unet.state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in half.items())


def test_a_model_is_used_again_without_leaking_adapters(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "sd1")
    pictures = save_pictures(tmp_path / "p")
    config = settle(
        parse_set(
            [
                f"model.path='{folder}'", f"data.images='{pictures}'", "data.trigger=sks", "training.steps=3",
                "training.learning_rate=0.1", "training.warmup=0.0", "output.sample_prompts=['sks']",
            ]
        )
    )  # fmt: skip
    assert isinstance(list(train(config, folder=tmp_path / "run"))[-1], Finished)
    model = load_model(folder, dtype=torch.float32)
    keys = list(model.unet.state_dict())
    before = generate(model, "a cat", steps=2)[0].tobytes()
    changed = generate(model, "a cat", steps=2, adapters=[tmp_path / "run" / "adapter.safetensors"])[0].tobytes()
    assert changed != before
    assert generate(model, "a cat", steps=2)[0].tobytes() == before
    assert list(model.unet.state_dict()) == keys
    assert not any("forward" in module.__dict__ for module in model.unet.modules())


# --- refusals --------------------------------------------------------------------------------------------------------
def test_special_checkpoints_are_refused_by_name(full: dict[Kind, Parts], tmp_path: Path) -> None:
    first = f"{UNET}input_blocks.0.0.weight"
    xl = original_state("sdxl", full["sdxl"])
    refiner = {key.replace("embedders.1.", "embedders.0."): t for key, t in xl.items() if "embedders.0." not in key}
    one = original_state("sd1", full["sd1"])
    cases = {
        "an inpainting model": one | {first: torch.empty(320, 9, 3, 3, device="meta")},
        "an editing model": one | {first: torch.empty(320, 8, 3, 3, device="meta")},
        "the SDXL refiner": refiner,
        "an EDM model": xl | {"edm_mean": torch.empty(4, device="meta")},
        "holds only a part": {key: t for key, t in one.items() if not key.startswith(VAE)},
        "an adapter, not a base model": {"lora_unet_x.lora_up.weight": torch.empty(4, 4, device="meta")},
        "a Flux model": {"double_blocks.0.img_attn.qkv.weight": torch.empty(4, 4, device="meta")},
        "one part of a model": {"down_blocks.0.resnets.0.conv1.weight": torch.empty(4, 4, 3, 3, device="meta")},
        "not a Stable Diffusion checkpoint": {"x": torch.empty(1, device="meta")},
    }  # fmt: skip
    for words, state in cases.items():
        with pytest.raises(UserError, match=words):
            read_checkpoint(save_sparse(tmp_path / "special.safetensors", state))


def test_a_wrong_or_broken_file_gets_one_sentence(full: dict[Kind, Parts], tmp_path: Path) -> None:
    file = save_sparse(tmp_path / "cut.safetensors", original_state("sd1", full["sd1"]))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"cut\.safetensors is cut short\. It has .* of .* bytes"):
        load_model(file)
    with file.open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(UserError, match="ends within its header"):
        load_model(file)
    file.write_bytes(b"no tensors at all")
    with pytest.raises(UserError, match="cannot be read"):
        load_model(file)
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    with pytest.raises(UserError, match="can run code"):
        load_model(tmp_path / "old.ckpt")


def test_a_checkpoint_with_a_tensor_missing_names_it(small: Path, tmp_path: Path) -> None:
    parts = empty_parts(small / "sd1")
    state = original_state("sd1", parts)
    del state[f"{UNET}out.2.bias"]
    found = Checkpoint(tmp_path / "x.safetensors", "sd1", False)

    def read(prefix: str) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in state.items() if key.startswith(prefix)}

    with pytest.raises(UserError, match=r"the UNet is not whole\. It lacks 1 tensors, such as conv_out\.bias"):
        fill_parts(found, torch.float32, read)
    state[f"{UNET}out.2.bias"] = torch.empty(5)
    with pytest.raises(UserError, match=r"conv_out\.bias is \(5,\), not \(4,\)"):
        fill_parts(found, torch.float32, read)


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [("StableDiffusionInpaintPipeline", "an inpainting model"), ("StableDiffusionXLImg2ImgPipeline", "the SDXL refiner"),
     ("FluxPipeline", "a Flux model"), ("SomethingElse", "a SomethingElse"), ("", "no pipeline")],
)  # fmt: skip
def test_folders_of_other_pipelines_are_refused_by_name(pipeline: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": pipeline} if pipeline else {}), encoding="utf-8"
    )
    with pytest.raises(UserError, match=f"is {words}"):
        find_source(tmp_path)


def test_wrong_places_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no model at"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="Check the id and the connection"):
        load_model("somebody/no-such-model")
    folder = save_tiny(tmp_path / "m", "sd1")
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match=r"has no \.safetensors weights"):
        load_model(folder)
