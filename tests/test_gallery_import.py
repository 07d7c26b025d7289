"""Files from elsewhere come onto the shelf byte for byte, with their sidecars; what is none is refused by name."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_gallery_index import put
from typer.testing import CliRunner

from reparam_diffusion.__main__ import app
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.identify import count_pictures, guess_trigger
from reparam_diffusion.gallery import catalog, importing, shelf
from reparam_diffusion.gallery.importing import Imported, import_files
from ui import gallery_cards


@pytest.fixture
def dropped(tmp_path: Path) -> Path:
    """A folder with what a person drops."""
    folder = tmp_path / "dropped"
    folder.mkdir()
    return folder


def lora(folder: Path, name: str = "Cute Cat v2.1", *, rank: int = 4, **header: str) -> Path:
    made = put(folder / "made", "x", rank=rank, **header)
    return made.rename(folder / f"{name}.safetensors")


def peft(folder: Path) -> Path:
    """A PEFT folder for the UNet."""
    folder.mkdir(parents=True)
    path = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 8), f"{path}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "runwayml/sd-1.5"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def facts(workspace: Path, stem: str) -> dict[str, object]:
    return shelf.shelved_at(shelf.at(stem, workspace)).facts


def by_name(told: list[Imported]) -> dict[str, Imported]:
    return {one.name: one for one in told}


def test_a_strangers_file_stays_byte_equal_and_tells_what_it_holds(tmp_path: Path, dropped: Path) -> None:
    file = lora(dropped, ss_base_model_version="sdxl_base_v1-0", ss_trigger_words="sks cat")
    (one,) = import_files([file], tmp_path)
    assert one.file is not None and one.report is not None
    assert (one.file.name, one.name, one.is_new) == ("cute-cat-v2-1.safetensors", "Cute Cat v2.1.safetensors", True)
    assert one.file.read_bytes() == file.read_bytes()
    assert (one.report["method"], one.report["base"], one.report["trigger"]) == ("lora", "sdxl", "sks cat")
    noted = facts(tmp_path, "cute-cat-v2-1")
    assert (noted["name"], noted["activation text"], noted["sd version"]) == ("Cute Cat v2.1", "sks cat", "SDXL")


def test_bad_ones_are_refused_by_name_and_the_good_ones_kept(tmp_path: Path, dropped: Path) -> None:
    good = lora(dropped, "good")
    bad = {
        "model.ckpt": (b"pickle", "can run programs"),
        "torn.safetensors": (good.read_bytes()[:-9], "not a whole .safetensors file"),
        "<b>page.safetensors": (b"<html>", "not a whole .safetensors file"),
        "empty.safetensors": (b"", "not a whole .safetensors file"),
        "broken.zip": (b"PK\x03\x04", "no usable .zip file"),
        "alone.png": (b"png", "none of its name came with it"),
    }
    for name, (content, _) in bad.items():
        (dropped / name).write_bytes(content)
    save_file({"model.diffusion_model.out.weight": torch.ones(2)}, dropped / "full.safetensors")
    told = by_name(import_files(sorted(dropped.iterdir(), key=lambda file: file.is_dir())[:-1], tmp_path))
    assert told["good.safetensors"].file is not None
    assert "full model, not an adapter" in told["full.safetensors"].why
    for name, (_, why) in bad.items():
        assert why in told[name].why
        assert told[name].file is None
    assert [entry.stem for entry in catalog.list_entries(tmp_path)] == ["good"]


def test_sidecars_of_a1111_come_along_but_claim_no_run(tmp_path: Path, dropped: Path) -> None:
    notes = {
        "activation text": "mycat",
        "preferred weight": 0.6,
        "notes": "n",
        "vae": "x",
        "run": "theirs",
        "tags": ["a"],
    }
    lora(dropped, "cat", ss_trigger_words="sks")
    (dropped / "cat.json").write_text(json.dumps(notes))
    Image.new("RGB", (900, 1200), "teal").save(dropped / "cat.preview.png")
    told = import_files([file for file in dropped.iterdir() if file.is_file()], tmp_path)
    assert [one.name for one in told] == ["cat.safetensors"]
    noted = facts(tmp_path, "cat")
    assert {key: noted[key] for key in ("activation text", "preferred weight", "notes", "vae", "tags")} == {
        key: notes[key] for key in ("activation text", "preferred weight", "notes", "vae", "tags")
    }
    assert "run" not in noted
    with Image.open(shelf.shelf_of(tmp_path) / "cat.png") as picture:
        assert picture.size == (576, 768)


def test_civitais_sidecar_gives_name_trigger_and_description_as_plain_words(tmp_path: Path, dropped: Path) -> None:
    info = {
        "trainedWords": ["mycat", "sitting"],
        "description": "<p>Use <b>0.8</b> &amp; up</p>",
        "model": {"name": "The Cat", "tags": ["animal"]},
    }
    lora(dropped, "cat.v1")
    (dropped / "cat.v1.civitai.info").write_text(json.dumps(info))
    Image.new("RGB", (30, 30), "red").save(dropped / "cat.v1.JPG", "JPEG")
    import_files([file for file in dropped.iterdir() if file.is_file()], tmp_path)
    noted = facts(tmp_path, "cat-v1")
    assert (noted["name"], noted["activation text"], noted["tags"]) == ("The Cat", "mycat, sitting", ["animal"])
    assert noted["description"] == "Use  0.8  & up"
    assert shelf.shelved_at(shelf.at("cat-v1", tmp_path)).thumbnail is not None


@pytest.mark.parametrize("content", [b"{", b"[1]", b"[" * 5000, b'{"name": 5, "tags": 7, "notes": ["a", {}]}', b"\xff"])
def test_broken_sidecars_keep_no_adapter_out(tmp_path: Path, dropped: Path, content: bytes) -> None:
    file = lora(dropped, "cat")
    for ending in (".json", ".civitai.info", ".png"):
        (dropped / f"cat{ending}").write_bytes(content)
    told = import_files([file, *(dropped / f"cat{ending}" for ending in (".json", ".civitai.info", ".png"))], tmp_path)
    assert [one.why for one in told] == [""]
    assert shelf.shelved_at(shelf.at("cat", tmp_path)).name == "cat"


def test_the_same_file_twice_is_one_entry_and_its_notes_stay(tmp_path: Path, dropped: Path) -> None:
    file = lora(dropped, "cat")
    import_files([file], tmp_path)
    shelf.edit("cat", tmp_path, {"notes": "mine"})
    (again,) = import_files([file], tmp_path)
    assert (again.is_new, facts(tmp_path, "cat")["notes"]) == (False, "mine")
    assert len(shelf.list_adapters(tmp_path)) == 1


# --- PEFT folders and archives ---------------------------------------------------------------------------------------
def test_pefts_two_files_dropped_side_by_side_are_one_adapter(tmp_path: Path, dropped: Path) -> None:
    folder = peft(dropped / "p")
    (one,) = import_files(sorted(folder.iterdir()), tmp_path)
    assert one.file is not None
    assert (one.why, one.file.is_dir(), one.file.name) == ("", True, "peft-sd-1-5")
    assert shelf.is_same(one.file, folder)
    (entry,) = catalog.list_entries(tmp_path)
    assert entry.header is not None
    assert (entry.header.method, entry.header.largest_rank) == ("lora", 2)
    assert entry.bytes == (folder / "adapter_model.safetensors").stat().st_size


def test_an_archive_is_looked_into_for_folders_and_files(tmp_path: Path, dropped: Path) -> None:
    folder = peft(dropped / "My Pony")
    with zipfile.ZipFile(dropped / "all.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"My Pony/unet/{file.name}")
        archive.write(lora(dropped, "cat"), "loose/cat.safetensors")
        archive.writestr("loose/cat.json", '{"notes": "came along"}')
        archive.writestr("__MACOSX/loose/._cat.safetensors", "litter")
        archive.writestr("../../evil.safetensors", "out")
    told = by_name(import_files([dropped / "all.zip"], tmp_path / "w" / "x"))
    assert {name for name, one in told.items() if one.file} == {"My Pony", "cat.safetensors"}
    assert told["evil.safetensors"].why
    assert not list(tmp_path.glob("**/evil*"))
    assert facts(tmp_path / "w" / "x", "cat")["notes"] == "came along"
    assert (shelf.at("my-pony", tmp_path / "w" / "x") / "unet" / "adapter_config.json").is_file()


def test_a_folder_goes_to_the_bin_and_back_as_a_file_does(tmp_path: Path, dropped: Path) -> None:
    from test_shelf import NOW

    from reparam_diffusion.gallery import waste

    folder = peft(dropped / "pony")
    with zipfile.ZipFile(dropped / "pony.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    import_files([dropped / "pony.zip"], tmp_path)
    key = waste.put("pony", tmp_path, now=NOW)
    import_files([dropped / "pony.zip"], tmp_path)
    back = waste.restore(key, tmp_path)
    assert back.name == "pony-2"
    assert shelf.is_same(back, folder)
    assert facts(tmp_path, "pony-2")["name"] == "pony"


def test_a_folder_is_looked_into_and_leaves_behind_what_is_no_adapter(tmp_path: Path, dropped: Path) -> None:
    folder = peft(dropped / "pony")
    (folder / "optimizer.bin").write_bytes(b"pickle")
    lora(folder / "more", "cat")
    told = by_name(import_files([folder], tmp_path))
    assert [name for name, one in told.items() if one.file] == ["pony"]
    inside = sorted(file.name for file in shelf.at("pony", tmp_path).rglob("*"))
    assert inside == ["adapter_config.json", "adapter_model.safetensors"]
    assert by_name(import_files([folder / "more"], tmp_path))["cat.safetensors"].file


def test_an_archive_without_an_adapter_says_so(tmp_path: Path, dropped: Path) -> None:
    with zipfile.ZipFile(dropped / "nothing.zip", "w") as archive:
        archive.writestr("__MACOSX/._a", "litter")
    assert [(one.name, one.why) for one in import_files([dropped / "nothing.zip"], tmp_path)] == [
        ("nothing.zip", "There is no adapter in it.")
    ]


def test_too_much_at_once_is_refused_before_anything_is_copied(
    tmp_path: Path, dropped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = lora(dropped, "cat")
    with zipfile.ZipFile(dropped / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.safetensors", bytes(5_000_000))
    monkeypatch.setattr(importing, "MOST_BYTES", 1_000_000)
    (bomb,) = import_files([dropped / "bomb.zip"], tmp_path)
    assert "portions" in bomb.why
    monkeypatch.setattr(importing, "MOST_FILES", 2)
    with pytest.raises(UserError, match="At most 2"):
        import_files([file] * 3, tmp_path)
    monkeypatch.setattr(importing, "MOST_BYTES", 10)
    with pytest.raises(UserError, match="portions"):
        import_files([file], tmp_path)
    assert shelf.list_adapters(tmp_path) == []


# --- on the command line ---------------------------------------------------------------------------------------------
def test_the_command_line_imports_lists_and_inspects(tmp_path: Path, dropped: Path) -> None:
    lora(dropped, "cat", ss_trigger_words="sks cat", ss_sd_model_name="starter-model", reparam_method="adalora")
    (dropped / "bad.pt").write_bytes(b"pickle")
    where = ["--workspace", str(tmp_path / "w")]
    run = CliRunner().invoke
    done = run(app, ["import", str(dropped / "cat.safetensors"), str(dropped / "bad.pt"), *where])
    assert done.exit_code == 0
    assert "Gallery   cat\n" in done.stdout
    assert "bad.pt is left out." in done.stderr
    assert run(app, ["import", str(dropped / "bad.pt"), *where]).exit_code == 1
    done = run(app, ["gallery", "sks", *where])
    assert re.fullmatch(r'cat  AdaLoRA  Starter model  0.0 MB  [\d-]+  "sks cat"  strength 1\n', done.stdout)
    assert json.loads(run(app, ["gallery", "--method", "loha", "--json", *where]).stdout) == []
    lines = run(app, ["inspect", "cat", *where]).stdout
    assert "Method    AdaLoRA, saved as LoRA\nBase      Starter model" in lines
    assert "Layers    1: 1 in the UNet\nRanks     4 everywhere" in lines


# --- what a foreign header lets one guess ----------------------------------------------------------------------------
def kohya(folder: str, pictures: int, **tags: int) -> dict[str, str]:
    return {
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 10, "img_count": pictures}}),
        "ss_tag_frequency": json.dumps({folder: tags}),
    }


@pytest.mark.parametrize(
    ("header", "trigger"),
    [
        (kohya("10_sks dog", 9, dog=9), "sks dog"),
        (kohya("dog", 9, ohwx=9, grass=3), "ohwx"),
        (kohya("dog", 9, grass=8, sky=3), ""),
        ({"ss_tag_frequency": "nonsense"}, ""),
        ({"ss_tag_frequency": '{"a": {"b": "c"}, "d": 5}', "ss_dataset_dirs": '{"a": 1}'}, ""),
    ],
)
def test_the_trigger_is_the_folders_word_or_the_tag_that_all_pictures_have(
    header: dict[str, str], trigger: str
) -> None:
    assert guess_trigger(header) == trigger


def test_pictures_are_counted_once_not_once_a_repeat() -> None:
    assert count_pictures(kohya("10_sks", 9)) == 9
    assert count_pictures({}) == 0


def test_only_what_is_new_is_counted_as_imported(tmp_path: Path, dropped: Path) -> None:
    first, second = lora(dropped, "one"), lora(dropped, "two", rank=2)
    import_files([first], tmp_path)
    assert "1 adapter imported." in gallery_cards.imports_of(import_files([first, second], tmp_path))


def test_a_peft_folder_is_downloaded_as_one_file_that_can_be_imported(tmp_path: Path, dropped: Path) -> None:
    (told,) = import_files([peft(dropped / "cat")], tmp_path)
    assert told.file is not None
    before = shelf.names_in(told.file.parent)
    entry = catalog.entry_at(told.file, tmp_path)
    assert gallery_cards.head_of(entry, None).count("Download cat.zip") == 1
    assert shelf.names_in(told.file.parent) == before
    (again,) = import_files([tmp_path / ".cache" / "zips" / "cat.zip"], tmp_path)
    assert again.file == told.file and not again.is_new
