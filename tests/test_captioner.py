"""Pictures are described by a local model in a process of its own; what it cannot do is a sentence in the draft."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from run_folders import ROOT, wait_for
from tiny_pipelines import save_pictures

from reparam_diffusion.data.captions import caption_for
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import captioner, datasets, drafts
from reparam_diffusion.models.describe import load_describer


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BLIP, saved as people have it."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    folder = tmp_path_factory.mktemp("blip")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[DEC]",
        "[ENC]",
        "a",
        "red",
        "cat",
        "dog",
        "on",
        "the",
        "grass",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    text = {
        "vocab_size": len(words), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 16, "projection_dim": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 5,
        "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 16,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(images, BertTokenizer(vocab=str(folder / "vocab.txt"))).save_pretrained(folder)
    return folder


def new_draft(workspace: Path, tmp_path: Path) -> str:
    return drafts.keep(datasets.open_dataset(save_pictures(tmp_path / "pictures")), workspace)


def test_a_local_blip_says_something_about_a_picture(blip: Path) -> None:
    describe = load_describer(blip, device="cpu")
    said = describe(Image.new("RGB", (50, 40), "red"))
    assert said and said == " ".join(said.split())
    assert describe(Image.new("RGB", (50, 40), "red")) == said


def test_only_pictures_without_a_caption_are_described_and_the_words_are_filled_in_later(
    workspace: Path, tmp_path: Path
) -> None:
    name = new_draft(workspace, tmp_path)
    captioner.describe_draft(workspace, name, lambda image: f"a {image.size[0]} pixel square")
    first, *others = drafts.known(name, workspace).pictures
    assert first.caption == "a photo of sks toy, red, small"
    for picture in others:
        assert caption_for(picture, template="", trigger="zwx", class_word="cat") == "zwx cat, a 40 pixel square"
    assert captioner.progress_of(workspace, name) == captioner.Progress(2, 2)
    with pytest.raises(UserError, match="has a caption already"):
        captioner.start(workspace, name, "anything")


def test_the_describer_is_a_process_that_works_on_the_draft(
    workspace: Path, tmp_path: Path, blip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    name = new_draft(workspace, tmp_path)
    captioner.start(workspace, name, str(blip))
    wait_for(lambda: captioner.progress_of(workspace, name) == captioner.Progress(2, 2), seconds=120)
    assert all(picture.caption for picture in drafts.known(name, workspace).pictures)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "holds no model"),
        ('{"model_type": "bert"}', "of the kind bert"),
        ('{"model_type": "blip"}', "could not be loaded"),
    ],
)
def test_what_cannot_describe_is_told_in_the_draft(
    workspace: Path, tmp_path: Path, config: str | None, words: str
) -> None:
    name = new_draft(workspace, tmp_path)
    (tmp_path / "model").mkdir()
    if config:
        (tmp_path / "model" / "config.json").write_text(config)
    assert captioner.main([str(workspace), name, str(tmp_path / "model")]) == 2
    progress = captioner.progress_of(workspace, name)
    assert progress is not None and words in progress.trouble
