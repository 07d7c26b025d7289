"""Learned words: read in place of the trigger, trained along, kept in the file, and gone without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import save_pictures, save_quick

from reparam_diffusion.apply import Easel, apply_adapter, generate
from reparam_diffusion.config import TrainConfig, parse_set, settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Event, Sampled, Started, Step, Warned
from reparam_diffusion.formats.bundled import write_embedding
from reparam_diffusion.formats.export import Target, export_adapter
from reparam_diffusion.formats.programs import PROGRAMS
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import write_adapter
from reparam_diffusion.gallery.bake import bake
from reparam_diffusion.gallery.blend.blending import blend_files
from reparam_diffusion.gallery.blend.sources import Source
from reparam_diffusion.gallery.doctor import diagnose, repair
from reparam_diffusion.gallery.report import report_lines, report_of
from reparam_diffusion.models.encode import encode
from reparam_diffusion.models.load import Model, load_model
from reparam_diffusion.models.outline import outline
from reparam_diffusion.models.parts import ASSETS
from reparam_diffusion.models.words import Word, add_words, has_word, set_words, spoken, take_words
from reparam_diffusion.targets import build_adapters
from reparam_diffusion.training.embedding import new_word
from reparam_diffusion.training.estimate_memory import count_memory
from reparam_diffusion.training.learner import plan_run
from reparam_diffusion.training.loop import train

FAMILIES = ("sd1", "sdxl")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("words")
    for family in FAMILIES:
        save_quick(place / family, family)
    save_pictures(place / "pictures")
    return place


@pytest.fixture(scope="module")
def learned() -> dict[str, Path]:
    """One trained file, made by the first test that wants it."""
    return {}


@pytest.fixture
def file(place: Path, learned: dict[str, Path]) -> Path:
    """An adapter of the tiny SD 1 with a learned word, as trained."""
    if not learned:
        run(config_for(place, "sd1"), place / "run")
        learned["file"] = place / "run" / "adapter.safetensors"
    return learned["file"]


@pytest.fixture(scope="module")
def models(place: Path) -> dict[str, Model]:
    return {family: load_model(place / family, dtype=torch.float32) for family in FAMILIES}


def word_of(model: Model, text: str, meaning: str) -> Word:
    """A word with the vectors of ordinary words."""
    encoders = [module for part, module in model.parts.items() if part != "unet"]
    rows = {}
    for number, (tokenizer, encoder) in enumerate(zip(model.tokenizers, encoders, strict=True), 1):
        ids = tokenizer(meaning, add_special_tokens=False).input_ids
        rows[f"te{number}"] = encoder.get_input_embeddings().weight[ids].detach().clone()  # type: ignore[operator]
    return Word(text, rows)


def random_word(model: Model, text: str, count: int = 2, *, width: int = 16) -> Word:
    return Word(text, {part: torch.randn(count, width) for part in model.parts if part != "unet"})


def is_equal(one: Any, other: Any) -> bool:
    same = torch.equal(one.hidden, other.hidden)
    return same and (one.pooled is None or torch.equal(one.pooled, other.pooled))


# --- reading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_a_word_reads_as_what_its_vectors_mean(family: str, models: dict[str, Model]) -> None:
    model = models[family]
    word = word_of(model, "sks", "red teddy bear")
    plain = encode(model, ["a photo of red teddy bear, small", "", "asks sksy"])
    before = encode(model, ["a photo of sks, small", "", "asks sksy"])
    with spoken(model, [word]):
        new = encode(model, ["a photo of SKS, small", "", "asks sksy"])
    assert is_equal(new, plain) and not is_equal(new, before)
    assert is_equal(encode(model, ["a photo of sks, small", "", "asks sksy"]), before)


def test_nothing_is_left_of_words_that_came_and_went_in_any_order(models: dict[str, Model]) -> None:
    model = models["sd1"]
    tokenizers, weights = list(model.tokenizers), {k: v.clone() for k, v in model.text_encoders[0].state_dict().items()}
    before = encode(model, ["sks and blorp"])
    one, other = random_word(model, "sks"), random_word(model, "blorp", 3)
    add_words(model, [one])
    with_one = encode(model, ["sks and blorp"])
    add_words(model, [other, one])
    take_words(model, [one])
    both = encode(model, ["sks and blorp"])
    assert not is_equal(both, with_one)
    take_words(model, [other])
    assert is_equal(encode(model, ["sks and blorp"]), with_one), "it was asked for twice"
    take_words(model, [one])
    assert is_equal(encode(model, ["sks and blorp"]), before)
    assert all(now is then for now, then in zip(model.tokenizers, tokenizers, strict=True))
    assert all(torch.equal(value, weights[key]) for key, value in model.text_encoders[0].state_dict().items())
    table = model.text_encoders[0].get_input_embeddings()
    assert not table._forward_hooks and not model.text_encoders[0]._forward_pre_hooks


def test_two_words_of_one_name_are_refused_and_the_longer_of_two_names_wins(models: dict[str, Model]) -> None:
    model = models["sd1"]
    with pytest.raises(UserError, match='Two adapters bring the word "SKS"'):
        set_words(model, [random_word(model, "sks"), random_word(model, "SKS")])
    assert model.speech is None
    long, short = word_of(model, "sks toy", "blue car"), word_of(model, "sks", "dog")
    plain = encode(model, ["a blue car and a dog"])
    with spoken(model, [short, long]):
        assert is_equal(encode(model, ["a sks toy and a sks"]), plain)


def test_gradients_reach_the_vectors_and_nothing_else(models: dict[str, Model]) -> None:
    model = models["sdxl"]
    word = random_word(model, "sks")
    for vectors in word.vectors.values():
        vectors.requires_grad_()
    with spoken(model, [word]):
        text = encode(model, ["a sks", ""])
    (text.hidden.square().sum() + text.pooled.square().sum()).backward()  # type: ignore[union-attr]
    assert all(vectors.grad is not None and vectors.grad.abs().sum() > 0 for vectors in word.vectors.values())
    assert all(p.grad is None for encoder in model.text_encoders for p in encoder.parameters())


def test_whole_words_only() -> None:
    assert has_word("a photo of SKS, red", "sks") and not has_word("asks sksy", "sks")


# --- training --------------------------------------------------------------------------------------------------------
def config_for(place: Path, family: str, *settings: str) -> TrainConfig:
    base = [
        f"model.path='{place / family}'", "model.precision=fp32", f"data.images='{place / 'pictures'}'",
        "data.trigger=sks", "data.class_word=toy", "targets.unet=['unet.mid_block*']", "training.steps=4",
        "training.learning_rate=0.01", "training.warmup=0.0", "embedding.vectors=2", "embedding.words='red bear'",
        "embedding.learning_rate=0.01", "output.file_precision=fp32", "output.sample_every=1000",
        "output.validate_every=1000", "output.sample_prompts=['{trigger}']", "data.caption_dropout=0.0",
    ]  # fmt: skip
    return settle(parse_set([*base, *settings]))


def run(config: TrainConfig, folder: Path, **named: Any) -> list[Event]:
    return list(train(config, folder=folder, **named))


def vectors_in(file: Path) -> dict[str, torch.Tensor]:
    (word,) = read_adapter(file).words
    return dict(word.vectors)


KEYS = {
    "sd1": ["bundle_emb.sks.string_to_param.*"],
    "sdxl": ["bundle_emb.sks.clip_g", "bundle_emb.sks.clip_l"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_word_is_learned_saved_and_understood(
    family: str, place: Path, models: dict[str, Model], tmp_path: Path
) -> None:
    config = config_for(place, family, "prior.weight=0.5", "prior.images=1", "prior.steps=1", "training.ema=0.5")
    events = run(config, tmp_path)
    step = next(event for event in events if isinstance(event, Step))
    assert step.learning_rates["embedding"] == pytest.approx(0.01)
    file = tmp_path / "adapter.safetensors"
    assert sorted(key for key in load_file(file) if key.startswith("bundle")) == KEYS[family]
    model = models[family]
    for part, start in word_of(model, "sks", "red bear").vectors.items():
        moved = (vectors_in(file)[part] - start).abs().max()
        assert 1e-4 < moved < 0.1
    assert not read_adapter(file).unmatched
    words_taken = tmp_path / "plain.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "bundle" not in k}, words_taken)
    drawn = [generate(model, "a sks", adapters=[path], steps=2)[0].tobytes() for path in (file, words_taken)]
    assert drawn[0] != drawn[1] and model.speech is None
    easel = Easel(model)
    easel.put([(file, 0.7)])
    assert model.speech is not None
    easel.put([(file, 0.0)])
    assert model.speech is None, "a strength of 0 is absence"
    with apply_adapter(model, file) as applied:
        assert applied.words == ["sks"] and model.speech is not None
    assert model.speech is None
    started = next(event for event in events if isinstance(event, Started))
    assert 0.4 < file.stat().st_size / started.file_bytes < 2.0


def test_a_word_begins_as_what_the_model_reads_in_it_or_as_other_words(place: Path, models: dict[str, Model]) -> None:
    model = models["sdxl"]
    captions = ["a photo of sks toy"]
    pieces = len(model.tokenizers[0]("sks", add_special_tokens=False).input_ids)
    for words, vectors, reads_as in (("", pieces, "sks"), ("dog", 3, "dog dog dog"), ("dog car red", 2, "dog car")):
        config = config_for(place, "sdxl", f"embedding.words='{words}'", f"embedding.vectors={vectors}")
        plain = encode(model, [captions[0].replace("sks", reads_as)])
        word = new_word(model, config)
        assert word is not None and word.count == vectors
        with spoken(model, [word]):
            assert is_equal(encode(model, captions), plain)


@pytest.mark.parametrize(
    "settings", [("training.optimizer=prodigy", "training.learning_rate=1.0"), ("training.ema=0.9",)]
)
def test_a_run_with_a_word_resumes_bit_for_bit(settings: Sequence[str], place: Path, tmp_path: Path) -> None:
    config = config_for(place, "sd1", *settings, "training.steps=8", "output.checkpoint_every=3")
    for event in train(config, folder=tmp_path / "cut"):
        if isinstance(event, Step) and event.step == 5:
            break
    run(config, tmp_path / "cut", resume=True)
    run(config, tmp_path / "whole")
    whole, cut = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "cut"))
    assert "bundle_emb.sks.string_to_param.*" in whole
    assert all(torch.equal(tensor, cut[key]) for key, tensor in whole.items())


def test_gradient_checkpointing_and_accumulation_learn_the_same_word(place: Path, tmp_path: Path) -> None:
    same = [
        "training.optimizer=sgd",
        "training.learning_rate=0.1",
        "training.steps=2",
        "targets.text_encoder=attention",
    ]
    run(config_for(place, "sdxl", *same, "training.batch=2"), tmp_path / "plain")
    checkpointed = ["training.gradient_checkpointing=true", "training.batch=2"]
    run(config_for(place, "sdxl", *same, *checkpointed), tmp_path / "checkpointed")
    run(config_for(place, "sdxl", *same, "training.accumulation=2"), tmp_path / "accumulated")
    plain = vectors_in(tmp_path / "plain" / "adapter.safetensors")
    for other in ("checkpointed", "accumulated"):
        for part, vectors in vectors_in(tmp_path / other / "adapter.safetensors").items():
            torch.testing.assert_close(vectors, plain[part], rtol=1e-4, atol=1e-6)


def test_a_word_is_trained_on_from_an_adapter(place: Path, file: Path, tmp_path: Path) -> None:
    events = run(
        config_for(place, "sd1", f"training.start_from='{file}'", "embedding.vectors=5", "training.steps=1",
                   "embedding.learning_rate=1e-6"),
        tmp_path / "two",
    )  # fmt: skip
    assert any("has 2 vectors, as in the adapter" in e.message for e in events if isinstance(e, Warned))
    torch.testing.assert_close(
        vectors_in(tmp_path / "two" / "adapter.safetensors")["te1"], vectors_in(file)["te1"], rtol=0, atol=2e-6
    )
    for wrong in ("embedding.vectors=0", "data.trigger=other"):
        with pytest.raises(UserError, match='has learned the word "sks"'):
            run(config_for(place, "sd1", f"training.start_from='{file}'", wrong), tmp_path / "three")


def test_what_cannot_be_learned_is_told(place: Path, tmp_path: Path) -> None:
    for settings, words in (
        (("data.trigger=''",), "no trigger word to learn"),
        (("data.trigger='v1.5'",), "has a dot"),
        (("data.trigger=toy",), "also used for the class"),
        (("data.caption_template='a toy'", f"data.images=['{place / 'pictures' / '1.png'}']"), "No caption has"),
    ):
        with pytest.raises(UserError, match=words):
            run(config_for(place, "sd1", *settings), tmp_path)


def test_on_the_bundled_model_all_of_it_goes_together(tmp_path: Path) -> None:
    config = settle(parse_set([
        f"data.images='{ASSETS / 'examples' / 'teddy'}'", "data.trigger=sks", "data.class_word=toy", "training.steps=1",
        "model.precision=fp32", "embedding.vectors=2", "targets.unet=['unet.mid_block*']", "model.zero_terminal_snr=true",
        "output.sample_prompts=['a 3d icon of {trigger}']", "output.validate_every=100", "training.warmup=0.0",
        "training.optimizer=adamw_schedulefree", "training.learning_rate=1e-3", "adapter.rank=3",
        f"training.start_from='{tmp_path / 'start.safetensors'}'",
    ]))  # fmt: skip
    model = load_model("starter", dtype=torch.float32)
    word = random_word(model, "sks", width=192)
    fresh = config.model_copy(update={"training": config.training.model_copy(update={"start_from": ""})})
    adapters = build_adapters(model.parts, plan_run(model, fresh), seed=0)
    write_adapter(tmp_path / "start.safetensors", adapters, parts=model.parts, family="sd1", words=[word])
    events = run(config, tmp_path / "run")
    first, last = (tmp_path / "run" / event.path for event in events if isinstance(event, Sampled))
    assert first.read_bytes() != last.read_bytes(), "previews see the word and the average"
    file = tmp_path / "run" / "adapter.safetensors"
    header = read_adapter(file).metadata
    assert (header["ss_zero_terminal_snr"], header["ss_optimizer"]) == ("True", "adamw_schedulefree")
    assert header["reparam_started_from"].startswith("start.safetensors ")
    moved = (vectors_in(file)["te1"] - word.vectors["te1"]).abs().max()
    assert 0 < moved < 0.01


# --- files -----------------------------------------------------------------------------------------------------------
def test_a_word_for_other_text_encoders_is_left_out_with_the_reason(
    file: Path, models: dict[str, Model], tmp_path: Path
) -> None:
    tensors = load_file(file)
    strange = {"bundle_emb.x.clip_l": torch.randn(2, 768), "bundle_emb.y.other": torch.randn(2, 16)}
    save_file(tensors | strange, tmp_path / "strange.safetensors")
    with apply_adapter(models["sd1"], tmp_path / "strange.safetensors") as applied:
        assert applied.words == ["sks"]
        told = dict(applied.unmatched)
    assert told["bundle_emb.x"] == "its vectors have 768 numbers, this model's text encoders read 16"
    assert "not known" in told["bundle_emb.y.other"]


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_the_word_by_itself_as_we_do(
    family: str, models: dict[str, Model], place: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    model = models[family]
    word = random_word(model, "sks", 2)
    file = write_embedding(tmp_path / "sks.safetensors", word, model.family)
    pipe = DiffusionPipeline.from_pretrained(place / family)
    if family == "sd1":
        pipe.load_textual_inversion(str(file))
    else:
        tensors = load_file(file)
        pipe.load_textual_inversion(
            tensors["clip_l"], token="sks", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
        )
        pipe.load_textual_inversion(
            tensors["clip_g"], token="sks", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )
    with spoken(model, [word]), torch.no_grad():
        ours = encode(model, ["a photo of sks"])
    theirs = pipe.encode_prompt(
        "a photo of sks", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(ours.hidden, theirs[0], rtol=1e-5, atol=1e-5)
    if family == "sdxl":
        torch.testing.assert_close(ours.pooled, theirs[2], rtol=1e-5, atol=1e-5)


def test_a_word_goes_along_through_export_blend_doctor_and_bake(
    file: Path, models: dict[str, Model], tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_file(load_file(file) | {"bundle_emb.sks.string_to_param.*": torch.ones(2, 16)}, other)
    exact, model = vectors_in(file)["te1"], models["sd1"]

    def made(steps: Iterator[Any]) -> Any:
        return list(steps)[-1]

    for target in get_args(Target):
        out = tmp_path / (target if target == "peft" else f"{target}.safetensors")
        done = made(export_adapter(file, out, parts=model.parts, family="sd1", target=target, precision="fp32"))
        keeps_it = target in ("lycoris", "a1111")
        assert bool(read_adapter(out).words) == keeps_it
        assert [reading for reading in done.readings if reading.program.startswith("LyCORIS")] == (
            [] if not keeps_it else [done.readings[0]]
        )
        beside = tmp_path / f"{target}-embedding.safetensors"
        assert beside.is_file() == (target != "lycoris")
        if beside.is_file():
            assert torch.equal(load_file(beside)["sks"], exact) and beside.name in " ".join(done.notes)
        if keeps_it:
            assert torch.equal(vectors_in(out)["te1"], exact) and done.readings[0].agrees
    made(blend_files([Source(file, 0.5)], tmp_path / "half.safetensors", model=model, precision="fp32"))
    assert torch.equal(vectors_in(tmp_path / "half.safetensors")["te1"], exact), "a word has no strength"
    with pytest.raises(UserError, match="Two adapters bring the word"):
        made(blend_files([Source(file), Source(other)], tmp_path / "both.safetensors", model=model))
    with pytest.raises(UserError, match="Two adapters bring the word"):
        generate(model, "sks", adapters=[file, other], steps=1)
    assert model.speech is None
    found = diagnose(file, model)
    assert found.words == {"sks": 2} and not found.left_out
    assert {v.program: v.opens for v in found.verdicts} == dict.fromkeys(PROGRAMS, False) | {"A1111": True}
    made(repair(file, tmp_path / "mended.safetensors", model=model, precision="fp32"))
    assert torch.equal(vectors_in(tmp_path / "mended.safetensors")["te1"], exact)
    assert report_of(file)["words"] == {"sks": 2}
    assert "Learned   sks (2 vectors)" in report_lines(report_of(file))
    made(bake(model, [Source(file)], tmp_path / "baked", precision="fp32"))
    assert torch.equal(load_file(tmp_path / "baked-embedding.safetensors")["sks"], exact)


def test_the_memory_told_has_the_way_through_the_text_encoders(place: Path) -> None:
    family = "sd1"
    base, frozen = outline(place / family), config_for(place, family, "embedding.vectors=0")
    needed = {vectors: count_memory(base, config_for(place, family, f"embedding.vectors={vectors}"), "cpu").training
              for vectors in (1, 2)}  # fmt: skip
    plain = count_memory(base, frozen, "cpu").training
    numbers = 16 * len(base.text_encoders)
    assert needed[2] - needed[1] >= 3 * 4 * numbers, "the vector and its two averages in fp32"
    assert needed[1] - plain > 50 * 32 * numbers, "the activations that lead back to it"
    assert not base.text_encoders[0]._forward_pre_hooks
