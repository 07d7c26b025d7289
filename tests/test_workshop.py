"""The workshop: what the form asks is what the command line understands; a work ends in a state and a sentence."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from run_folders import ROOT, wait_for
from safetensors.torch import save_file

from reparam_diffusion.__main__ import app
from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery import shelf
from reparam_diffusion.jobs import workshop
from ui import blend_acts as acts
from ui import blend_tab

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)
VALUES: dict[str, Any] = {
    "work": "blend", "method": "dare", "kind": "lora", "rank": 4, "energy": 0, "megabytes": None, "factor": 8,
    "block_size": 8, "model": "starter", "precision": "fp32", "name": "-x", "picture": "a toy", "target": "peft",
    "strip": True, "tuned": "/somewhere/tuned", "checkpoint": True, "angle": True, "repair": True, "dare.drop": 0.5, "dare.seed": 3,
}  # fmt: skip
ROWS: list[acts.Row] = [
    ("one", 0.8, None, "mid=0.5"),
    ("two", -1.0, 0.5, ""),
    ("", 1.0, None, ""),
    ("", None, None, ""),
]


@pytest.fixture
def stocked(workspace: Path) -> Path:
    """A workspace with two adapters for the starter model."""
    shelf = workspace / "adapters"
    shelf.mkdir(parents=True)
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        key = "lora_unet_mid_block_attentions_0_proj_in"
        tensors = {
            f"{key}.lora_down.weight": torch.randn(2, 288, 1, 1),
            f"{key}.lora_up.weight": torch.randn(288, 2, 1, 1),
        }
        save_file({**tensors, f"{key}.alpha": torch.tensor(2.0)}, shelf / f"{name}.safetensors")
    return workspace


@pytest.mark.parametrize("work", acts.WORKS)
def test_the_command_line_understands_what_the_form_asks(work: str, stocked: Path) -> None:
    arguments = acts.arguments_of(stocked, VALUES | {"work": work}, ROWS, now=NOW)
    assert arguments[0] == work in workshop.COMMANDS
    command: Any = typer.main.get_command(app)  # Any: click's own classes
    context = command.commands[work].make_context(work, arguments[1:])
    assert Path(str(context.params.get("workspace", stocked))) == stocked
    sources = context.params.get("sources") or [context.params.get("source")]
    if work in ("blend", "bake"):
        assert list(sources) == ["one:0.8:mid=0.5", "two:-1:0.5"]
    assert context.params.get("angle", True) and context.params.get("repair", True)
    if work == "blend":
        assert {"drop=0.5", "seed=3"} == set(context.params["settings"])


def test_every_lossy_step_draws_its_comparison_on_a_quick_model(stocked: Path) -> None:
    shelf.edit("one", stocked, {"activation text": "sks toy"})
    for kind, prompt in (("lora", "a 3d icon of sks toy"), ("exact", ""), ("diff", "")):
        values = VALUES | {"kind": kind, "picture": ""}
        arguments = acts.arguments_of(stocked, values, ROWS, now=NOW)
        told = arguments[arguments.index("--picture") + 1] if "--picture" in arguments else ""
        assert told == prompt


def test_every_method_and_every_option_of_it_has_a_control(workspace: Path) -> None:
    import gradio as gr

    from reparam_diffusion.gallery.blend import BLENDS

    with gr.Blocks(analytics_enabled=False):
        tab = blend_tab.build_blend_tab(workspace)
    for name, method in BLENDS.items():
        assert name in tab.options
        assert {f"{name}.{option}" for option in method.options.model_fields} <= set(tab.fields)
    assert set().union(*acts.SHOWN.values()) == set(tab.groups)


@pytest.mark.parametrize(("rows", "work"), [([("", 1.0, None, "")], "blend"), ([ROWS[0]], "compare")])
def test_too_few_adapters_are_told(rows: list[acts.Row], work: str, stocked: Path) -> None:
    with pytest.raises(UserError, match="This needs"):
        acts.arguments_of(stocked, VALUES | {"work": work}, rows, now=NOW)


@pytest.mark.parametrize("name", ["../one", "--help", "/etc/passwd", ".one"])
def test_only_what_lies_in_the_gallery_is_opened(name: str, stocked: Path) -> None:
    with pytest.raises(UserError):
        acts.arguments_of(stocked, VALUES, [(name, 1.0, None, "")], now=NOW)
    for folder in ("../adapters", "", None, "."):
        with pytest.raises(UserError, match="gone"):
            blend_tab.called(stocked, folder)


def test_a_work_ends_with_what_it_said_and_its_file_in_the_gallery(
    stocked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    values = VALUES | {"method": "sum", "kind": "exact", "picture": "", "name": "both"}
    folder = workshop.submit(stocked, acts.arguments_of(stocked, values, ROWS[:2], now=NOW), now=NOW)
    assert workshop.state_of(folder).state == "running"
    wait_for(lambda: not workshop.state_of(folder).is_live, seconds=180)
    work = workshop.state_of(folder)
    assert work.state == "finished", (folder / "progress.txt").read_text()
    assert "relative error" in work.said and (stocked / "adapters" / "both.safetensors").is_file()
    html = blend_tab.result_of(stocked, folder, work)
    assert "Download both.safetensors" in html and str(stocked) not in html.partition("<p")[0]


def test_what_a_work_cannot_do_is_one_sentence(stocked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (stocked / "adapters" / "one.safetensors").write_bytes(b"not a file <b>")
    folder = workshop.submit(stocked, ["doctor", "one", "--workspace", str(stocked)], now=NOW)
    wait_for(lambda: not workshop.state_of(folder).is_live, seconds=180)
    work = workshop.state_of(folder)
    assert work.state == "failed" and "one.safetensors" in work.said and "Traceback" not in work.said


def test_a_work_is_cancelled_and_one_that_died_is_lost(stocked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = ["compare", "one", "two", "--workspace", str(stocked)]
    first, second = (workshop.submit(stocked, arguments, now=NOW) for _ in range(2))
    assert first != second
    workshop.cancel(first)
    wait_for(lambda: not workshop.state_of(first).is_live, seconds=120)
    assert workshop.state_of(first).state == "cancelled"
    workshop.cancel(second)
    wait_for(lambda: not workshop.state_of(second).is_live, seconds=120)
    (second / "ended.json").unlink()
    assert workshop.state_of(second).state == "lost"
    with pytest.raises(UserError, match="no work for the workshop"):
        workshop.submit(stocked, ["train"], now=NOW)


def test_progress_is_read_from_what_the_command_tells(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps(["blend"]))
    (tmp_path / "progress.txt").write_text("a warning\n3 of 80\nsomething else\n12 of 80\nnoise\n")
    work = workshop.state_of(tmp_path)
    assert (work.state, work.done, work.total) == ("running", 12, 80)
