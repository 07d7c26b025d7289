"""Commands on files: no input and no existing file is replaced, places are checked first, and nothing is left over."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from reparam_diffusion import files
from reparam_diffusion.__main__ import app
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.header import compare_headers, find_prediction_type, inherit_header
from reparam_diffusion.gallery import shelf

TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
V = {
    "ss_v2": "True", "ss_base_model_version": "sd_v2_768_v", "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
    "modelspec.prediction_type": "v", "modelspec.resolution": "768x768", "ss_zero_terminal_snr": "True",
    "ss_clip_skip": "2", "modelspec.trigger_phrase": "sks toy", "modelspec.license": "CC0",
}  # fmt: skip
SOURCE = "{source}"
COMMANDS = {
    "blend": ["blend", SOURCE, "--out", "{out}"],
    "convert": ["convert", SOURCE, "--as", "lora", "--rank", "2", "--out", "{out}"],
    "resize": ["resize", SOURCE, "--rank", "2", "--out", "{out}"],
    "export": ["export", SOURCE, "--out", "{out}"],
    "export peft": ["export", SOURCE, "--to", "peft", "--out", "{out}"],
    "bake": ["bake", SOURCE, "--out", "{out}"],
    "extract": ["extract", "starter", "--base", "starter", "--out", "{out}"],
    "repair": ["doctor", SOURCE, "--repair", "{out}"],
    "compare": ["compare", SOURCE, SOURCE, "--picture", "{out}"],
    "generate": ["generate", "--prompt", "x", "--steps", "1", "--out", "{out}", "--image", "{image}"],
}


def write(file: Path, header: dict[str, str], *, wide: int = 1024, tall: int = 320, rank: int = 8) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    chance = torch.Generator().manual_seed(0)
    tensors = {
        f"{TO_K}.lora_down.weight": torch.randn(rank, wide, generator=chance),
        f"{TO_K}.lora_up.weight": torch.randn(tall, rank, generator=chance),
        f"{TO_K}.alpha": torch.tensor(float(rank)),
    }
    save_file(tensors, file, header)
    return file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    return write(tmp_path / "in" / "v.safetensors", V)


def invoke(name: str, source: Path, out: Path) -> object:
    words = [word.format(source=source, out=out, image=source.parent.parent / "image.png") for word in COMMANDS[name]]
    more = [] if name == "extract" else ["--workspace", str(source.parent.parent / "ws")]
    return CliRunner().invoke(app, [*words, *more]).exception


def header_of(file: Path) -> dict[str, str]:
    with safe_open(str(file), "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("extract", "generate")])
@pytest.mark.parametrize("spelling", ["same", "relative", "symlink", "hardlink"])
def test_the_input_is_never_replaced(
    name: str, spelling: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.chdir(tmp_path)
    out = {"same": source, "relative": Path("in/../in/v.safetensors")}.get(spelling, tmp_path / "other.safetensors")
    if spelling == "symlink":
        out.symlink_to(source)
    elif spelling == "hardlink":
        out.hardlink_to(source)
    error = invoke(name, source, out)
    assert isinstance(error, UserError) and "would replace the input" in str(error)
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "generate"])
def test_a_file_of_the_users_is_never_replaced(name: str, source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_text("mine")
    error = invoke(name, source, mine)
    assert isinstance(error, UserError) and "exists already" in str(error)
    assert mine.read_text() == "mine"


def test_generate_keeps_the_image_it_starts_from(source: Path, tmp_path: Path) -> None:
    error = invoke("generate", source, tmp_path / "image.png")
    assert isinstance(error, UserError) and "would replace the input" in str(error)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_place_that_cannot_be_written_is_told_before_any_work(
    name: str, code: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(code, os.strerror(code))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    for place in ("reparam_diffusion.models.load.load_model", "reparam_diffusion.models.skeleton.skeleton"):
        monkeypatch.setattr(place, never)
    error = invoke(name, source, tmp_path / "new" / "o.png")
    assert isinstance(error, UserError) and "cannot be written" in str(error)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_in_the_way_of_a_folder_is_told(name: str, source: Path, tmp_path: Path) -> None:
    error = invoke(name, source, source / "o.png")
    assert isinstance(error, UserError) and "is a file, not a folder" in str(error)


@pytest.mark.parametrize("name", ["blend", "convert", "resize", "export", "export peft", "repair", "compare"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("reparam_diffusion.formats.container.put_on_disk", full)
    monkeypatch.setattr("reparam_diffusion.files.put_on_disk", full)
    monkeypatch.setattr(Image.Image, "save", full)
    error = invoke(name, source, tmp_path / "out" / "o.png")
    assert isinstance(error, UserError) and "disk is full" in str(error)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_the_gallery_on_a_full_disk_is_a_sentence(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shelf.shutil, "copyfile", full)
    with pytest.raises(UserError, match="disk is full"):
        shelf.add(source, tmp_path / "ws", name="x")
    assert [path.name for path in (tmp_path / "ws" / "adapters").iterdir()] == [".lock"]


# --- headers ---------------------------------------------------------------------------------------------------------
def test_v_and_epsilon_are_not_blended(source: Path, tmp_path: Path) -> None:
    eps = write(tmp_path / "eps.safetensors", {"ss_v2": "True", "ss_base_model_version": "sd_v2"})
    done = CliRunner().invoke(app, ["blend", str(source), str(eps), "--out", str(tmp_path / "o.safetensors")])
    assert isinstance(done.exception, UserError)
    assert "v.safetensors is for v-prediction, eps.safetensors is for epsilon" in str(done.exception)


def test_what_only_one_file_says_is_told(source: Path, tmp_path: Path) -> None:
    silent = write(tmp_path / "silent.safetensors", {"ss_v2": "True"})
    done = CliRunner().invoke(app, ["blend", str(source), str(silent), "--out", str(tmp_path / "o.safetensors")])
    assert done.exit_code == 0, done.exception
    assert "the result says v-prediction" in done.output and "zero terminal SNR differs" in done.output
    assert header_of(tmp_path / "o.safetensors")["ss_base_model_version"] == "sd_v2_768_v"


@pytest.mark.parametrize("name", ["blend", "convert", "resize", "export", "repair"])
def test_a_header_keeps_what_it_said(name: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    assert invoke(name, source, out) is None
    header = header_of(out)
    assert {key: header.get(key) for key in V} == V


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (V, "v"), ({"ss_base_model_version": "sd_v2_v"}, "v"), ({"ss_base_model_version": "sd_v1_v"}, "v"),
        ({"modelspec.prediction_type": "v"}, "v"), ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"ss_base_model_version": "sd_v1"}, "epsilon"), ({"ss_base_model_version": "sd_v2"}, "epsilon"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, ""), ({}, ""),
        ({"ss_base_model_version": "sdxl_base_v1-0", "modelspec.prediction_type": "v"}, "v"),
    ],
    ids=str,
)  # fmt: skip
def test_prediction_types_are_read(header: dict[str, str], kind: str) -> None:
    assert find_prediction_type(header) == kind


def test_headers_of_several_files_keep_what_they_share() -> None:
    other = V | {"ss_clip_skip": "1", "modelspec.license": "MIT"}
    kept = inherit_header([V, other], "sd2")
    assert kept["ss_base_model_version"] == "sd_v2_768_v" and kept["ss_zero_terminal_snr"] == "True"
    assert "ss_clip_skip" not in kept and "modelspec.license" not in kept
    notes = compare_headers([V, other])
    assert any("clip skip differs (2, 1)" in note for note in notes) and any("license" in note for note in notes)
    assert inherit_header([{"ss_base_model_version": "sd_v1"}], "sdxl")["ss_base_model_version"] == "sdxl_base_v1-0"


# --- cancelling ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to_gallery", [True, False])
def test_a_command_that_is_ended_leaves_nothing(ending: signal.Signals, to_gallery: bool, tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.safetensors", {"ss_v2": "True"})
    code = (
        "import sys, time, reparam_diffusion.gallery.blend.result as r\n"
        "real = r._report_on\n"
        "def slow(*a):\n    print('begun', flush=True)\n    time.sleep(60)\n    return real(*a)\n"
        "r._report_on = slow\n"
        "from reparam_diffusion.__main__ import main\nmain()\n"
    )
    place = [] if to_gallery else ["--out", str(tmp_path / "out" / "o.safetensors")]
    words = ["blend", str(source), "--workspace", str(tmp_path / "ws"), *place]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    left = tmp_path / "ws" if to_gallery else tmp_path / "out"
    assert any(left.rglob("*.part")), "it had begun to write"
    process.send_signal(ending)
    assert process.wait(20) != 0
    assert not [path for path in left.rglob("*") if path.name != ".lock" and path.is_file()]
    assert not any(left.rglob("*.part"))


def test_what_a_killed_command_left_is_swept_by_the_next(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.safetensors", {"ss_v2": "True"})
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ws = tmp_path / "ws"
    (ws / "adapters").mkdir(parents=True)
    left = Path(str(files.hidden_part(ws / "adapters" / "x")).replace(f".{os.getpid()}-", f".{dead.pid}-"))
    left.write_text("")
    assert CliRunner().invoke(app, ["blend", str(source), "--workspace", str(ws)]).exit_code == 0
    assert not left.exists()
    time.sleep(0)
