"""The Generate tab in a real browser, over the real studio and the starter model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from filelock import FileLock
from gradio_client import Client
from page_browser import SLOW, Open, Served, serve_page
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from safetensors.torch import save_file

from reparam_diffusion.gallery import images, shelf
from reparam_diffusion.gallery.recipe import Use
from reparam_diffusion.jobs import locks

pytestmark = pytest.mark.page
APPLE = "a 3d icon of a red apple on a light blue background"


@pytest.fixture(scope="module")
def served(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("generate")
    facts = {"activation text": "sks toy"}
    shelf.add(lora_file(folder / "lora.safetensors"), folder / "workspace", name="Teddy", facts=facts)
    with serve_page(folder) as served:
        yield served


def lora_file(file: Path, *, seed: int = 0) -> Path:
    """A small LoRA for the starter model."""
    chance = torch.Generator().manual_seed(seed)
    site = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    down, up = torch.randn(4, 192, generator=chance), torch.randn(288, 4, generator=chance)
    save_file({f"{site}.lora_down.weight": down, f"{site}.lora_up.weight": up}, file)
    return file


def generate_tab(page: Page, *, steps: int = 2) -> Page:
    """The page with the tab open and few steps set."""
    page.get_by_role("tab", name="Generate").click()
    page.get_by_role("button", name="More settings").click()
    page.get_by_label("Steps", exact=True).fill(str(steps))
    return page


def choose_teddy(page: Page) -> None:
    page.get_by_label("Adapter 1", exact=True).click()
    page.get_by_role("option", name="Teddy").click()
    expect(page.get_by_role("button", name="+ sks toy")).to_be_visible()


def take_last_away(page: Page, label: str) -> None:
    """The last of three values; a key that comes before the folded part is alive is lost, so it is pressed again."""
    field = page.get_by_label(label, exact=True)
    values = page.locator(".block", has=field).last.get_by_role("button", name=re.compile("^Remove"))
    expect(values).to_have_count(3)
    while values.count() == 3:
        field.press("Backspace")
        page.wait_for_timeout(300)
    field.press("Escape")
    expect(values).to_have_count(2)


def test_a_prompt_becomes_a_picture(opened: Open, served: Served) -> None:
    page = generate_tab(opened())
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_text("Say what to draw.")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill(APPLE)
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_text(re.compile(r"^1 picture in"))).to_be_visible(timeout=SLOW)
    picture = page.get_by_role("img", name=re.compile(f"^{APPLE}, seed"))
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 128
    expect(page.get_by_role("img", name=re.compile("^A picture drawn on"))).to_have_count(1)
    (file,) = images.history(served.workspace, most=9)
    settings = images.settings_of(file)
    assert (settings.prompt, settings.steps, str(settings.seed)) == (
        APPLE,
        2,
        page.get_by_label("Seed", exact=True).input_value(),
    )


def test_a_model_that_comes_while_the_page_is_open_can_be_chosen(opened: Open, served: Served) -> None:
    page = opened()
    generate_tab(page)
    models = page.get_by_label("Base model").locator("visible=true")
    expect(models).to_have_value("Starter (3D icons)")
    folder = served.workspace / "models" / "fine-tune"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    models.click()
    page.get_by_role("option", name="fine-tune").click()
    expect(models).to_have_value("fine-tune")


def test_only_pictures_are_served(served: Served) -> None:
    """Not what was asked for, nor the studio's log."""
    (picture,) = images.history(served.workspace, most=9)
    (request,) = (served.workspace / "studio" / "requests").iterdir()
    files = (picture, request / "request.json", request / "events.jsonl", served.workspace / "studio" / "log.txt")
    answers = [httpx.get(f"{served.address}/gradio_api/file={file}").status_code for file in files]
    assert answers[0] == 200 and set(answers[1:]) <= {403, 404}


def test_a_drawing_outlives_a_reload_shows_in_another_browser_and_is_cancelled_there(opened: Open) -> None:
    page = generate_tab(opened(), steps=900)
    page.get_by_label("Prompt", exact=True).fill(APPLE)
    for side in ("Width", "Height"):  # slow enough to be looked at from two browsers
        page.get_by_label(re.compile(f"^{side}")).fill("320")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_text("Picture 1 of 1")).to_be_visible(timeout=SLOW)
    page.wait_for_url(re.compile("drawing="))
    page.reload()  # its address says which drawing it was, and the tab opens by itself
    expect(page.get_by_text("Picture 1 of 1")).to_be_visible(timeout=SLOW)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(APPLE)  # and the form is as it was
    other = opened()
    other.get_by_role("tab", name="Generate").click()
    expect(other.get_by_role("img", name=re.compile("^An early look"))).to_be_visible(timeout=SLOW)
    other.get_by_role("button", name="Cancel").click()
    for one in (other, page):
        expect(one.get_by_text("0 of 1 picture drawn")).to_be_visible(timeout=SLOW)
        expect(one.get_by_role("button", name="Cancel")).to_be_hidden()


def test_a_sweep_finds_the_strength_that_is_kept_as_preferred(opened: Open, served: Served) -> None:
    page = generate_tab(opened())
    choose_teddy(page)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a 3d icon of sks toy on a pink background")
    page.get_by_label("Prompt", exact=True).fill("a 3d icon of a dog")
    page.get_by_role("button", name="+ sks toy").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(re.compile("^a 3d icon of a dog,? sks toy$"))
    page.get_by_role("button", name="Sweep the strength").click()
    expect(page.get_by_text(re.compile(r"^7 pictures in"))).to_be_visible(timeout=SLOW)
    page.get_by_role("button", name="0.75", exact=True).click()
    expect(page.get_by_role("button", name="0.75", exact=True)).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_label("number input for Strength 1")).to_have_value("0.75")
    page.get_by_role("button", name="Keep 0.75 as preferred").click()
    expect(page.get_by_text("now starts at strength 0.75")).to_be_visible()
    notes = json.loads((served.workspace / "adapters" / "teddy.json").read_text())
    assert notes["preferred weight"] == 0.75 and notes["activation text"] == "sks toy"
    other = generate_tab(opened())
    choose_teddy(other)
    expect(other.get_by_label("number input for Strength 1")).to_have_value("0.75")


def test_a_dropped_picture_and_a_press_in_the_history_bring_every_setting_back(opened: Open, tmp_path: Path) -> None:
    recipe = images.Recipe(
        prompt="a 3d icon of a dog", negative="blue", seed=11, steps=3, guidance=2.5, scheduler="Euler a", width=96,
        height=160, clip_skip=1, adapters=(Use(name="teddy", strength=-0.5, te_strength=0.25),),
    )  # fmt: skip
    file = images.save_picture(Image.new("RGB", (96, 160)), recipe, tmp_path / "dropped.png")
    page = generate_tab(opened())
    page.locator("#drop-picture input[type=file]").set_input_files(file)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a 3d icon of a dog")
    expect(page.get_by_role("textbox", name="Negative prompt")).to_have_value("blue")
    shown = {"Seed": "11", "Steps": "3", "Guidance": "2.5", "Width": "96", "Height": "160"}
    for label, value in shown.items():
        expect(page.get_by_label(label, exact=True)).to_have_value(value)
    expect(page.get_by_label("number input for Strength 1")).to_have_value("-0.5")
    expect(page.get_by_label("number input for Text encoder strength 1")).to_have_value("0.25")
    expect(page.get_by_label("Scheduler", exact=True)).to_have_value("Euler a")
    expect(page.get_by_label("A new seed each time")).not_to_be_checked()
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_text(re.compile(r"^1 picture in"))).to_be_visible(timeout=SLOW)
    page.get_by_label("Prompt", exact=True).fill("something else")
    page.get_by_label("Steps", exact=True).fill("9")
    page.get_by_role("img", name=re.compile("^A picture drawn on")).first.click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a 3d icon of a dog")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("3")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.locator("#drop-picture input[type=file]").set_input_files(tmp_path / "plain.png")
    expect(page.get_by_text("There are no settings in this image.")).to_be_visible()


def test_while_the_device_is_held_the_page_offers_to_go_ahead(
    opened: Open, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(served.workspace.parent / "temporary" / "cache"))
    page = generate_tab(opened())
    page.get_by_label("Prompt", exact=True).fill(APPLE)
    with FileLock(locks.device_lock("cpu")):
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.get_by_text("Another program is working on this device.")).to_be_visible(timeout=SLOW)
        page.get_by_role("button", name="Go ahead anyway").click()
        expect(page.get_by_text(re.compile(r"^1 picture in"))).to_be_visible(timeout=SLOW)
        expect(page.get_by_role("button", name="Go ahead anyway")).to_be_hidden()


def test_a_grid_of_two_things_becomes_a_sheet(opened: Open, served: Served) -> None:
    page = generate_tab(opened())
    choose_teddy(page)
    page.get_by_role("button", name="Compare in a grid").click()
    for label in ("Across: values", "Down: values"):
        take_last_away(page, label)
    page.get_by_role("button", name="Draw the grid").click()
    expect(page.get_by_text(re.compile(r"^4 pictures in"))).to_be_visible(timeout=SLOW)
    expect(page.get_by_role("link", name="Open the sheet")).to_be_visible()
    sheet = images.history(served.workspace, most=1)[0]
    with Image.open(sheet) as drawn:
        assert sheet.stem.endswith("-grid") and drawn.width > 256


def test_a_drawn_picture_is_changed_where_it_is_painted_over_on_a_phone(opened: Open, served: Served) -> None:
    page = generate_tab(opened(width=390, height=844), steps=3)
    page.get_by_label("Prompt", exact=True).fill(APPLE)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_role("button", name="Change this picture").click()
    canvas = page.locator("#start-editor canvas").first
    expect(canvas).to_be_visible()
    page.wait_for_timeout(2000)  # the picture fades in
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2 - 20, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2, steps=6)
    page.mouse.up()
    page.wait_for_timeout(500)
    apple, address = images.history(served.workspace, most=1)[0], page.url
    page.get_by_label("number input for How much may change").fill("0.9")
    page.get_by_role("button", name="Draw", exact=True).click()
    until(lambda: images.history(served.workspace, most=1)[0] != apple, page)
    car = images.history(served.workspace, most=1)[0]
    settings = images.settings_of(car)
    start, mask = images.open_sources(settings, served.workspace)
    assert start is not None and mask is not None and settings.denoise == 0.9
    keeps = np.asarray(mask.convert("L")) == 0
    assert 0.5 < keeps.mean() < 0.999
    with Image.open(apple) as before, Image.open(car) as after:
        assert np.array_equal(np.asarray(before)[keeps], np.asarray(after)[keeps])
        assert before.tobytes() != after.tobytes()
    until(lambda: page.url != address, page)
    page.reload()
    expect(page.get_by_role("img", name="What is drawn anew")).to_be_visible()
    page.get_by_role("button", name="Start without a picture").click()
    expect(page.get_by_role("button", name="Start without a picture")).to_be_hidden()
    page.locator("#drop-start input[type=file]").set_input_files(apple)
    expect(canvas).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def until(is_so: Callable[[], bool], page: Page) -> None:
    """Wait for what the page's server does."""
    end = time.monotonic() + SLOW / 1000
    while not is_so():
        assert time.monotonic() < end
        page.wait_for_timeout(200)


def test_other_programs_draw_through_the_endpoint(served: Served) -> None:
    client = Client(served.address, verbose=False)
    files = client.predict(APPLE, [["teddy", 0.5, None]], seed=5, count=2, steps=2, api_name="/generate")
    settings = [images.settings_of(Path(file)) for file in files]
    assert [(one.seed, one.steps, one.adapters) for one in settings] == [
        (5, 2, (Use(name="teddy", strength=0.5),)),
        (6, 2, (Use(name="teddy", strength=0.5),)),
    ]
    with pytest.raises(Exception, match="Did you mean"):
        client.predict(APPLE, ["tedy"], steps=2, api_name="/generate")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_the_least_stands_above_the_fold_and_nothing_is_cut_off(opened: Open, width: int, height: int) -> None:
    page = opened(width=width, height=height)
    page.get_by_role("tab", name="Generate").click()
    for part in (page.get_by_label("Prompt", exact=True), page.get_by_label("Adapter 1", exact=True)):
        expect(part).to_be_in_viewport()
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_in_viewport(ratio=1)
    page.get_by_role("button", name="More settings").click()
    choose_teddy(page)
    page.get_by_role("button", name="Compare in a grid").click()
    expect(page.get_by_role("button", name="Draw the grid")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.evaluate(
        """() => [...document.querySelectorAll(".generate button span:not(.icon), .generate label, .generate p, .generate h2")]
            .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
            .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert cut == []
    assert page.locator(".generate img:not([alt]), .generate img[alt='']").count() == 0
