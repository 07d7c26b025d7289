"""What the README says is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reparam_diffusion.__main__ import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_methods_table_is_the_specs() -> None:
    table = re.search(r"<!-- methods:[^>]*-->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert table is not None
    done = CliRunner().invoke(app, ["methods", "--markdown"])
    assert table[1].strip() == done.stdout.strip()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m reparam_diffusion (\w+)", README))))
def test_every_command_in_the_readme_exists(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_help_comes_without_torch() -> None:
    script = "import sys, runpy\nsys.argv = ['x', '--help']\ntry:\n    runpy.run_module('reparam_diffusion', run_name='__main__')\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    text = code[1].replace('"steps": 20', '"steps": 1')
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "README", "exec"), {})
    assert (tmp_path / "teddy-run" / "adapter.safetensors").is_file()
