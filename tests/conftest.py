"""What all tests share: repeatable draws, one thread, and the starter model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

if TYPE_CHECKING:
    from page_browser import Open, Served
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parent.parent

# Every run draws the same examples, so a red build is red for everybody. `--hypothesis-profile=explore` draws anew.
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors]
settings.register_profile("same", derandomize=True, deadline=None, max_examples=60, suppress_health_check=SLOW)
settings.register_profile("explore", deadline=None, max_examples=300, suppress_health_check=SLOW)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser on two busy cores now and then loses a key press: page tests get a second try, and the summary says so."""
    for item in items:
        if item.get_closest_marker("page"):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are faster on one thread, and sums come out the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser, for tests of the page."""
    from page_browser import open_browser

    with open_browser() as browser:
        yield browser


@pytest.fixture
def opened(browser: Browser, served: Served) -> Iterator[Open]:
    """Opens the module's served page, each time as another person's browser; an error in a console fails the test."""
    from page_browser import open_pages

    with open_pages(browser, served) as opened:
        yield opened


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace, with device locks and measured paces that are this test's alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    return tmp_path / "workspace"


@pytest.fixture(scope="session")
def starter_unet() -> nn.Module:
    """The bundled UNet, frozen, fp32. Tests leave it as they found it."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(ROOT / "assets" / "starter-model" / "unet")
    return unet.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def starter_text_encoder() -> nn.Module:
    """The bundled text encoder, frozen, fp32. Tests leave it as they found it."""
    from transformers import CLIPTextModel

    model = CLIPTextModel.from_pretrained(ROOT / "assets" / "starter-model" / "text_encoder")
    return model.requires_grad_(False).eval()
