"""The doctor and the comparison: what is wrong is found, what can be mended is mended, hostile files cost nothing."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import get_args

import pytest
import torch
from formats_oracles import adapters_for, lycoris_file, lycoris_reads
from formats_tiny import assert_equal, output, parts_like, with_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from test_blend_laws import tiny_model
from torch import nn
from typer.testing import CliRunner

from reparam_diffusion.__main__ import app
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.export import TARGETS
from reparam_diffusion.formats.mapped import open_mapped
from reparam_diffusion.formats.programs import markdown_table
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import write_adapter
from reparam_diffusion.gallery.blend import BLENDS
from reparam_diffusion.gallery.blend.forms import Form
from reparam_diffusion.gallery.collide import Collision, collide, collision_lines, heat_map
from reparam_diffusion.gallery.doctor import diagnose, diagnosis_lines, repair
from reparam_diffusion.inject import find_module
from reparam_diffusion.models.source import STARTER

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    return parts_like("sd1")


@pytest.fixture
def lora(parts: dict, tmp_path: Path) -> Path:
    adapters = adapters_for(parts, "lora", rank=3, alpha=5.0)
    return write_adapter(tmp_path / "lora.safetensors", adapters, parts=parts, family="sd1", precision="fp32")


def programs(path: Path, parts: dict) -> dict[str, bool]:
    return {verdict.program: verdict.opens for verdict in diagnose(path, tiny_model(parts)).verdicts}


def test_a_good_file_is_healthy(parts: dict, lora: Path) -> None:
    found = diagnose(lora, tiny_model(parts))
    assert found.is_healthy
    assert found.findings == ()
    assert found.layers == found.fitting == len(read_adapter(lora).sites)
    assert found.kinds == {"lora": found.layers}
    assert found.ranks == {3: found.layers}
    assert found.alphas == {5.0: found.layers}
    assert found.dtypes == {"float32": 2 * found.layers}
    assert all(verdict.opens for verdict in found.verdicts)


def test_everything_that_is_broken_is_found_and_the_rest_is_saved(parts: dict, lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora)
    names = sorted({key.partition(".")[0] for key in tensors if "attn" in key})
    tensors[f"{names[0]}.lora_up.weight"][0, 0] = torch.nan
    tensors[f"{names[1]}.lora_up.weight"].zero_()
    tensors[f"{names[2]}.alpha"] = torch.tensor(4096.0)
    del tensors[f"{names[3]}.alpha"]
    tensors[f"{names[4]}.lora_down.weight"] = torch.ones(3, 5)
    tensors["lora_unet_nowhere.lora_up.weight"] = torch.ones(3, 3)
    tensors["lora_unet_nowhere.lora_down.weight"] = torch.ones(3, 3)
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad, {"ss_base_model_version": "sdxl_base_v1-0", "sshs_model_hash": "0" * 64})
    model = tiny_model(parts)
    with pytest.raises(UserError, match="another base model"):
        next(collide(bad, lora, model=model))
    found = diagnose(bad, model)
    told = {finding.what.split(" ")[0]: finding for finding in found.findings}
    assert not found.is_healthy
    assert len(told["Values"].layers) == 1
    assert len(told["Odd"].layers) == 1
    assert (
        sum("all zero" in f.what for f in found.findings) == sum("without alpha" in f.what for f in found.findings) == 1
    )
    assert "a factor of shape (3, 5) does not fit" in str(next(f for f in found.findings if "shapes" in f.what).layers)
    assert any("nowhere" in layer for f in found.findings for layer in f.layers)
    assert any("header says Stable Diffusion XL" in f.what for f in found.findings)
    assert any("hash" in f.what for f in found.findings)
    assert found.fitting == found.layers - 2
    assert not {v.program: v for v in found.verdicts}["LyCORIS"].opens
    assert "!" in "\n".join(diagnosis_lines(found))
    *_, out = repair(bad, tmp_path / "mended.safetensors", model=model, precision="fp32")
    mended = diagnose(out, model)
    assert mended.is_healthy
    assert mended.layers == mended.fitting == found.layers - 3
    good, back = read_adapter(lora).match(parts)[0], read_adapter(out).match(parts)[0]
    for site in [site for site in back if "resnets" in site]:
        weight = find_module(parts, site).weight
        torch.testing.assert_close(back[site].delta(weight), good[site].delta(weight))
    assert_equal(lycoris_reads(parts, out, "sd1"), with_adapters(parts, back), output(parts))


def test_nothing_right_is_nothing_saved(parts: dict, lora: Path, tmp_path: Path) -> None:
    save_file(
        {key: torch.full_like(tensor, torch.nan) for key, tensor in load_file(lora).items()}, tmp_path / "n.safetensors"
    )
    with pytest.raises(UserError, match="Nothing of this file"):
        list(repair(tmp_path / "n.safetensors", tmp_path / "out.safetensors", model=tiny_model(parts)))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "bad"),
    [
        ({"network_module": "loha"}, {"diffusers", "kohya"}),
        ({"use_tucker": True}, {"diffusers", "kohya"}),
        ({"network_module": "lokr", "use_tucker": True, "factor": 2, "lora_dim": 1, "conv_lora_dim": 1}, {"LyCORIS", "ComfyUI", "diffusers", "kohya"}),
        ({"network_module": "diag-oft", "constraint": 0.05}, {"ComfyUI", "diffusers", "kohya"}),
        ({"network_module": "diag-oft", "constraint": 0.0, "rescaled": True}, {"ComfyUI", "diffusers", "kohya"}),
        ({"weight_decompose": True, "wd_on_out": True}, {"A1111", "ComfyUI", "diffusers", "kohya"}),
        ({"weight_decompose": True, "wd_on_out": False}, {"LyCORIS", "diffusers", "kohya"}),
        ({"network_module": "glora"}, {"A1111", "diffusers", "kohya"}),
        ({"network_module": "ia3"}, {"LyCORIS", "ComfyUI", "diffusers", "kohya"}),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else str(value),
)  # fmt: skip
def test_who_opens_what_is_told_by_the_tensors(settings: dict, bad: set, parts: dict, tmp_path: Path) -> None:
    lycoris_file(parts, tmp_path / "a.safetensors", **settings)
    opens = programs(tmp_path / "a.safetensors", parts)
    # transformers 5.6 made LyCORIS write text encoder names without text_model_, so only the form is looked at.
    assert {program for program, yes in opens.items() if not yes} == bad


def test_names_decide_too(parts: dict, lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora)
    dotted = {f"unet.mid_block.attentions.0.proj_in.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    for name, renamed, bad in (
        (
            "lycoris",
            {k.replace("lora_unet_", "lycoris_"): t for k, t in tensors.items()},
            {"A1111", "diffusers", "kohya"},
        ),
        ("dotted", dotted, {"A1111", "ComfyUI", "LyCORIS", "kohya"}),
    ):
        save_file(renamed, tmp_path / f"{name}.safetensors")
        opens = programs(tmp_path / f"{name}.safetensors", parts)
        assert {program for program, yes in opens.items() if not yes} == bad


def test_the_base_is_known_by_its_header_or_by_what_fits(lora: Path, tmp_path: Path, starter_unet: nn.Module) -> None:
    adapters = adapters_for({"unet": starter_unet}, "lora", rank=2)
    told = {"ss_sd_model_name": STARTER.name}
    file = write_adapter(
        tmp_path / "s.safetensors", adapters, parts={"unet": starter_unet}, family="sd1", metadata=told
    )
    assert "starter-model" in diagnose(file).certainty
    assert diagnose(lora).certainty.startswith("unsure")
    save_file(
        {
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.ones(2, 1024),
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": torch.ones(1280, 2),
        },
        tmp_path / "two.safetensors",
        {"ss_base_model_version": "sd_v1"},
    )
    found = diagnose(tmp_path / "two.safetensors")
    assert (found.family, found.fitting) == ("sd2", 1)
    assert "says otherwise" in found.certainty
    assert any("header says Stable Diffusion 1.x" in finding.what for finding in found.findings)


# --- hostile files ----------------------------------------------------------------------------------------------------
def raw(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was opened')",))


HOSTILE = {
    "nothing": (b"", "It is empty"),
    "a few bytes": (b"abc", "header ends outside"),
    "a header longer than the file": (raw({}, length=10**6), "header ends outside"),
    "a header of exabytes": (raw({}, length=2**62), "header ends outside"),
    "no JSON": (raw(b"{'a': 1}"), "not JSON"),
    "not a table": (raw([1, 2]), "not a table"),
    "nested without end": (raw(b"[" * 100_000), "not JSON"),
    "a shape of terabytes": (raw({"a": entry([2**20, 2**20], 0, 16)}, b"0" * 16), "bytes"),
    "a shape without end": (raw({"a": entry([10**30, 10**30], 0, 16)}, b"0" * 16), "bytes"),
    "a negative shape": (raw({"a": entry([-2, -2], 0, 16)}, b"0" * 16), "no whole number"),
    "a fraction of a shape": (raw({"a": entry([2.5], 0, 10)}, b"0" * 10), "no whole number"),
    "overlapping tensors": (raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12), "overlaps"),
    "a gap": (raw({"a": entry([2], 4, 12)}, b"0" * 12), "overlaps"),
    "more data than told": (raw({"a": entry([2], 0, 8)}, b"0" * 12), "its header tells"),
    "less data than told": (raw({"a": entry([2], 0, 8)}, b"0" * 4), "its header tells"),
    "an unknown number format": (raw({"a": entry([2], 0, 8, "F42")}, b"0" * 8), "F42"),
    "a place that is none": (raw({"a": {"dtype": "F32"}}), "where a lies"),
    "two tensors of one name": (raw(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"0"), "a twice"),
    "a pickle": (pickle.dumps(Bomb()), "pickle"),
    "no tensors": (raw({}), "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_a_sentence_and_cost_nothing(kind: str, tmp_path: Path) -> None:
    content, word = HOSTILE[kind]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=word) as caught:
        diagnose(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
    assert len(str(caught.value)) < 300


def test_a_torch_file_under_another_name_is_a_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="pickle"):
        read_adapter(tmp_path / "a.safetensors")


def test_a_mapped_file_holds_what_safetensors_holds(tmp_path: Path) -> None:
    chance = torch.Generator().manual_seed(0)
    tensors = {
        "half": torch.randn(3, 5, generator=chance).half(), "brain": torch.randn(7, generator=chance).bfloat16(),
        "whole": torch.arange(4), "one": torch.tensor(2.5), "byte": torch.ones(3, dtype=torch.uint8),
        "eight": torch.randn(3, generator=chance).to(torch.float8_e4m3fn), "yes": torch.tensor([True]),
        "none": torch.zeros(0, 4), "double": torch.randn(2, generator=chance).double(),
    }  # fmt: skip
    (tmp_path / "a.safetensors").write_bytes(save(tensors, {"k": "ü"}))
    mapped = open_mapped(tmp_path / "a.safetensors")
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as opened:
        assert mapped.metadata == opened.metadata() == {"k": "ü"}
        for _ in range(2):
            for key in opened.keys():  # noqa: SIM118  (not a dict)
                wanted = opened.get_tensor(key)
                assert mapped.tensors[key].dtype == wanted.dtype
                assert mapped.tensors[key].double().equal(wanted.double()) or key == "none"
            mapped.let_go()  # and read again


# --- two adapters -----------------------------------------------------------------------------------------------------
def test_an_adapter_agrees_with_itself_and_opposes_its_negative(parts: dict, lora: Path, tmp_path: Path) -> None:
    negative = read_adapter(lora).match(parts)[0]
    for adapter in negative.values():
        adapter.up.data = -2 * adapter.up.data
    other = write_adapter(tmp_path / "minus.safetensors", negative, parts=parts, family="sd1", precision="fp32")
    for path, cosine in ((lora, 1.0), (other, -1.0)):
        *_, found = collide(lora, path, model=tiny_model(parts))
        assert isinstance(found, Collision)
        assert found.cosine == pytest.approx(cosine, abs=1e-5)
        assert all(row.cosine == pytest.approx(cosine, abs=1e-4) for row in found.layers)
        assert found.shared == len(found.layers)
    assert all(row.second == pytest.approx(2 * row.first, rel=1e-4) for row in found.layers)
    assert "against each other" in "\n".join(collision_lines(found))


def test_cosines_are_those_of_the_dense_changes_for_any_two_methods(parts: dict, lora: Path, tmp_path: Path) -> None:
    turned = adapters_for(parts, "oft", block_size=4)
    oft = write_adapter(tmp_path / "oft.safetensors", turned, parts=parts, family="sd1", precision="fp32")
    *_, found = collide(lora, oft, model=tiny_model(parts))
    first, second = read_adapter(lora).match(parts)[0], read_adapter(oft).match(parts)[0]
    for row in found.layers[::5]:
        weight = find_module(parts, row.site).weight
        a, b = (side[row.site].delta(weight).detach().flatten() for side in (first, second))
        assert row.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm()).clamp_min(1e-12)), abs=1e-4)


def test_the_heat_map_has_a_cell_for_every_block_and_kind(parts: dict, lora: Path, tmp_path: Path) -> None:
    words = ["compare", lora, lora, "--picture", tmp_path / "map.png"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(done.exception, UserError), "the tiny model is no standard one, and was not named"
    *_, found = collide(lora, lora, model=tiny_model(parts))
    sheet = heat_map(found)
    colours = {colour for _, colour in sheet.getcolors(10**6)}
    assert (40, 40, 255) in colours, "a cosine of one is the deepest blue"
    assert sheet.width > sheet.height


def test_doctor_on_the_command_line_tells_and_mends(starter_unet: nn.Module, tmp_path: Path) -> None:
    adapters = adapters_for({"unet": starter_unet}, "lora", rank=2, convolutions=False)
    told = {"ss_sd_model_name": STARTER.name}
    file = write_adapter(
        tmp_path / "s.safetensors", adapters, parts={"unet": starter_unet}, family="sd1", metadata=told
    )
    done = CliRunner().invoke(app, ["doctor", str(file), "--repair", str(tmp_path / "m.safetensors")])
    assert done.exit_code == 0, done.exception
    assert "Healthy   yes" in done.stdout
    assert "Repaired" in done.stdout
    assert set(read_adapter(tmp_path / "m.safetensors").sites) == set(read_adapter(file).sites)
    as_json = CliRunner().invoke(app, ["doctor", str(file), "--json"])
    assert json.loads(as_json.stdout)["healthy"] is True
    same = CliRunner().invoke(app, ["compare", str(file), str(file), "--picture", str(tmp_path / "map.png"), "--json"])
    assert json.loads(same.stdout)["cosine"] == pytest.approx(1, abs=1e-4)
    assert (tmp_path / "map.png").is_file()


def test_the_table_in_the_docs_is_the_one_that_the_doctor_uses() -> None:
    text = (Path(__file__).parents[1] / "docs" / "blending.md").read_text(encoding="utf-8")
    assert text.partition("<!-- programs -->\n")[2].strip() == markdown_table()
    for method in BLENDS:
        assert f"| `{method}` |" in text
    for form in get_args(Form.model_fields["kind"].annotation):
        assert f"| `{form}` |" in text
    for target in TARGETS:
        assert f"| `{target}` |" in text
