"""Weights in prompts and prompts longer than the model reads; compel 2.5.1 does the weighing."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
from studio_tiny import FAST
from tiny_pipelines import save_tiny

from reparam_diffusion.apply import generate
from reparam_diffusion.errors import UserError
from reparam_diffusion.models import weighted
from reparam_diffusion.models.encode import encode
from reparam_diffusion.models.load import Model, load_model
from reparam_diffusion.models.weighted import encode_prompts, is_weighted, notes_on, parse, plain

LONG = "a 3d icon of a red apple on a light blue background, in soft light, with a leaf and a worm, very shiny"  # 32 tokens are read


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save_tiny(tmp_path_factory.mktemp("models") / request.param, request.param), device="cpu")


@pytest.fixture
def without_compel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighted, "has_compel", lambda: False)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a red apple", [[("a red apple", 1)]]),
        ("a (red:1.3) apple", [[("a", 1), ("red", 1.3), ("apple", 1)]]),
        ("a (red)1.3 apple", [[("a", 1), ("red", 1.3), ("apple", 1)]]),
        ("(red) ((blue)) [grey]", [[("red", 1.1), ("blue", 1.21), ("grey", 1 / 1.1)]]),
        ("red++ apple, (big house)-", [[("red", 1.21), ("apple,", 1), ("big house", 0.9)]]),
        ("(a (b:1.5) c:2)", [[("a", 2), ("b", 3), ("c", 2)]]),
        ("(a, b: .5), c", [[("a, b", 0.5), (", c", 1)]]),
        ("a \\(fate\\) series", [[("a (fate) series", 1)]]),
        ("open ( and [ or ) shut", [[("open ( and [ or ) shut", 1)]]),
        ("pre- and 1+1 t-shirt, 3:2", [[("pre- and 1+1 t-shirt, 3:2", 1)]]),
        ("a BREAK (b:0)", [[("a", 1)], [("b", 0)]]),
        ("", [[("", 1)]]),
    ],
)  # fmt: skip
def test_both_ways_to_write_a_weight_are_understood(prompt: str, parts: list[list[tuple[str, float]]]) -> None:
    found = parse(prompt)
    assert [[words for words, _ in part] for part in found] == [[words for words, _ in part] for part in parts]
    for part, expected in zip(found, parts, strict=True):
        assert [weight for _, weight in part] == pytest.approx([weight for _, weight in expected])
    assert is_weighted(prompt) == (len(parts) > 1 or any(weight != 1 for _, weight in parts[0]))
    assert not is_weighted(plain(prompt).replace("(", "").replace(")", ""))


def test_a_weight_below_zero_is_told() -> None:
    with pytest.raises(UserError, match="below 0"):
        parse("a (red:-1.5) apple")


def test_plain_prompts_are_encoded_as_ever_and_never_reach_compel(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weighted, "_hidden", None)
    prompts = ["a red apple, 3:2", "", "a (lonely bracket"]
    with torch.no_grad():
        ours, before = encode_prompts(model, prompts, clip_skip=1), encode(model, prompts, clip_skip=1)
    assert torch.equal(ours.hidden, before.hidden)
    assert (ours.pooled is None) == (before.pooled is None)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_a_weight_moves_its_own_words_away_from_the_empty_prompt(model: Model, clip_skip: int) -> None:
    with torch.no_grad():
        usual, empty = encode(model, ["a red apple", ""], clip_skip=clip_skip).hidden
        assert torch.equal(weighted._hidden(model, [[("a red apple", 1.0)]], clip_skip)[0], usual)
        ours = encode_prompts(model, ["a (red:1.3) apple"], clip_skip=clip_skip).hidden[0]
        weaker = encode_prompts(model, ["a (red:0.5) apple"], clip_skip=clip_skip).hidden[0]
    expected = usual.clone()
    expected[2] = empty[2] + 1.3 * (usual[2] - empty[2])  # start, a, red
    torch.testing.assert_close(ours, expected)
    assert torch.equal(weaker[:2], usual[:2]) and not torch.allclose(weaker[2:], usual[2:])


def test_a_long_prompt_is_read_to_its_end_and_the_negative_is_as_long(model: Model) -> None:
    room = model.tokenizers[0].model_max_length
    with torch.no_grad():
        ours = encode_prompts(model, [LONG, "blurry"])
        other = encode_prompts(model, [LONG.replace("shiny", "dull"), "blurry"])
        blurry, empty = encode(model, ["blurry", ""]).hidden
    assert ours.hidden.shape[1] == 2 * room
    assert torch.equal(ours.hidden[1], torch.cat([blurry, empty]))
    assert torch.equal(ours.hidden[0, :room], other.hidden[0, :room])
    assert not torch.allclose(ours.hidden[0, room:], other.hidden[0, room:])
    assert notes_on(model, LONG) == []
    with torch.no_grad():
        parts = encode_prompts(model, ["a red BREAK apple", ""]).hidden[0]
        assert torch.equal(parts, torch.cat(list(encode(model, ["a red", "apple"]).hidden)))


def test_weights_and_long_prompts_draw(model: Model) -> None:
    drawn = [generate(model, words, seed=1, **FAST)[0].tobytes() for words in ("a toy", "a (toy:1.4)", LONG)]
    assert len(set(drawn)) == 3


def test_without_compel_weights_are_left_out_and_that_is_told(model: Model, without_compel: None) -> None:
    with pytest.warns(UserWarning, match=r"weights in the prompt have no effect.*requirements-extras\.txt"):
        ours = generate(model, "a (toy:1.4)", seed=1, **FAST)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert ours.tobytes() == generate(model, "a toy", seed=1, **FAST)[0].tobytes()
    with pytest.warns(UserWarning, match="its end has no effect"):
        generate(model, LONG, seed=1, **FAST)


def test_captions_are_never_weighted(model: Model) -> None:
    with torch.no_grad():
        plain_words, brackets = encode(model, ["a red apple", "a (red:1.5) apple"]).hidden
    assert not torch.equal(plain_words, brackets)  # they are read letter by letter


def test_the_starter_reads_weights_too() -> None:
    model = load_model("starter", device="cpu")
    with torch.no_grad():
        ours = encode_prompts(model, ["a 3d icon of a (red:1.5) apple", ""]).hidden
        usual = encode(model, ["a 3d icon of a red apple", ""]).hidden
    changed = (ours - usual).abs().amax(-1) > 1e-6
    assert changed[0].sum() == 1 and not changed[1].any()


@pytest.mark.parametrize("words", ["[cat:dog:0.5]", "[dog:.3]", "[cat::10]", "[red|blue] toy"])
def test_words_that_would_change_while_drawing_are_told(model: Model, words: str) -> None:
    (note,) = notes_on(model, f"a {words} here", "[bad] things")
    assert words.partition("]")[0] in note and "does not change" in note
    (note,) = notes_on(model, "a [toy]", words)
    assert "in the negative prompt" in note


def test_plain_brackets_are_no_such_words_and_long_texts_are_looked_through_quickly(model: Model) -> None:
    assert notes_on(model, r"[dull] (red:1.3) a | b [one: two] \[a|b\]", "") == []
    begun = time.monotonic()
    for text in ("[" + "a|" * 9000, "[a:" + "1" * 18_000, "[" * 9000 + ":1" * 4000):
        weighted._CHANGING.search(text)
    assert time.monotonic() - begun < 2
