"""Takes the screenshots of docs/screens and README: `python docs/screens/take.py` (minutes; needs Chromium).

Trains the bundled teddy for real in a workspace of its own, then looks at every place of the page, wide and narrow.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from page_browser import Open, open_browser, open_pages, serve_page  # noqa: E402  (lies in tests/)
from playwright.sync_api import Page, expect  # noqa: E402

LONG = 600_000  # milliseconds
WIDE, NARROW = (1280, 800), (390, 844)


def train_teddy(opened: Open) -> None:
    """Press Start as a newcomer does, and wait for the end."""
    page = opened()
    page.get_by_role("button", name="Teddy bear").click()
    expect(page.get_by_text("6 pictures ready, 6 with a caption.")).to_be_visible()
    page.wait_for_timeout(1500)
    page.screenshot(path=HERE / "train.png")
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#progress")).to_contain_text(re.compile(r"Step ([6-9]\d|1\d\d) of"), timeout=LONG)
    page.screenshot(path=HERE / "running.png")
    expect(page.locator("#progress .chip")).to_have_text("Finished", timeout=LONG)
    page.wait_for_timeout(1500)
    page.screenshot(path=HERE / "finished.png")
    page.get_by_role("button", name="Try it").first.click()
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_visible()
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator("#figures img").first).to_be_visible(timeout=LONG)
    page.wait_for_timeout(3000)
    page.screenshot(path=HERE / "generate.png")


def look_around(page: Page, ending: str) -> None:
    """Every tab as it stands."""
    for tab in ("Train", "Runs", "Generate", "Gallery", "Blend", "Settings"):
        page.goto(f"{page.url.partition('?')[0]}?tab={tab.lower()}")
        page.wait_for_timeout(4000)
        if tab == "Gallery":
            page.locator("button.adapter").first.click()
            page.wait_for_timeout(1500)
        page.screenshot(path=HERE / f"{tab.lower()}-{ending}.png")


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        open_browser() as browser,
        serve_page(Path(folder)) as served,
        open_pages(browser, served) as opened,
    ):
        train_teddy(opened)
        for scheme in ("light", "dark"):
            look_around(opened(width=WIDE[0], height=WIDE[1], scheme=scheme), f"wide-{scheme}")
            look_around(opened(width=NARROW[0], height=NARROW[1], scheme=scheme), f"narrow-{scheme}")


if __name__ == "__main__":
    main()
