"""What page tests share: a browser, and the real page served over a workspace of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from playwright.sync_api import Browser, Page, expect, sync_playwright

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


SLOW = 120_000  # milliseconds; the machine may be busy with other tests
expect.set_options(timeout=SLOW)

LEAVING = ("BodyStreamBuffer was aborted", "signal is aborted without reason", "Connection errored out")
"""What gradio's own client says when a page is left in the middle of an answer."""

Open = Callable[..., Page]
"""Opens a page in a browser profile of its own: width= and height= in pixels, scheme= "light" or "dark"."""


@dataclass(frozen=True)
class Served:
    """A running page: its address, its workspace and its process."""

    address: str
    workspace: Path
    port: int
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """As when the plug is pulled."""
        self.process.kill()
        self.process.wait()


def chromium() -> str:
    """The browser's path: an installed one, else Debian's by apt-get where that may be, else playwright's own.

    With none to be had the tests are skipped, except where CI says that they must run.
    """
    with FileLock(
        Path(tempfile.gettempdir()) / "page-tests-browser.lock"
    ):  # one test process installs, the others wait
        found = _installed() or _by_apt_get() or _playwrights_own()
    if not found:
        assert os.environ.get("CI") != "true", "the page tests need Chromium, and there is none"
        sys.stdout.write("No Chromium was found: the page tests are skipped.\n")
        pytest.skip("no Chromium")
    return found


def _installed() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), "")


def _by_apt_get() -> str:
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("apt-get"):
        return ""
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", "chromium"]):
        subprocess.run(command, env=environment, check=False, capture_output=True, timeout=300)
    return _installed()


def _playwrights_own() -> str:
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
    if not own.is_file():
        command = [sys.executable, "-m", "playwright", "install", "chromium"]
        subprocess.run(command, check=False, capture_output=True, timeout=300)
    return str(own) if own.is_file() else ""


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
def open_pages(browser: Browser, served: Served) -> Iterator[Open]:
    """Opens any number of pages; an error in the console of one of them fails the test."""
    errors: list[str] = []
    contexts = []

    def took(error: str) -> None:
        if not any(words in error for words in LEAVING):
            errors.append(error)

    def opened(*, width: int = 1280, height: int = 800, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: took(f"{said.text} ({said.location['url']})") if said.type == "error" else None)
        page.on("pageerror", lambda error: took(str(error)))
        page.goto(served.address)
        expect(page.get_by_role("tab", name="Train")).to_be_visible()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors, "\n".join(errors)


@contextmanager
def serve_page(folder: Path, *, port: int = 0) -> Iterator[Served]:
    """`python app.py` over folder/workspace, with temporary files (and so the device lock) of its own."""
    temporary = folder / "temporary"
    temporary.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        port = probe.getsockname()[1]
    environment = dict(os.environ, TMPDIR=str(temporary), GRADIO_TEMP_DIR=str(temporary / "gradio"))
    environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"XDG_CACHE_HOME": str(temporary / "cache")}
    command = [sys.executable, "app.py", "--port", str(port), "--workspace", str(folder / "workspace")]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(server, address, folder / "server.log")
        yield Served(address, folder / "workspace", port, server)
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
    """End the server, and what works on its workspace, which outlives it by design."""
    if server.poll() is None:
        server.terminate()
        server.wait(timeout=20)
    for process in psutil.process_iter(["cmdline"]):
        if any(str(workspace) in word for word in process.info["cmdline"] or ()):
            process.kill()
