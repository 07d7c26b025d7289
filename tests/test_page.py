"""The page in a real browser, over the real worker and the starter model."""

from __future__ import annotations

import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_browser import Served, open_browser, serve_page
from PIL import Image
from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.page
SLOW = 120_000  # milliseconds; the machine may be busy with other tests


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_page(tmp_path_factory.mktemp("page")) as served:
        yield served


def opened(browser: Browser, served: Served, *, width: int = 1280, height: int = 800) -> Page:
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(served.address)
    expect(page.get_by_role("tab", name="Train")).to_be_visible(timeout=SLOW)
    return page


def start_small_run(page: Page, steps: int = 4) -> None:
    page.get_by_role("button", name="Advanced settings").click()
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_role("button", name="Start training").click()


def fetch(served: Served, file: Path) -> int:
    """The status with which the server answers for a file."""
    try:
        with urllib.request.urlopen(f"{served.address}/gradio_api/file={urllib.parse.quote(str(file))}") as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_an_example_trains_from_one_click_through_a_reload_to_before_and_after(
    browser: Browser, served: Served
) -> None:
    page = opened(browser, served)
    page.get_by_role("button", name="Teddy bear").click()
    expect(page.get_by_text("6 pictures ready, 6 with a caption.")).to_be_visible()
    expect(page.get_by_label("Trigger word")).to_have_value("sks")
    start_small_run(page)
    expect(page.get_by_text(re.compile(r"Step \d of 4"))).to_be_visible(timeout=SLOW)
    page.reload()
    expect(page.get_by_text(re.compile(r"Step \d of 4"))).to_be_visible(timeout=SLOW)
    expect(page.get_by_text("Finished", exact=True)).to_be_visible(timeout=SLOW)
    expect(page.get_by_role("img", name=re.compile("^Loss from"))).to_be_visible()
    for alt in ("^Base model: a 3d icon of sks toy", "^With the adapter, step 4: a 3d icon of sks toy"):
        picture = page.get_by_role("img", name=re.compile(alt)).first
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 128
    with page.expect_download() as download:
        page.get_by_role("link", name="Download sks-toy-lora.safetensors").click()
    assert Path(download.value.path()).stat().st_size > 10_000
    page.close()
    only_pictures_and_adapters_are_served(served)


def only_pictures_and_adapters_are_served(served: Served) -> None:
    run = next((served.workspace / "runs").iterdir())
    assert fetch(served, next((run / "samples").glob("*.png"))) == 200
    assert fetch(served, next((served.workspace / "adapters").glob("*.safetensors"))) == 200
    for private in ("config.toml", "events.jsonl", "log.txt", "adapter.safetensors", "samples/../config.toml"):
        assert fetch(served, run / private) in (403, 404), private
    assert fetch(served, Path("/etc/passwd")) in (403, 404)


def test_a_bad_picture_is_named_and_the_others_are_kept(browser: Browser, served: Served, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "good.png")
    (tmp_path / "good.txt").write_text("a teal square")
    (tmp_path / "holiday <b>.jpg").write_bytes(b"not a picture")
    page = opened(browser, served)
    page.get_by_role("tab", name="Train").click()
    page.locator("#drop input[type=file]").set_input_files(sorted(tmp_path.iterdir()))
    expect(page.get_by_text("1 picture ready, 1 with a caption.")).to_be_visible(timeout=SLOW)
    expect(page.locator(".refused")).to_contain_text("is left out. It is not a picture that can be read.")
    expect(page.locator(".refused")).to_contain_text("holiday")
    page.close()


def test_starting_without_pictures_is_told_in_a_sentence(browser: Browser, served: Served) -> None:
    page = opened(browser, served)
    page.get_by_role("tab", name="Train").click()
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_text("Drop some in step 1, or choose an example.")).to_be_visible()
    page.close()


def test_a_wrong_setting_names_its_place_and_starts_nothing(browser: Browser, served: Served) -> None:
    before = len(list((served.workspace / "runs").glob("*")))
    page = opened(browser, served)
    page.get_by_role("tab", name="Train").click()
    page.get_by_role("button", name="Rocket").click()
    expect(page.get_by_text("6 pictures ready, 6 with a caption.")).to_be_visible()
    start_small_run(page, steps=0)
    expect(page.get_by_text("training.steps: must be at least 1")).to_be_visible()
    assert len(list((served.workspace / "runs").glob("*"))) == before
    page.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_nothing_is_cut_off(browser: Browser, served: Served, width: int, height: int) -> None:
    page = opened(browser, served, width=width, height=height)
    for tab in ("Runs", "Train"):
        page.get_by_role("tab", name=tab).click()
        if tab == "Train":
            page.get_by_role("button", name="Advanced settings").click()
            expect(page.get_by_label("Steps", exact=True)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cut = page.evaluate(
            """() => [...document.querySelectorAll("button span:not(.icon), label, p, h1, h2, h3, .info-text")]
                .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
                .map(e => e.outerHTML.slice(0, 200))"""
        )
        assert cut == []
        assert page.locator("img:not([alt]), img[alt='']").count() == 0
    page.close()


def test_the_three_steps_and_start_stand_above_the_fold(browser: Browser, served: Served) -> None:
    page = opened(browser, served)
    page.get_by_role("tab", name="Train").click()
    for name in ("Your pictures", "What they show", "How to learn it"):
        expect(page.get_by_role("heading", name=name)).to_be_in_viewport()
    expect(page.get_by_role("button", name="Start training")).to_be_in_viewport(ratio=1)
    page.close()
