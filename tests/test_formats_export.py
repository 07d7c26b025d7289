"""Exports: every method to every target, proved by the programs themselves (LyCORIS 4.1.3, PEFT 0.21.2, diffusers 0.42.1)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from formats_oracles import adapters_for, lycoris_reads
from formats_tiny import assert_equal, output, parts_like, with_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.export import TARGETS, Exported, export_adapter, proof_beside
from reparam_diffusion.formats.proof import lycoris_reading
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import write_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torchvision.*:UserWarning"),
]
FORMS = {
    "lora": ("lora", {"rank": 3, "alpha": 5.0, "conv_rank": 2, "conv_alpha": 7.0}),
    "dora": ("lora", {"rank": 3, "alpha": 5.0, "weight_decompose": True}),
    "loha": ("loha", {"rank": 3, "alpha": 5.0}),
    "lokr": ("lokr", {"factor": -1}),
    "oft": ("oft", {"block_size": 4}),
    "oft on inputs": ("oft", {"block_size": 4, "side": "input"}),
    "adalora": ("adalora", {"init_rank": 4, "alpha": 7.0}),
}
CANNOT = {("loha", "diffusers"), ("lokr", "diffusers"), ("oft", "diffusers"), ("oft on inputs", "diffusers"), ("oft", "peft")}  # fmt: skip
READ_BY = {"lycoris": "LyCORIS", "a1111": "LyCORIS", "diffusers": "diffusers", "peft": "PEFT"}


def run(source: Path, out: Path, parts: dict[str, nn.Module], family: str, **more: object) -> Exported:
    steps = list(export_adapter(source, out, parts=parts, family=family, **more))
    done = steps[-1]
    assert isinstance(done, Exported)
    counts = [step[0] for step in steps[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == steps[0][1] == steps[-2][1]
    return done


@pytest.mark.parametrize(
    ("family", "form", "target"),
    [("sd1", form, target) for form in FORMS for target in TARGETS]
    + [("sdxl", form, target) for form, target in (("lora", "lycoris"), ("adalora", "diffusers"), ("loha", "peft"))],
)
def test_every_method_reaches_every_target_that_can_hold_it(
    family: str, form: str, target: str, tmp_path: Path
) -> None:
    parts = parts_like(family)
    method, spec = FORMS[form]
    adapters = adapters_for(parts, method, convolutions=form != "oft on inputs", **spec)
    if form == "oft on inputs":
        adapters = {site: adapter for site, adapter in adapters.items() if adapter.shape[1] % 4 == 0}
    source = write_adapter(tmp_path / "source.safetensors", adapters, parts=parts, family=family, precision="fp32")
    out = tmp_path / ("out" if target == "peft" else "out.safetensors")
    if (form, target) in CANNOT:
        with pytest.raises(UserError, match=r"cannot be written|is no LoRA"):
            run(source, out, parts, family, target=target, precision="fp32")
        return
    before = output(parts)
    done = run(source, out, parts, family, target=target, precision="fp32")
    assert torch.equal(output(parts), before), "the model is as it was"
    assert done.rounding <= 1e-4
    assert done.layers == len(read_adapter(source).sites)
    if form == "oft on inputs" and target == "lycoris":
        assert "knows no such adapter" in done.readings[0].failed
        return
    assert READ_BY[target] in done.readings[0].program
    for reading in done.readings[:1] if form == "dora" else done.readings:  # diffusers drops kohya's DoRA, and is told
        assert reading.agrees, reading.sentence()
        assert reading.largest <= (1e-4 if form in ("oft", "oft on inputs", "dora") else 2e-6), reading.sentence()
    kept = json.loads(proof_beside(out).read_text())
    assert kept["readings"][0]["agrees"]
    assert str(tmp_path) not in proof_beside(out).read_text()
    assert_equal(with_adapters(parts, read_adapter(out).match(parts)[0]), with_adapters(parts, adapters), before)


def test_a1111_gets_whole_differences_where_it_would_read_otherwise(tmp_path: Path) -> None:
    parts = parts_like("sd1")
    adapters = adapters_for(parts, "lora", rank=3, alpha=5.0, weight_decompose=True)
    source = write_adapter(tmp_path / "s.safetensors", adapters, parts=parts, family="sd1", precision="fp32")
    done = run(source, tmp_path / "o.safetensors", parts, "sd1", target="a1111", precision="fp32")
    assert done.rewritten == {"DoRA": len(adapters)}
    assert {key.rpartition(".")[2] for key in load_file(done.path)} == {"diff"}
    assert any("whole differences" in line for line in done.sentences())
    assert_equal(lycoris_reads(parts, done.path, "sd1"), with_adapters(parts, adapters), output(parts))


@pytest.mark.parametrize(("precision", "allowed"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_the_rounding_is_told(precision: str, allowed: float, tmp_path: Path) -> None:
    parts = parts_like("sd1")
    adapters = adapters_for(parts, "loha", rank=3)
    source = write_adapter(tmp_path / "s.safetensors", adapters, parts=parts, family="sd1", precision="fp32")
    done = run(source, tmp_path / "o.safetensors", parts, "sd1", precision=precision)
    assert allowed / 10 < done.rounding < allowed
    assert done.readings[0].agrees
    assert done.readings[0].largest < 1e-6, "the program reads the rounded file as we do"


def test_a_program_that_reads_something_else_is_told(tmp_path: Path) -> None:
    parts = parts_like("sd1")
    path = write_adapter(
        tmp_path / "s.safetensors",
        adapters_for(parts, "oft", block_size=4),
        parts=parts,
        family="sd1",
        precision="fp32",
    )
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith("alpha")]:
        del tensors[key]  # we take that as "no constraint", LyCORIS as a mistake
    save_file(tensors, path)
    reading = lycoris_reading(path, parts, "sd1")
    assert not reading.agrees
    assert "cannot read" in reading.sentence()


def test_private_fields_are_stripped_on_request_and_the_trigger_stays(tmp_path: Path) -> None:
    parts = parts_like("sd1")
    told = {
        "ss_dataset_dirs": '{"10_sks toy": {"img_count": 3}}', "ss_tag_frequency": '{"10_sks toy": {"my house": 3}}',
        "ss_training_comment": "for anna", "reparam_config": "images = '/home/me/x'", "modelspec.author": "me",
        "ss_output_name": "teddy", "something_new": "/home/me",
    }  # fmt: skip
    adapters = adapters_for(parts, "lora", rank=2)
    source = write_adapter(tmp_path / "s.safetensors", adapters, parts=parts, family="sd1", metadata=told)
    for strip in (False, True):
        done = run(source, tmp_path / f"{strip}.safetensors", parts, "sd1", strip=strip)
        with safe_open(str(done.path), "pt") as opened:
            header = dict(opened.metadata())
        assert read_adapter(done.path).trigger == "sks toy"
        assert header["ss_output_name"] == "teddy"
        assert ("my house" in str(header)) is not strip
        assert ("/home/me" in str(header)) is not strip
        assert ("anna" in str(header)) is not strip


def test_a_file_for_another_model_is_not_exported(tmp_path: Path) -> None:
    xl = parts_like("sdxl")
    source = write_adapter(
        tmp_path / "s.safetensors", adapters_for({"te2": xl["te2"]}, "lora"), parts=xl, family="sdxl"
    )
    with pytest.raises(UserError, match="does not fit"):
        run(source, tmp_path / "o.safetensors", parts_like("sd1"), "sd1")
    assert not (tmp_path / "o.safetensors").exists()
