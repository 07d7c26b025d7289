"""The page in a real browser, over the real worker and the starter model."""

from __future__ import annotations

import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from page_browser import Open, Served, open_pages, serve_page
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from run_folders import wait_for

from reparam_diffusion.jobs import runs
from reparam_diffusion.jobs.datasets import EXAMPLES

pytestmark = pytest.mark.page


@pytest.fixture(scope="module")
def served(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_page(tmp_path_factory.mktemp("page")) as served:
        yield served


def set_steps(page: Page, steps: int) -> None:
    page.get_by_role("button", name="Advanced settings").click()
    page.get_by_role("tab", name="Training").click()
    page.get_by_label("Steps", exact=True).first.fill(str(steps))


def start_small_run(page: Page, steps: int = 4) -> None:
    set_steps(page, steps)
    page.get_by_role("button", name="Start training").click()


def fetch(served: Served, file: Path) -> int:
    """The status with which the server answers for a file."""
    try:
        with urllib.request.urlopen(f"{served.address}/gradio_api/file={urllib.parse.quote(str(file))}") as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_an_example_trains_from_one_click_through_a_reload_to_before_and_after(opened: Open, served: Served) -> None:
    page = opened()
    page.get_by_role("button", name="Teddy bear").click()
    expect(page.get_by_text("6 pictures ready, 6 with a caption.")).to_be_visible()
    expect(page.get_by_label("Trigger word")).to_have_value("sks")
    start_small_run(page)
    expect(page.get_by_text(re.compile(r"Step \d of 4"))).to_be_visible()
    page.reload()
    expect(page.get_by_text(re.compile(r"Step \d of 4"))).to_be_visible()
    expect(page.locator("#progress .chip")).to_have_text("Finished")
    expect(page.get_by_role("img", name=re.compile("^Loss from")).first).to_be_visible()
    for alt in ("^Base model: a 3d icon of sks toy", "^With the adapter, step 4: a 3d icon of sks toy"):
        picture = page.get_by_role("img", name=re.compile(alt)).first
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 128
    with page.expect_download() as download:
        page.get_by_role("link", name="Download sks-toy-lora.safetensors").click()
    assert Path(download.value.path()).stat().st_size > 10_000
    only_pictures_and_adapters_are_served(served)
    run = next((served.workspace / "runs").iterdir())
    assert (run / "samples/000000-0.png").read_bytes() != (run / "samples/000004-0.png").read_bytes()
    page.locator("#try-run").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(re.compile("sks toy"))
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator("#figures img").first).to_be_visible()


def only_pictures_and_adapters_are_served(served: Served) -> None:
    run = next((served.workspace / "runs").iterdir())
    assert fetch(served, next((run / "samples").glob("*.png"))) == 200
    assert fetch(served, next((served.workspace / "adapters").glob("*.safetensors"))) == 200
    for private in ("config.toml", "events.jsonl", "log.txt", "adapter.safetensors", "samples/../config.toml"):
        assert fetch(served, run / private) in (403, 404), private
    assert fetch(served, Path("/etc/passwd")) in (403, 404)


def test_a_bad_picture_is_named_and_the_others_are_kept(opened: Open, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "good.png")
    (tmp_path / "good.txt").write_text("a teal square")
    (tmp_path / "holiday <b>.jpg").write_bytes(b"not a picture")
    page = opened()
    page.get_by_role("tab", name="Train").click()
    page.locator("#drop input[type=file]").set_input_files(sorted(tmp_path.iterdir()))
    expect(page.get_by_text("1 picture ready, 1 with a caption.")).to_be_visible()
    expect(page.locator(".refused")).to_contain_text("is left out. It is not a picture that can be read.")
    expect(page.locator(".refused")).to_contain_text("holiday")


def test_starting_without_pictures_is_told_in_a_sentence(opened: Open) -> None:
    page = opened()
    page.get_by_role("tab", name="Train").click()
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_text("Drop some in step 1, or choose an example.")).to_be_visible()


def test_a_wrong_setting_is_told_at_its_field_and_starts_nothing(opened: Open, served: Served) -> None:
    before = len(list((served.workspace / "runs").glob("*")))
    page = opened()
    page.get_by_role("tab", name="Train").click()
    page.get_by_role("button", name="Rocket").click()
    expect(page.get_by_text("6 pictures ready, 6 with a caption.")).to_be_visible()
    start_small_run(page, steps=0)
    expect(page.locator("#trouble")).to_contain_text("Steps must be at least 1")
    field = page.locator(".block", has=page.get_by_label("Steps", exact=True)).last
    expect(field).to_contain_text("must be at least 1")
    expect(field).to_be_visible()
    assert len(list((served.workspace / "runs").glob("*"))) == before


def test_a_graphics_card_brings_its_settings_and_takes_them_back(opened: Open) -> None:
    page = opened()
    page.get_by_role("tab", name="Train").click()
    set_steps(page, 4)
    page.get_by_label("Batch", exact=True).fill("7")
    recomputing = page.get_by_label("Gradient checkpointing")
    expect(recomputing).not_to_be_checked()
    page.get_by_label("Graphics card").click()
    page.get_by_role("option", name="8 GB", exact=True).click()
    expect(recomputing).to_be_checked()
    expect(page.get_by_label("Batch", exact=True)).to_have_value("1")
    expect(page.get_by_label("Steps", exact=True).first).to_have_value("4")
    page.get_by_label("Graphics card").click()
    page.get_by_role("option", name="As it is").click()
    expect(recomputing).not_to_be_checked()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_nothing_is_cut_off(opened: Open, width: int, height: int) -> None:
    page = opened(width=width, height=height)
    for tab in ("Runs", "Train"):
        page.get_by_role("tab", name=tab).click()
        if tab == "Train":
            set_steps(page, 4)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cut = page.evaluate(
            """() => [...document.querySelectorAll("button span:not(.icon), label, p, h1, h2, h3, .info-text")]
                .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
                .map(e => e.outerHTML.slice(0, 200))"""
        )
        assert cut == []
        assert page.locator("img:not([alt]), img[alt='']").count() == 0


def test_the_three_steps_and_start_stand_above_the_fold(opened: Open) -> None:
    page = opened()
    page.get_by_role("tab", name="Train").click()
    for name in ("Your pictures", "What they show", "How to learn it"):
        expect(page.get_by_role("heading", name=name)).to_be_in_viewport()
    expect(page.get_by_role("button", name="Start training")).to_be_in_viewport(ratio=1)


def test_the_form_survives_a_reload_with_its_pictures_and_edited_captions(opened: Open) -> None:
    page = opened()
    page.get_by_role("tab", name="Train").click()
    page.get_by_role("button", name="Rocket").click()
    expect(page.get_by_text("6 pictures ready, 6 with a caption.")).to_be_visible()
    page.get_by_label("Trigger word").fill("zwx")
    page.get_by_role("radio", name=re.compile("^LoKr")).check()
    page.get_by_role("button", name="Captions of 6 pictures").click()
    page.get_by_label("Caption of 01.png").fill("a zwx rocket <i>over</i> Paris")
    page.get_by_label("Leave 02.png out").click()
    expect(page.get_by_text("5 pictures ready")).to_be_visible()
    page.wait_for_timeout(500)
    page.reload()
    expect(page.get_by_text("5 pictures ready, 5 with a caption, 1 removed.")).to_be_visible()
    expect(page.get_by_label("Trigger word")).to_have_value("zwx")
    expect(page.get_by_role("radio", name=re.compile("^LoKr"))).to_be_checked()
    page.get_by_role("button", name="Captions of 5 pictures").click()
    expect(page.get_by_label("Caption of 01.png")).to_have_value("a zwx rocket <i>over</i> Paris")


def test_a_run_is_paused_resumed_and_stopped_and_a_second_one_waits_for_it(opened: Open, served: Served) -> None:
    page = opened()
    page.get_by_role("tab", name="Train").click()
    page.get_by_role("button", name="Teddy bear").click()
    expect(page.get_by_text("6 pictures ready")).to_be_visible()
    start_small_run(page, steps=2000)
    expect(page.get_by_text(re.compile(r"Step \d+ of 2000"))).to_be_visible()

    other = opened()  # another tab of another person, who wants the machine too
    expect(other.locator("#progress .chip")).to_have_text("Training")  # what goes on is what a fresh page shows
    other.get_by_role("tab", name="Train").click()
    other.get_by_role("button", name="Rocket").click()
    expect(other.get_by_text("6 pictures ready")).to_be_visible()
    start_small_run(other, steps=3)
    expect(other.locator("#progress")).to_contain_text("next in the queue")
    other.get_by_role("button", name="Take out of the queue").click()
    expect(other.locator("#progress")).to_contain_text("Not started")
    expect(page.locator("#run-list")).to_contain_text("sks-aircraft-lora")

    page.get_by_role("button", name="Pause", exact=True).click()
    expect(page.locator("#progress .chip")).to_have_text("Paused")
    page.get_by_role("button", name=re.compile("^(Resume|Start again)$")).click()
    expect(page.locator("#progress .chip")).to_have_text("Training")
    expect(page.get_by_role("button", name="Sample now")).to_be_visible()
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#progress .chip")).to_have_text("Stopped")
    expect(page.get_by_role("button", name="Try it")).to_be_visible()
    page.get_by_role("button", name="Train again with these settings").click()
    expect(page.get_by_label("Trigger word")).to_have_value("sks")
    expect(page.get_by_text("6 pictures ready")).to_be_visible()
    page.get_by_role("tab", name="Runs").click()
    page.get_by_role("button", name="Move to bin").click()
    expect(page.get_by_text("Moved to bin/runs/")).to_be_visible()
    assert list((served.workspace / "bin" / "runs").iterdir())
    assert fetch(served, next((served.workspace / "bin" / "runs").glob("*/config.toml"))) in (403, 404)


def test_a_run_goes_on_while_the_server_is_killed_and_a_killed_worker_is_lost(browser: Browser, tmp_path: Path) -> None:
    with serve_page(tmp_path) as served, open_pages(browser, served) as opened:
        page = opened()
        page.get_by_role("button", name="Teddy bear").click()
        expect(page.get_by_text("6 pictures ready")).to_be_visible()
        start_small_run(page, steps=3000)
        expect(page.get_by_text(re.compile(r"Step \d+ of 3000"))).to_be_visible()
        run = next((served.workspace / "runs").iterdir())
        page.close()
        before = runs.state_of(run).step
        served.kill()
        wait_for(lambda: runs.state_of(run).step > before, seconds=60)
        assert runs.state_of(run).state == "running"
        with serve_page(tmp_path, port=served.port) as again, open_pages(browser, again) as opened_again:
            page = opened_again()
            expect(page.get_by_text(re.compile(r"Step \d+ of 3000"))).to_be_visible()
            psutil.Process(runs.state_of(run).pid).kill()
            expect(page.locator("#progress .chip")).to_have_text("Lost")
            expect(page.locator("#progress")).to_contain_text("The program ended without a word.")
            expect(page.get_by_role("button", name=re.compile("Resume|Start again"))).to_be_visible()


def test_other_programs_train_and_look_as_the_docs_say(served: Served) -> None:
    client = Client(served.address, verbose=False)
    files = [handle_file(file) for file in sorted(EXAMPLES.joinpath("teddy").glob("0[12].*"))]
    settings = {"method": "lokr", "training.steps": 2, "output.name": "by api"}
    run = client.predict(files, "sks", "toy", settings, api_name="/train")
    wait_for(lambda: details(client, run["name"])["state"] == "finished", seconds=240)
    told = details(client, run["name"])
    assert told["step"] == 2 and len(told["losses"]) == 2 and told["adapter"].startswith("by-api")
    assert run["name"] in [row["name"] for row in client.predict(api_name="/list_runs")]
    with pytest.raises(AppError, match="no request called"):
        client.predict(run["name"], "explode", api_name="/run_ask")
    with pytest.raises(AppError, match=r"data\.images cannot be set"):
        client.predict(files, "sks", "toy", {"data.images": "/etc"}, api_name="/train")
    client.close()


def details(client: Client, name: str) -> dict[str, Any]:
    """A run as the endpoint tells it. Any: JSON's own values."""
    told: dict[str, Any] = client.predict(name, api_name="/run_details")
    return told


def test_captions_survive_adding_files_removing_images_and_a_reload(opened: Open, tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        Image.new("RGB", (64, 64), (60 * number, 90, 200)).save(tmp_path / name)
    page = opened()
    page.get_by_role("tab", name="Train").click()
    drop = page.locator("#drop input[type=file]")
    drop.set_input_files([tmp_path / "a.png", tmp_path / "b.png"])
    expect(page.get_by_text("2 pictures ready.")).to_be_visible()
    page.get_by_role("button", name="Captions of 2 pictures").click()
    page.get_by_label("Caption of a.png").fill("typed for a")
    page.get_by_label("Leave b.png out").click()
    expect(page.get_by_text("1 picture ready, 1 with a caption, 1 removed.")).to_be_visible()
    drop.set_input_files([tmp_path / "b.png", tmp_path / "c.png", tmp_path / "a.png"])
    expect(page.get_by_text("2 pictures ready, 1 with a caption, 1 removed.")).to_be_visible()
    expect(page.get_by_label("Caption of a.png")).to_have_value("typed for a")
    page.wait_for_timeout(500)
    page.reload()
    expect(page.get_by_text("2 pictures ready, 1 with a caption, 1 removed.")).to_be_visible()
    page.get_by_role("button", name="Captions of 2 pictures").click()
    page.get_by_label("Put b.png back").click()
    expect(page.get_by_label("Caption of b.png")).to_be_visible()
    expect(page.get_by_label("Caption of a.png")).to_have_value("typed for a")
    page.get_by_role("button", name="Remove all").click()
    expect(page.get_by_text("5 to 20 pictures are good.")).to_be_visible()


def test_an_emptied_learning_rate_is_refused_and_what_a_run_continues_from_is_shown(opened: Open) -> None:
    page = opened()
    page.get_by_role("tab", name="Train").click()
    page.get_by_role("button", name="Teddy bear").click()
    expect(page.get_by_text("6 pictures ready, 6 with a caption.")).to_be_visible()
    page.get_by_role("button", name="Advanced settings").click()
    page.get_by_role("tab", name="Training").click()
    page.get_by_label("Learning rate", exact=True).first.fill("")
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#trouble")).to_contain_text("training.learning_rate: is empty")
    page.get_by_role("textbox", name=re.compile("Start from")).fill("teddy-before")
    expect(page.locator("#continues")).to_contain_text("Continues training from teddy-before")
    page.wait_for_timeout(500)
    page.reload()
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#continues")).to_contain_text("Continues training from teddy-before")
    page.get_by_role("button", name="Rocket").click()
    expect(page.locator("#continues")).to_be_hidden()
