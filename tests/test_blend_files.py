"""Blends of files as people have them: on the real models' layers, from the command line, and through other programs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from formats_oracles import adapters_for, lycoris_reads
from formats_tiny import assert_equal, output, parts_like, with_adapters
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_blend_laws import SPECS, tiny_model
from tiny_pipelines import save_tiny
from typer.testing import CliRunner

from reparam_diffusion.__main__ import app
from reparam_diffusion.adapters.lora import Lora, LoraPlan
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.names import module_at, spellings
from reparam_diffusion.formats.peft import write_peft
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import AdapterWriter, write_adapter
from reparam_diffusion.gallery.ab import ab_picture
from reparam_diffusion.gallery.blend import BLENDS
from reparam_diffusion.gallery.blend.blending import blend_files
from reparam_diffusion.gallery.blend.forms import Form
from reparam_diffusion.gallery.blend.result import finished
from reparam_diffusion.gallery.blend.sources import Source
from reparam_diffusion.models.load import load_model
from reparam_diffusion.models.skeleton import skeleton
from reparam_diffusion.models.source import STARTER
from reparam_diffusion.targets import can_carry

GOLDEN = Path(__file__).parent / "golden"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_layer_of_the_real_models_is_blended_without_their_weights(family: str, tmp_path: Path) -> None:
    parts = skeleton(family)
    sites = [site for site in set(spellings(parts).values()) if can_carry(module_at(parts, site))]
    chance = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        with AdapterWriter(tmp_path / name, parts=parts, family=family, precision="fp16") as writer:
            for site in sites:
                adapter = Lora(tuple(module_at(parts, site).weight.shape), LoraPlan(1, 1.0))
                adapter.up.data.normal_(std=0.1, generator=chance)
                adapter.down.data.normal_(std=0.1, generator=chance)
                writer.add(site, adapter)
            writer.finish({})
    out = tmp_path / "out.safetensors"
    report = finished(blend_files([Source(tmp_path / "a"), Source(tmp_path / "b", -0.5)], out))
    assert {row.site for row in report.layers} == set(sites)
    assert report.left_out == ()
    assert report.error < 1e-3
    assert read_adapter(out).base == family
    with safe_open(str(tmp_path / "a"), "pt") as first, safe_open(str(out), "pt") as blended:
        assert set(first.keys()) == set(blended.keys()), "the names are the sources' names"


def test_a_change_that_depends_on_the_base_asks_for_it(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_mid_block_attentions_0_proj_in.oft_blocks": torch.zeros(160, 8, 8),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(0.0),
    }
    save_file(tensors, tmp_path / "oft.safetensors", {"ss_base_model_version": "sd_v1"})
    with pytest.raises(UserError, match="--model"):
        finished(blend_files([Source(tmp_path / "oft.safetensors", 0.5)], tmp_path / "out.safetensors"))
    save_file(tensors, tmp_path / "unknown.safetensors")
    with pytest.raises(UserError, match="which base model"):
        finished(blend_files([Source(tmp_path / "unknown.safetensors")], tmp_path / "out.safetensors"))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("form", [Form(), Form(kind="lora", rank=6), Form(kind="lokr", factor=4)], ids=lambda f: f.kind)
def test_lycoris_draws_a_blend_of_all_methods_as_we_do(form: Form, tmp_path: Path) -> None:
    parts = parts_like("sd1")
    base = output(parts)
    sources = []
    for method, spec in SPECS.items():
        path = tmp_path / f"{method}.safetensors"
        write_adapter(path, adapters_for(parts, method, **spec), parts=parts, family="sd1", precision="fp32")
        sources.append(Source(path, 0.3))
    out = tmp_path / "out.safetensors"
    finished(blend_files(sources, out, form=form, model=tiny_model(parts), precision="fp32"))
    ours = with_adapters(parts, read_adapter(out).match(parts)[0])
    assert_equal(lycoris_reads(parts, out, "sd1"), ours, base)


def test_a_broken_file_is_not_blended(tmp_path: Path) -> None:
    parts = parts_like("sd1")
    file = write_adapter(tmp_path / "a.safetensors", adapters_for(parts, "lora", rank=2), parts=parts, family="sd1")
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    broken = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[broken][0, 0] = torch.nan
    save_file(tensors, tmp_path / "b.safetensors", {"ss_base_model_version": "sd_v1"})
    with pytest.raises(UserError, match="doctor"):
        finished(
            blend_files([Source(file), Source(tmp_path / "b.safetensors")], tmp_path / "c", model=tiny_model(parts))
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_folders_of_peft_are_blended_like_files(tmp_path: Path) -> None:
    parts = parts_like("sd1")
    adapters = adapters_for(parts, "loha", rank=2)
    folder = write_peft(tmp_path / "peft", adapters, parts=parts)
    out = tmp_path / "out.safetensors"
    finished(blend_files([Source(folder, 0.5), Source(folder, 0.5)], out, model=tiny_model(parts), precision="fp32"))
    assert_equal(with_adapters(parts, read_adapter(out).match(parts)[0]), with_adapters(parts, adapters), output(parts))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_file_of_a_blend_is_laid_out_as_it_always_was(family: str, tmp_path: Path) -> None:
    """Names, number formats and shapes of the sum of all methods: tests/golden/blend_<family>.json.gz."""
    parts = parts_like(family)
    sources = []
    for method, spec in SPECS.items():
        path = tmp_path / f"{method}.safetensors"
        adapters = adapters_for(parts, method, **spec)
        some = {site: a for n, (site, a) in enumerate(adapters.items()) if (n + list(SPECS).index(method)) % 3 == 0}
        write_adapter(path, some, parts=parts, family=family, precision="fp32")
        sources.append(Source(path, 0.3))
    out = tmp_path / "out.safetensors"
    finished(blend_files(sources, out, model=tiny_model(parts)))
    found = {key: [str(t.dtype), list(t.shape)] for key, t in sorted(load_file(out).items())}
    golden = json.loads(gzip.decompress((GOLDEN / f"blend_{family}.json.gz").read_bytes()))
    assert found == golden


# --- the command line -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def starter_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("starter")
    parts = load_model("starter", device="cpu").parts
    told = {"ss_sd_model_name": STARTER.name, "modelspec.trigger_phrase": "sks toy"}
    made = {}
    for method, spec in {"lora": {"rank": 2}, "oft": {"block_size": 4}}.items():
        adapters = adapters_for(parts, method, convolutions=False, **spec)
        adapters = {site: adapter for site, adapter in adapters.items() if "mid_block" in site or "te1" in site}
        for adapter in adapters.values():
            for parameter in adapter.parameters():
                parameter.data *= 0.3
        path = folder / f"{method}.safetensors"
        made[method] = write_adapter(path, adapters, parts=parts, family="sd1", precision="fp32", metadata=told)
    return made


def test_the_command_line_blends_into_the_gallery_and_knows_the_starter(starter_files: dict, tmp_path: Path) -> None:
    first, second = starter_files["lora"], starter_files["oft"]
    words = ["blend", f"{first}:0.5:0.25:mid=0.5", f"{second}:0.4", "--title", "Both", "--workspace", tmp_path]
    told = json.loads(run(*words, "--json"))
    assert told["file"] == str(tmp_path / "adapters" / "both.safetensors")
    assert told["error"] < 1e-3
    notes = json.loads((tmp_path / "adapters" / "both.json").read_text())
    assert notes["activation text"] == "sks toy"
    recipe = json.loads(read_adapter(Path(told["file"])).metadata["reparam_blend"])
    assert [(row["strength"], row.get("te_strength")) for row in recipe["sources"]] == [(0.5, 0.25), (0.4, None)]
    assert recipe["sources"][0]["blocks"] == {"mid": 0.5}


def test_the_command_line_converts_resizes_and_exports(starter_files: dict, tmp_path: Path) -> None:
    source, out = starter_files["oft"], tmp_path / "lora.safetensors"
    assert "relative error" in run("convert", source, "--as", "lora", "--rank", 4, "--out", out)
    assert read_adapter(out).method == "lora"
    small = tmp_path / "small.safetensors"
    told = json.loads(run("resize", out, "--sv-fro", 0.9, "--out", small, "--json"))
    assert 0 < told["error"] <= (1 - 0.9**2) ** 0.5
    turned = tmp_path / "half.safetensors"
    run("convert", f"{source}:0.5", "--angle", "--out", turned, "--precision", "fp32")
    assert read_adapter(turned).method == "oft"
    shown = run("export", small, "--to", "diffusers", "--out", tmp_path / "d.safetensors")
    assert "opens in diffusers" in shown
    assert (tmp_path / "d.proof.json").is_file()


def test_a_lossy_blend_shows_its_pictures(tmp_path: Path) -> None:
    (save_tiny(tmp_path / "tiny", "sd1") / "habits.json").write_text('{"steps": 2}')
    model = load_model(tmp_path / "tiny", device="cpu")
    adapters = adapters_for(model.parts, "lora", rank=4)
    file = write_adapter(tmp_path / "lora.safetensors", adapters, parts=model.parts, family="sd1")
    small = tmp_path / "small.safetensors"
    words = ["convert", file, "--as", "lora", "--rank", 1, "--out", small, "--model", tmp_path / "tiny"]
    assert "Before and after" in run(*words, "--picture", "a red apple")
    sheet = Image.open(tmp_path / "small.png").convert("RGB")
    assert sheet.tobytes() == ab_picture(model, "a red apple", [file], [small], names=("exact", "written")).tobytes()
    rows = [sheet.crop((60, top, sheet.width, top + 32)).tobytes() for top in (33, 33 + 38, 33 + 76)]
    assert len(set(rows)) == 3, "the base, the exact change and the file draw three different rows"


def test_every_method_is_listed_with_its_options() -> None:
    told = run("blend", "--list")
    for name, method in BLENDS.items():
        assert f"{name}  ({method.title})" in told
        assert all(field.description in told for field in method.options.model_fields.values())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["blend"], "No adapters"),
        (["blend", "{lora}", "--set", "density"], "key=value"),
        (["blend", "{lora}", "--method", "ties", "--set", "density=7"], "density"),
        (["blend", "{lora}", "--as", "lora"], "needs a rank"),
        (["blend", "{lora}:0.5:1:mid=x"], "no number"),
        (["blend", "{lora}", "--precision", "fp8"], "fp8"),
        (["blend", "{lora}", "--method", "slerp"], "takes 2"),
        (["export", "{lora}", "--to", "kohya", "--out", "x.safetensors"], "kohya"),
        (["convert", "nowhere"], "no adapter called"),
    ],
)
def test_mistakes_on_the_command_line_are_told(words: list[str], told: str, starter_files: dict) -> None:
    done = CliRunner().invoke(app, [word.format(**starter_files) for word in words])
    assert isinstance(done.exception, UserError)
    assert told in str(done.exception)
