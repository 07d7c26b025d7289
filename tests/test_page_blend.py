"""The Blend tab in a real browser: every work shows what it needs, nothing is cut off, and a work is told in the page."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from page_browser import Open, Served, serve_page
from playwright.sync_api import Browser, Page, expect
from test_page_generate import lora_file

from reparam_diffusion.gallery import shelf
from ui import blend_acts as acts

pytestmark = pytest.mark.page


@pytest.fixture(scope="module")
def served(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("blend")
    for name in ("teddy", "other"):
        file = lora_file(folder / f"{name}.safetensors", seed=len(name))
        shelf.add(file, folder / "workspace", name=name)
    with serve_page(folder) as served:
        yield served


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=re.compile(f"^{option}")).first.click()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_every_work_shows_what_it_needs_and_cuts_nothing_off(
    opened: Open, served: Served, width: int, height: int
) -> None:
    page = opened(width=width, height=height)
    page.goto(f"{served.address}?tab=blend")
    for work, title in acts.WORKS.items():
        choose(page, "Work", title)
        expect(page.locator("#work-start")).to_have_text(acts.BUTTONS[work])
        expect(page.get_by_label("Adapter 1", exact=True)).to_be_visible(visible=acts.ROWS[work] > 0)
        expect(page.get_by_label("Adapter 2", exact=True)).to_be_visible(visible=acts.ROWS[work] > 1)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_blend_is_told_and_lands_in_the_gallery(opened: Open, served: Served) -> None:
    page = opened()
    page.goto(f"{served.address}?tab=blend")
    page.get_by_role("button", name="Blend", exact=True).click()
    expect(page.get_by_text("This needs an adapter.")).to_be_visible()
    choose(page, "Adapter 1", "teddy")
    choose(page, "Adapter 2", "other")
    expect(page.get_by_label("Adapter 3", exact=True)).to_be_visible()
    page.get_by_label("Name of the result").fill("both of them")
    page.get_by_role("button", name="Blend", exact=True).click()
    expect(page.locator("#work-result")).to_contain_text("relative error")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download both-of-them.safetensors").click()
    assert download.value.path().stat().st_size > 1000
    assert (served.workspace / "adapters" / "both-of-them.safetensors").is_file()
