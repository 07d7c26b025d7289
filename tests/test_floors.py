"""Imports go down the floors only, the page alone knows gradio, and importing the library stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "errors": 0, "events": 0, "files": 0, "printable": 0, "validation": 0, "workspace": 0, "maths": 1, "adapters": 2, "targets": 3, "inject": 3, "formats": 4, "models": 4,
    "config": 5, "data": 5, "apply": 5, "training": 6, "gallery": 6, "jobs": 7, "__main__": 7, "ui": 8, "app": 8,
    "__version__": 0,
}  # fmt: skip
FILES = sorted(f for f in [*ROOT.glob("reparam_diffusion/**/*.py"), *ROOT.glob("ui/**/*.py"), *ROOT.glob("app.py")])


def unit(dotted: str) -> str:
    """The part of the tree that a dotted name belongs to, such as "adapters"; "" for the library's own __init__."""
    words = dotted.removeprefix("reparam_diffusion").strip(".").split(".")
    return words[0].removesuffix("__init__")


def imports(file: Path) -> list[str]:
    """Every module that a file imports, at any depth; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the floor"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file: Path) -> None:
    here = unit(".".join(file.relative_to(ROOT).with_suffix("").parts))
    for name in imports(file):
        assert here in ("ui", "app") or not name.startswith("gradio"), "only the page knows gradio"
        if name.split(".")[0] not in ("reparam_diffusion", "ui", "app"):
            continue
        there = unit(name)
        assert not here or not there or FLOORS[there] <= FLOORS[here], f"{here} imports {name}, which is above it"
        assert {here, there} != {"training", "gallery"}, "training and the gallery never import each other"


def test_importing_the_library_leaves_the_heavy_ones_alone() -> None:
    script = (
        "import sys, reparam_diffusion, reparam_diffusion.config, reparam_diffusion.targets\n"
        "print([name for name in ('diffusers', 'transformers', 'accelerate', 'gradio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
