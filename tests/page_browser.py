"""What page tests share: a browser, and the real page served over a workspace of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass(frozen=True)
class Served:
    """A running page: its address and its workspace."""

    address: str
    workspace: Path


def chromium() -> str:
    """The browser's path. Without one the tests are skipped, except where CI says that they must run."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        assert os.environ.get("CI") != "true", "the page tests need Chromium, and there is none"
        sys.stdout.write("No Chromium was found: the page tests are skipped.\n")
        pytest.skip("no Chromium")
    return found


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless browser."""
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def serve_page(folder: Path) -> Iterator[Served]:
    """`python app.py` over folder/workspace, with temporary files (and so the device lock) of its own."""
    temporary = folder / "temporary"
    temporary.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(os.environ, TMPDIR=str(temporary), GRADIO_TEMP_DIR=str(temporary / "gradio"))
    environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "app.py", "--port", str(port), "--workspace", str(folder / "workspace")]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(server, address, folder / "server.log")
        yield Served(address, folder / "workspace")
    finally:
        _end(server, folder / "workspace")


def _wait_until_up(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)


def _end(server: subprocess.Popen[bytes], workspace: Path) -> None:
    """End the server, and the workers it launched, which outlive it by design."""
    workers = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
    server.terminate()
    server.wait(timeout=20)
    for worker in workers:
        if worker.is_running():
            worker.kill()
