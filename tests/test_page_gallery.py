"""The gallery in a real browser, and its named endpoints as other programs call them."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from page_browser import Served, open_pages, serve_page
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect
from safetensors.torch import save_file
from test_gallery_index import put

from reparam_diffusion import events as e

pytestmark = pytest.mark.page
SLOW = 60_000  # milliseconds; the machine may be busy with other tests


@pytest.fixture(scope="module")
def one_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_page(tmp_path_factory.mktemp("gallery")) as served:
        yield served


@pytest.fixture
def served(one_page: Served) -> Served:
    """The page over an empty shelf and an empty bin."""
    for folder in ("adapters", "bin"):
        shutil.rmtree(one_page.workspace / folder, ignore_errors=True)
    return one_page


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """A wide window; an error in its console fails the test."""
    with open_pages(browser, served) as opened:
        page = opened()
        page.get_by_role("tab", name="Gallery").click()
        expect(page.get_by_label("Search", exact=True)).to_be_visible(timeout=SLOW)
        yield page


@pytest.fixture
def phone(browser: Browser, served: Served) -> Iterator[Page]:
    """A narrow window, dark."""
    with open_pages(browser, served) as opened:
        page = opened(width=390, height=844, scheme="dark")
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown").get_by_text("Gallery").click()
        expect(page.get_by_label("Search", exact=True)).to_be_visible(timeout=SLOW)
        yield page


def card(page: Page, name: str) -> Locator:
    return page.locator("#shelf .adapter").filter(has_text=name)


def test_train_on_from_this_opens_the_form_with_the_adapter(page: Page, served: Served) -> None:
    put(served.workspace, "teddy", ss_trigger_words="sks")
    card(page, "teddy").click(timeout=SLOW)
    page.get_by_role("button", name="Train on from this").click(timeout=SLOW)
    expect(page.get_by_role("tab", name="Train")).to_have_attribute("aria-selected", "true", timeout=SLOW)
    page.get_by_text("Advanced settings").click()
    page.get_by_role("tab", name="Training", exact=True).click()
    expect(page.get_by_label("Start from")).to_have_value("teddy", timeout=SLOW)


def test_an_empty_gallery_says_what_to_do(page: Page) -> None:
    expect(page.get_by_text("No adapters yet. Train one, or drop a file here.")).to_be_visible(timeout=SLOW)


def test_a_strangers_file_is_dropped_told_of_noted_deleted_and_restored(
    page: Page, served: Served, tmp_path: Path
) -> None:
    file = put(tmp_path, "Cute Cat", ss_trigger_words="sks cat", ss_base_model_version="sdxl_base_v1-0")
    (tmp_path / "bad <i>.ckpt").write_bytes(b"pickle")
    picture = tmp_path / "Cute Cat.png"
    Image.new("RGB", (64, 64), "teal").save(picture)
    page.locator("#shelf-drop input[type=file]").set_input_files([file, tmp_path / "bad <i>.ckpt", picture])
    imported = page.locator("#imported")
    expect(imported).to_contain_text("1 adapter imported.", timeout=SLOW)
    expect(imported).to_contain_text("LoRA, for Stable Diffusion XL, 1 layer, rank 4 everywhere, trigger “sks cat”")
    expect(imported).to_contain_text("can run programs when they are read")
    expect(page.locator("#chosen h2")).to_have_text("Cute Cat")
    drawn = page.get_by_role("img", name="What Cute Cat draws").first
    assert drawn.evaluate("image => image.decode().then(() => image.naturalWidth)") == 256
    with page.expect_download() as download:
        page.get_by_role("link", name="Download cute-cat.safetensors").click()
    assert Path(download.value.path()).read_bytes() == file.read_bytes()

    page.get_by_role("button", name="Name, notes and tags").click()
    expect(page.get_by_label("Trigger words")).to_have_value("sks cat")
    page.get_by_label("Name", exact=False).first.fill("Mimi")
    page.get_by_label("Notes").fill("likes a red background")
    page.get_by_label("Preferred strength").fill("0.7")
    page.get_by_role("button", name="Save").click()
    expect(card(page, "Mimi")).to_contain_text("strength 0.7")
    expect(page.locator("#chosen")).to_contain_text("likes a red background")
    noted = json.loads((served.workspace / "adapters" / "cute-cat.json").read_text())
    assert (noted["name"], noted["notes"], noted["activation text"]) == ("Mimi", "likes a red background", "sks cat")

    page.get_by_role("button", name="Move to bin").click()
    expect(page.get_by_text("No adapters yet.")).to_be_visible()
    page.get_by_role("radio", name="Bin").click()
    card(page, "Mimi").click()
    page.get_by_role("button", name="Restore").click()
    expect(page.get_by_text("The bin is empty.")).to_be_visible()
    page.get_by_role("radio", name="Adapters").click()
    expect(card(page, "Mimi")).to_be_visible()
    assert (served.workspace / "adapters" / "cute-cat.safetensors").read_bytes() == file.read_bytes()


def test_hostile_names_stay_text(page: Page, served: Served) -> None:
    names = ["<img src=x onerror=alert(1)>", "{{constructor}} ${alert(2)}", "</textarea><script>alert(3)</script>"]
    for number, name in enumerate(names):
        notes = {"name": name, "tags": [name], "notes": name, "activation text": name}
        put(served.workspace, f"evil{number}", notes=notes, ss_sd_model_name=name, ss_output_name=name)
    for name in names:
        card(page, name).click()
        expect(page.locator("#chosen h2")).to_have_text(name)
        page.locator("#chosen summary").click()
        expect(page.locator("#chosen .metadata")).to_contain_text(name)
    page.get_by_label("Search").fill(names[0])
    expect(page.locator("#shelf .adapter")).to_have_count(1)


def test_searching_and_filtering_narrow_the_cards_and_more_are_shown_on_demand(page: Page, served: Served) -> None:
    for number in range(70):
        put(served.workspace, f"a{number:02}", notes={"name": f"Bear {number:02}"})
    put(served.workspace, "xl", method="loha", notes={"name": "Cat"}, ss_base_model_version="sdxl_base_v1-0")
    cards = page.locator("#shelf .adapter")
    expect(cards).to_have_count(60, timeout=SLOW)
    expect(page.locator("#shelf-count")).to_have_text("71 adapters, 60 shown")
    page.get_by_role("button", name="Show more").click()
    expect(cards).to_have_count(71)
    page.get_by_label("Search").fill("bear 4")
    expect(cards).to_have_count(16)
    page.get_by_label("Search").fill("")
    page.get_by_label("Base model").click()
    page.get_by_role("option", name="Stable Diffusion XL").click()
    expect(cards).to_have_count(1)
    expect(cards.first).to_contain_text("LoHa")
    page.get_by_label("Search").fill("bear")
    expect(page.get_by_text("Nothing matches.")).to_be_visible()


def test_the_keyboard_chooses_a_card_and_keeps_its_place(page: Page, served: Served) -> None:
    for stem in ("one", "two"):
        put(served.workspace, stem)
    card(page, "two").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#chosen h2")).to_have_text("two")
    expect(card(page, "two")).to_have_attribute("aria-pressed", "true")
    put(served.workspace, "three")  # somebody else's doing brings new cards in
    expect(page.locator("#shelf .adapter")).to_have_count(3)
    expect(card(page, "two")).to_be_focused()


def test_what_another_browser_does_is_seen_and_what_is_being_typed_stays(page: Page, served: Served) -> None:
    put(served.workspace, "bear", notes={"name": "Bear"})
    card(page, "Bear").click()
    page.get_by_role("button", name="Name, notes and tags").click()
    page.get_by_label("Notes").fill("half a sen")
    theirs = Client(served.address, verbose=False)
    theirs.predict("bear", {"name": "Brown bear", "tags": "toy"}, api_name="/gallery_edit")
    expect(page.locator("#chosen h2")).to_have_text("Brown bear")
    expect(page.get_by_label("Notes")).to_have_value("half a sen")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#chosen .facts")).to_contain_text("half a sen")
    noted = json.loads((served.workspace / "adapters" / "bear.json").read_text())
    assert (noted["name"], noted["tags"], noted["notes"]) == ("Brown bear", ["toy"], "half a sen")
    theirs.predict("bear", api_name="/gallery_bin")
    expect(page.get_by_text("Choose an adapter to see what it is.")).to_be_visible()
    theirs.close()


def test_deleting_for_good_takes_a_second_press(page: Page, served: Served) -> None:
    put(served.workspace, "bear")
    card(page, "bear").click()
    page.get_by_role("button", name="Move to bin").click()
    page.get_by_role("radio", name="Bin").click()
    card(page, "bear").click()
    page.get_by_role("button", name="Delete for good").click()
    assert len(list((served.workspace / "bin" / "adapters").iterdir())) == 1
    page.get_by_role("button", name="Yes, delete it").click()
    expect(page.get_by_text("The bin is empty.")).to_be_visible()
    assert list((served.workspace / "bin" / "adapters").iterdir()) == []


def test_ranks_that_differ_are_told_layer_by_layer_and_the_rest_in_a_word(page: Page, served: Served) -> None:
    put(served.workspace, "even", rank=5)
    tensors = {}
    for block, rank in enumerate((2, 3, 5, 7)):
        key = f"lora_unet_down_blocks_{block}_attentions_0_proj_in"
        tensors |= {f"{key}.lora_down.weight": torch.ones(rank, 8), f"{key}.lora_up.weight": torch.ones(8, rank)}
    save_file(tensors, served.workspace / "adapters" / "adaptive.safetensors", {"reparam_method": "adalora"})
    card(page, "even").click()
    expect(page.locator("#chosen-rest")).to_contain_text("5 everywhere (1 layer).")
    card(page, "adaptive").click()
    expect(page.locator("#chosen-rest")).to_contain_text("2 to 7, 4.2 on average (4 layers).")
    expect(page.locator("#chosen-head")).to_contain_text("AdaLoRA, saved as LoRA")
    expect(page.locator("#chosen .ranks li")).to_have_count(4)
    expect(page.locator("#chosen .ranks li").nth(1)).to_have_text("down 1 attention 0 proj in3")


def test_the_loss_of_the_run_that_made_it_is_drawn(page: Page, served: Served) -> None:
    folder = served.workspace / "runs" / "20260102-030405-bear"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text("")
    steps = [e.Step(number, 1.0 / number, {"unet": 1e-4}, 0.1, 1.0) for number in range(1, 9)]
    (folder / "events.jsonl").write_text("".join(f"{event.to_json()}\n" for event in [*steps, e.Finished(8, "", 1.0)]))
    put(served.workspace, "bear", notes={"run": folder.name})
    put(served.workspace, "stray", notes={"run": "../../etc"})
    card(page, "bear").click()
    expect(page.locator("#chosen").get_by_role("img", name=re.compile("^Loss from"))).to_be_visible()
    card(page, "stray").click()
    expect(page.locator("#chosen h2")).to_have_text("stray")
    expect(page.locator("#chosen").get_by_role("img", name=re.compile("^Loss from"))).to_have_count(0)
    shutil.rmtree(folder)


def test_nothing_is_cut_off_on_a_phone_and_what_is_chosen_comes_into_view(phone: Page, served: Served) -> None:
    long = "averylongnamewithoutanyspacesthatsomebodytypedin" * 2
    for number in range(4):
        put(served.workspace, f"a{number}", notes={"name": f"{long}{number}", "tags": [long[:60]], "notes": long})
    card(phone, f"{long}3").click()
    expect(phone.locator("#chosen h2")).to_be_in_viewport()
    phone.get_by_role("button", name="Name, notes and tags").click()
    expect(phone.get_by_label("Notes")).to_be_visible()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    cut = phone.evaluate(
        """() => [...document.querySelectorAll("#shelf span, #chosen dd, #chosen h2, #chosen button span:not(.icon), label, p")]
            .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
            .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert cut == []
    assert phone.locator("img:not([alt]), img[alt='']").count() == 0


def test_only_pictures_and_adapters_are_served(page: Page, served: Served) -> None:
    put(served.workspace, "bear")
    (served.workspace / "index.sqlite").touch()
    card(page, "bear").click()
    expect(page.get_by_role("link", name=re.compile("Download"))).to_be_visible()
    for private in ("index.sqlite", "page.log", "adapters/../index.sqlite", ".cache/thumbs/../../index.sqlite"):
        asked = f"{served.address}/gradio_api/file={served.workspace / private}"
        assert page.request.get(asked).status in (403, 404), private
    asked = f"{served.address}/gradio_api/file={served.workspace / 'adapters' / 'bear.safetensors'}"
    assert page.request.get(asked).status == 200


# --- other programs --------------------------------------------------------------------------------------------------
@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    client = Client(served.address, verbose=False)
    yield client
    client.close()


def test_an_adapter_goes_its_whole_way_through_the_endpoints(client: Client, served: Served, tmp_path: Path) -> None:
    file = put(tmp_path, "Cute Cat", ss_trigger_words="sks cat", ss_base_model_version="sdxl_base_v1-0")
    (tmp_path / "bad.ckpt").write_bytes(b"pickle")
    files = [handle_file(file), handle_file(tmp_path / "bad.ckpt")]
    good, bad = client.predict(files, api_name="/gallery_import")
    assert (good["stem"], good["is_new"], good["report"]["method"]) == ("cute-cat", True, "lora")
    assert (bad["stem"], "can run programs" in bad["why"]) == ("", True)
    (row,) = client.predict("sks", "name", "sdxl", "lora", 10, api_name="/gallery")
    assert (row["stem"], row["trigger"], row["base"]) == ("cute-cat", "sks cat", "sdxl")
    assert client.predict("dog", api_name="/gallery") == []
    changes = {"name": "Mimi", "preferred weight": 0.7}
    row = client.predict("cute-cat", changes, api_name="/gallery_edit")
    assert (row["name"], row["strength"]) == ("Mimi", 0.7)
    told = client.predict("cute-cat", api_name="/gallery_details")
    assert (told["notes"]["name"], told["report"]["layers"]) == ("Mimi", 1)
    key = client.predict("cute-cat", api_name="/gallery_bin")
    assert client.predict(api_name="/gallery") == []
    assert [one["key"] for one in client.predict(api_name="/gallery_binned")] == [key]
    assert client.predict(key, api_name="/gallery_restore")["name"] == "Mimi"
    shelved = served.workspace / "adapters" / "cute-cat.safetensors"
    assert shelved.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("endpoint", "arguments", "why"),
    [
        ("/gallery_details", ["../../etc/passwd"], "no adapter"),
        ("/gallery_bin", ["no such"], "no adapter"),
        ("/gallery_restore", ["../adapters"], "not in the bin any more"),
        ("/gallery", ["", "best"], "no order called"),
        ("/gallery_edit", ["no such", {"notes": "x"}], "no adapter"),
    ],
)
def test_mistakes_are_told_in_words(client: Client, endpoint: str, arguments: list[object], why: str) -> None:
    with pytest.raises(AppError, match=why):
        client.predict(*arguments, api_name=endpoint)


def test_a_file_of_the_server_is_no_upload(served: Served) -> None:
    secret = put(served.workspace.parent, "secret")
    files = [{"path": str(secret), "meta": {"_type": "gradio.FileData"}}]
    address = f"{served.address}/gradio_api/call/gallery_import"
    asked = urllib.request.Request(
        address, json.dumps({"data": [files]}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/{event}") as answer:
        assert answer.read().startswith(b"event: error")
    assert not (served.workspace / "adapters" / "secret.safetensors").exists()
