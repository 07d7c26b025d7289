"""Settings: the base models that are known, the device and number format in use, the workspace."""

from __future__ import annotations

import platform
import shutil
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import psutil  # type: ignore[import-untyped]  # it ships no types
import torch

from reparam_diffusion import __version__
from reparam_diffusion.data.disk_cache import cache_sizes
from reparam_diffusion.jobs.overview import clear_caches
from reparam_diffusion.models.known import known_models
from reparam_diffusion.models.precision import measured_formats, pick_device, processor_name
from ui.door import QUIET, guarded
from ui.fragments import plain_size

HOW_TO_ADD = (
    "To add one, put a .safetensors checkpoint or a diffusers folder into workspace/models, or write its path or hub "
    "id into “Base model” under Advanced settings. Only .safetensors weights are opened."
)


def build_settings_tab(workspace: Path, tab: gr.Tab) -> None:
    """Draw the tab; it is read anew whenever it is opened."""
    with gr.Column(elem_classes="card"):
        gr.HTML("<h2>Base models</h2>", padding=False)
        models = gr.HTML(models_of(workspace), elem_id="models", padding=False)
    with gr.Column(elem_classes="card"):
        gr.HTML("<h2>This machine</h2>", padding=False)
        machine = gr.HTML(machine_of(), elem_id="machine", padding=False)
    with gr.Column(elem_classes="card"):
        gr.HTML("<h2>Workspace</h2>", padding=False)
        place = gr.HTML(workspace_of(workspace), elem_id="workspace", padding=False)
        clear = gr.Button("Clear cache", elem_id="clear-cache", size="sm")
    refresh = gr.Button("Look again", elem_id="look-again", size="md")

    def look() -> list[Any]:
        return [models_of(workspace), machine_of(), workspace_of(workspace)]

    def clear_cache() -> list[Any]:
        gr.Info(f"Cleared {plain_size(clear_caches(workspace))}.")
        return look()

    clear.click(guarded(clear_cache, workspace), None, [models, machine, place], **QUIET)
    for event in (refresh.click, tab.select):
        event(guarded(look, workspace), None, [models, machine, place], **QUIET)


def models_of(workspace: Path) -> str:
    """The known base models, and how to add one."""
    rows = [(known.title, known.kind, known.path) for known in known_models(workspace)]
    head = "<tr><th>Name</th><th>Kind</th><th>Path</th></tr>"
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="plain">{head}{cells}</table></div><p class="quiet">{HOW_TO_ADD}</p>'


def machine_of() -> str:
    """The device in use, and which number format was the faster one."""
    device = pick_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _memory()
    measured = measured_formats()
    formats = ", ".join(sorted(set(measured.values()))) if measured else "measured at the first training"
    if device.type != "cpu":
        formats = "bf16 where the card multiplies it, else fp16"
    rows = {
        "Device": f"{device.type} ({name})",
        "Memory": plain_size(memory),
        "Number format": f"auto: {formats}",
        "Versions": f"Reparam Diffusion {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    return _facts(rows)


def workspace_of(workspace: Path) -> str:
    """Where everything lies, and how much room is left."""
    place = workspace if workspace.exists() else workspace.parent
    counts = {
        "Runs": len(list((workspace / "runs").glob("*/config.toml"))),
        "Adapters": len(list((workspace / "adapters").glob("*.safetensors"))),
        "Pictures": len(list((workspace / "images").glob("*/*.png"))),
    }
    rows = {"Folder": str(workspace), "Room left": plain_size(shutil.disk_usage(place).free)}
    cached = {name: size for name, size in cache_sizes(workspace).items() if size}
    told = ", ".join(f"{plain_size(size)} {name}" for name, size in cached.items())
    rows["Cache"] = f"{plain_size(sum(cached.values()))} ({told})" if cached else "empty"
    return _facts(rows | {name: str(count) for name, count in counts.items()})


def _memory() -> int:
    return int(psutil.virtual_memory().total)


def _facts(rows: dict[str, str]) -> str:
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())
    return f'<dl class="facts">{cells}</dl>'
