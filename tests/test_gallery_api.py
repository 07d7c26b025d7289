"""The gallery's named endpoints, called by gradio_client as other programs call them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from page_browser import Served, serve_page
from test_gallery_index import put

pytestmark = pytest.mark.page


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_page(tmp_path_factory.mktemp("api")) as served:
        yield served


@pytest.fixture(scope="module")
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
        ("/gallery", ["", "best"], "cannot be sorted"),
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
