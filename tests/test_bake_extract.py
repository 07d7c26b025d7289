"""Adapters into models and out of models: the baked model draws as the adapter does, and gives the adapter back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from formats_oracles import adapters_for
from formats_tiny import assert_equal
from safetensors import safe_open
from tiny_pipelines import save_tiny
from torch import Tensor, nn
from typer.testing import CliRunner

from reparam_diffusion.__main__ import app
from reparam_diffusion.adapters.foreign import Full
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.checkpoint import live_weights, original_names
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import write_adapter
from reparam_diffusion.gallery.bake import bake, require_single_file
from reparam_diffusion.gallery.blend.forms import Form
from reparam_diffusion.gallery.blend.result import finished
from reparam_diffusion.gallery.blend.sources import Source
from reparam_diffusion.gallery.extract import extract
from reparam_diffusion.inject import attach
from reparam_diffusion.models.load import Model, load_model
from reparam_diffusion.models.parts import MODEL_CONFIGS, empty_parts

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*:UserWarning")
FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model of a family. SDXL's encoders differ in width, by which diffusers tells them apart."""
    folder = tmp_path_factory.mktemp("models") / request.param
    save_tiny(folder, "sdxl" if request.param == "sdxl" else "sd1")
    loaded = load_model(folder, device="cpu")
    if request.param != "sd1":
        loaded = widened(loaded, request.param, folder)
    return loaded


def widened(model: Model, family: str, folder: Path) -> Model:
    """The model with what tells its family: SDXL's second encoder wider, SD 2 read as its 1024 wide text vectors are."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(1)
    unet = dict(model.unet.config)
    if family == "sdxl":
        config = CLIPTextConfig(**{**model.text_encoders[1].config.to_dict(), "hidden_size": 24, "projection_dim": 16})
        model.text_encoders[1] = CLIPTextModelWithProjection(config).requires_grad_(False).eval()
        model.text_encoders[1].save_pretrained(folder / "text_encoder_2")
        unet["cross_attention_dim"] = 16 + 24
    else:
        config = CLIPTextConfig(
            **{**model.text_encoders[0].config.to_dict(), "hidden_size": 1024, "num_attention_heads": 2}
        )
        model.text_encoders[0] = type(model.text_encoders[0])(config).requires_grad_(False).eval()
        model.text_encoders[0].save_pretrained(folder / "text_encoder")
        unet |= {"cross_attention_dim": 1024, "use_linear_projection": True}
    model.unet = UNet2DConditionModel.from_config(unet).requires_grad_(False).eval()
    model.unet.save_pretrained(folder / "unet")
    assert model.family == family
    return model


@torch.no_grad()
def answers(model: Model) -> Tensor:
    """What all parts give for fixed inputs."""
    chance = torch.Generator().manual_seed(3)
    width = model.unet.config.cross_attention_dim
    x, text = torch.randn(1, 4, 16, 16, generator=chance), torch.randn(1, 5, width, generator=chance)
    added = {"text_embeds": torch.randn(1, 16, generator=chance), "time_ids": torch.randn(1, 6, generator=chance)}
    more = {"added_cond_kwargs": added} if model.family == "sdxl" else {}
    pieces = [model.unet(x, torch.tensor([300]), text, **more).sample.flatten()]
    tokens = torch.tensor([[2046, 17, 250, 9, 2047]])
    for encoder in model.text_encoders:
        out = encoder(tokens, output_hidden_states=True)
        pieces += [out.last_hidden_state.flatten(), getattr(out, "text_embeds", torch.zeros(0)).flatten()]
    picture = model.vae.decode(x).sample
    return torch.cat([*pieces, picture.flatten(), model.vae.encode(picture).latent_dist.mean.flatten()])


@pytest.fixture
def any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single files of tiny models, which are opened with their configuration beside them."""
    monkeypatch.setattr("reparam_diffusion.gallery.bake.require_single_file", lambda *_: None)
    monkeypatch.setattr("reparam_diffusion.gallery.bake.open_model", lambda *_: None)


@pytest.fixture
def sources(model: Model, tmp_path: Path) -> list[Source]:
    """Two adapters of different methods, at strengths, and what they draw together."""
    made = []
    for method, spec in (("lora", {"rank": 2}), ("oft", {"block_size": 4})):
        path = tmp_path / "in" / f"{method}.safetensors"
        adapters = adapters_for(model.parts, method, **spec)
        write_adapter(path, adapters, parts=model.parts, family=model.family, precision="fp32")
        made.append(Source(path, 0.5))
    return made


def applied(model: Model, sources: list[Source]) -> Tensor:
    live = [attach(model.parts, read_adapter(s.file).match(model.parts)[0], strength=s.strength) for s in sources]
    together = answers(model)
    for injection in live:
        injection.remove()
    return together


def test_a_baked_folder_draws_what_the_adapters_draw(model: Model, sources: list[Source], tmp_path: Path) -> None:
    base, together = answers(model), applied(model, sources)
    steps = list(bake(model, sources, tmp_path / "baked", precision="fp32"))
    assert [step.done for step in steps[:-1]] == sorted(step.done for step in steps[:-1])
    assert steps[-2].done == steps[-2].total
    assert_equal(answers(load_model(tmp_path / "baked", device="cpu")), together, base)
    assert torch.equal(answers(model), base), "the loaded model is as it was"
    with pytest.raises(UserError, match="exists already"):
        next(bake(model, sources, tmp_path / "baked"))


def test_a_baked_checkpoint_in_the_original_names_loads_with_equal_outputs(
    model: Model, sources: list[Source], tmp_path: Path, any_shape: None
) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    base, together = answers(model), applied(model, sources)
    out = tmp_path / "model.safetensors"
    for _ in bake(model, sources, out, kind="checkpoint", precision="fp32"):
        pass
    kind = StableDiffusionXLPipeline if model.family == "sdxl" else StableDiffusionPipeline
    more = {} if model.family == "sdxl" else {"safety_checker": None, "feature_extractor": None}
    pipe = kind.from_single_file(str(out), config=str(model.folder), torch_dtype=torch.float32, **more)
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if model.family == "sdxl" else [])]
    back = Model("back", pipe.unet, pipe.vae, encoders, [], pipe.scheduler, model.device, torch.float32)
    assert_equal(answers(back), together, base)
    with safe_open(str(out), "pt") as opened:
        assert "oft.safetensors (0.5)" in opened.metadata()["modelspec.merged_from"]


def test_the_real_models_get_every_original_name() -> None:
    """The number of tensors in the published checkpoints' UNets, and their last names."""
    from diffusers import AutoencoderKL

    from reparam_diffusion.models.skeleton import skeleton

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    last = {
        "sd1": ("model.diffusion_model.output_blocks.11.1.proj_out.weight", 686, 196),
        "sd2": ("cond_stage_model.model.transformer.resblocks.22.mlp.c_proj.bias", 686, 4 + 23 * 12),
        "sdxl": ("conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight", 1680, 196 + 5 + 32 * 12),
    }
    for family, (name, unet, text) in last.items():
        parts = skeleton(family)
        names = [key for key, _ in original_names(parts, vae, family, live_weights(parts))]
        assert name in names
        assert len(names) == len(set(names))
        assert sum(key.startswith("model.diffusion_model.") for key in names) == unet
        assert sum(key.startswith("first_stage_model.") for key in names) == 248
        assert sum(key.startswith(("cond_stage_model.", "conditioner.")) for key in names) == text
    assert "first_stage_model.decoder.up.3.block.0.conv1.weight" in names
    assert "first_stage_model.encoder.mid.attn_1.proj_out.weight" in names


@pytest.mark.parametrize("kind", ["sd1", "sd2-base", "sd2-768-v", "sdxl"])
def test_every_model_of_the_usual_shape_is_written_as_one_file(kind: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        parts = empty_parts(MODEL_CONFIGS / kind)
    real = Model("real", parts.unet, parts.vae, parts.text_encoders, [], None, torch.device("cpu"), torch.float32)
    require_single_file(real, tmp_path / "model.safetensors")


def test_a_model_in_another_shape_is_not_written_as_one_file(tmp_path: Path) -> None:
    starter = load_model("starter", device="cpu")
    file = write_adapter(
        tmp_path / "a.safetensors", adapters_for(starter.parts, "lora", rank=2), parts=starter.parts, family="sd1"
    )
    words = ["bake", file, "--model", "starter", "--out", tmp_path / "one.safetensors"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(done.exception, UserError)
    assert "cannot be written as one file" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_model_that_was_written_wrong_is_not_called_done(
    model: Model, sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model.family == "sd2":
        pytest.skip("its text vectors are as wide as the real ones")
    monkeypatch.setattr("reparam_diffusion.gallery.bake.require_single_file", lambda *_: None)
    with pytest.raises(UserError, match="cannot be opened"):  # tiny models have the shape of no family
        list(bake(model, sources, tmp_path / "model.safetensors", kind="checkpoint"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_what_rounding_costs_a_merge_is_measured(kind: str, tmp_path: Path, any_shape: None) -> None:
    model = load_model(save_tiny(tmp_path / "m", "sd1"), device="cpu")
    adapters = adapters_for(model.parts, "lora", rank=2)
    file = write_adapter(tmp_path / "a.safetensors", adapters, parts=model.parts, family="sd1", precision="fp32")
    for precision in ("fp32", "bf16"):
        out = tmp_path / f"{precision}{'.safetensors' if kind == 'checkpoint' else ''}"
        *_, done = bake(model, [Source(file, 0.05)], out, kind=kind, precision=precision)
        wrong = size = 0.0
        for site, adapter in adapters.items():
            weight = model.parts[site.partition(".")[0]].get_submodule(site.partition(".")[2]).weight
            change = 0.05 * adapter.delta(weight).detach()
            rounded = (weight + change).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision]).float()
            wrong, size = wrong + float((rounded - weight - change).norm()) ** 2, size + float(change.norm()) ** 2
        assert done.error == pytest.approx((wrong / size) ** 0.5, rel=1e-2, abs=1e-6)
    assert done.error > 1e-3 and "% of the change" in done.loss


def test_what_is_known_of_a_tuned_model_is_in_the_header(tmp_path: Path) -> None:
    base = load_model(save_tiny(tmp_path / "m", "sd1"), device="cpu")
    tuned = load_model(tmp_path / "m", device="cpu", prediction_type="v_prediction", zero_terminal_snr=True)
    tuned.unet.conv_out.weight.data *= 1.5
    report = finished(extract(tuned, base, tmp_path / "a.safetensors", form=Form()))
    header = read_adapter(report.file).metadata
    assert header["modelspec.prediction_type"] == "v" and header["ss_zero_terminal_snr"] == "True"
    assert header["modelspec.resolution"] == f"{tuned.size}x{tuned.size}"
    assert any("v_prediction" in note for note in report.notes)


def test_what_has_no_place_in_an_adapter_is_listed(tmp_path: Path) -> None:
    base = load_model(save_tiny(tmp_path / "m", "sd1"), device="cpu")
    tuned = load_model(tmp_path / "m", device="cpu")
    tuned.text_encoders[0].get_input_embeddings().weight.data[0] += 1.0
    next(tuned.vae.parameters()).data.add_(1.0)
    with pytest.raises(UserError, match="no place"):
        next(extract(tuned, base, tmp_path / "o.safetensors", form=Form()))
    tuned.unet.conv_out.weight.data *= 1.5
    report = finished(extract(tuned, base, tmp_path / "a.safetensors", form=Form()))
    keys = {key for _, key, _ in report.left_out}
    assert "vae" in keys and any("token_embedding" in key for key in keys)


def test_stopping_a_bake_leaves_nothing(model: Model, sources: list[Source], tmp_path: Path, any_shape: None) -> None:
    for out in (tmp_path / "baked", tmp_path / "baked.safetensors"):
        steps = bake(model, sources, out, kind="checkpoint" if out.suffix else "folder")
        next(steps)
        steps.close()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_bias_that_the_model_has_no_place_for_is_refused(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "m", "sd1"), device="cpu")
    site = next(f"unet.{path}" for path, m in model.unet.named_modules() if isinstance(m, nn.Linear) and m.bias is None)
    shape = tuple(model.unet.get_submodule(site[5:]).weight.shape)
    adapters = {site: Full(shape, torch.zeros(shape), torch.ones(shape[0]))}
    file = write_adapter(tmp_path / "a.safetensors", adapters, parts=model.parts, family="sd1")
    with pytest.raises(UserError, match="has none"):
        next(bake(model, [Source(file)], tmp_path / "out"))


# --- extract ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "form",
    [Form(), Form(kind="lora", rank=2), Form(kind="lokr", factor=4), Form(kind="diff")],
    ids=lambda form: form.kind,
)
def test_what_was_baked_in_comes_out_again(form: Form, tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "m", "sd1"), device="cpu")
    method, spec = ("lokr", {"factor": 4}) if form.kind == "lokr" else ("lora", {"rank": 2})
    adapters = adapters_for(model.parts, method, **spec)
    file = write_adapter(tmp_path / "a.safetensors", adapters, parts=model.parts, family="sd1", precision="fp32")
    for _ in bake(model, [Source(file)], tmp_path / "baked", precision="fp32"):
        pass
    tuned = load_model(tmp_path / "baked", device="cpu")
    report = finished(extract(tuned, model, tmp_path / "out.safetensors", form=form, precision="fp32"))
    assert report.error < 1e-5
    assert {row.site for row in report.layers} == set(adapters)
    back, unmatched = read_adapter(report.file).match(model.parts)
    assert unmatched == []
    for site, adapter in adapters.items():
        weight = model.parts[site.partition(".")[0]].get_submodule(site.partition(".")[2]).weight
        exact = adapter.delta(weight).detach()
        assert (back[site].delta(weight).detach() - exact).norm() <= 1e-4 * exact.norm()


def test_norms_and_biases_come_out_whole_or_are_told(tmp_path: Path) -> None:
    base = load_model(save_tiny(tmp_path / "m", "sd1"), device="cpu")
    tuned = load_model(tmp_path / "m", device="cpu")
    tuned.unet.conv_in.bias.data += 1.0
    tuned.unet.conv_norm_out.weight.data += 0.5
    tuned.unet.conv_out.weight.data *= 1.5
    tuned.text_encoders[0].get_submodule("encoder.layers.0.mlp.fc1").weight.data += 1e-6
    whole = finished(
        extract(tuned, base, tmp_path / "d.safetensors", form=Form(kind="diff"), precision="fp32", least=1e-3)
    )
    assert {row.site for row in whole.layers if row.form != "nothing"} == {
        "unet.conv_in",
        "unet.conv_norm_out",
        "unet.conv_out",
    }
    with attach(base.parts, read_adapter(whole.file).match(base.parts)[0]):
        torch.testing.assert_close(answers(base), answers(tuned), rtol=1e-4, atol=1e-4)
    ranked = finished(extract(tuned, base, tmp_path / "l.safetensors", form=Form(kind="lora", rank=4), least=1e-3))
    assert {row.site for row in ranked.layers if row.form != "nothing"} == {"unet.conv_out"}
    assert any("1 layers that changed by no more than 0.001" in note for note in ranked.notes)
    size = {row.site: row.norm for row in ranked.layers}
    lost = size["unet.conv_in"] ** 2 + size["unet.conv_norm_out"] ** 2
    assert ranked.kept <= 1 - lost / sum(norm**2 for norm in size.values()) + 1e-6, "what is dropped counts as lost"
    assert {key for _, key, _ in ranked.left_out} == {"unet.conv_in", "unet.conv_norm_out"}


def test_a_model_of_another_build_and_the_same_model_are_refused(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "m", "sd1"), device="cpu")
    xl = load_model(save_tiny(tmp_path / "xl", "sdxl"), device="cpu")
    with pytest.raises(UserError, match="not built like"):
        next(extract(xl, model, tmp_path / "o.safetensors", form=Form()))
    with pytest.raises(UserError, match="nothing to extract"):
        next(extract(model, model, tmp_path / "o.safetensors", form=Form()))


def test_bake_and_extract_on_the_command_line(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "m", "sd1"), device="cpu")
    file = write_adapter(
        tmp_path / "a.safetensors", adapters_for(model.parts, "lora", rank=2), parts=model.parts, family="sd1"
    )
    for words in (
        ["bake", f"{file}:0.5", "--model", tmp_path / "m", "--out", tmp_path / "baked", "--precision", "fp32"],
        ["extract", tmp_path / "baked", "--base", tmp_path / "m", "--rank", 4, "--out", tmp_path / "b.safetensors"],
    ):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, (done.output, done.exception)
    assert "keeps all of the change, up to rounding (relative error" in done.stdout
    assert read_adapter(tmp_path / "b.safetensors").method == "lora"
