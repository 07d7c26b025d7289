"""Laws of captions: templates, articles, tags and shared words."""

from __future__ import annotations

from pathlib import Path

import pytest

from reparam_diffusion.data.captions import caption_for, common_words, fill, shuffled, with_article
from reparam_diffusion.data.images import Picture
from reparam_diffusion.errors import UserError
from reparam_diffusion.maths.chance import generator


@pytest.mark.parametrize(
    ("template", "trigger", "class_word", "background", "caption"),
    [
        ("a 3d icon of {trigger} {class}", "sks", "toy", "", "a 3d icon of sks toy"),
        ("a 3d icon of {trigger} {class}", "", "toy", "", "a 3d icon of toy"),
        ("a photo of {a class}", "sks", "owl", "", "a photo of an owl"),
        ("{a class}, {trigger}, {background}", "", "toy", "", "a toy"),
        ("{trigger} , {class} .", "sks", "", "", "sks."),
        ("{class} on {background}", "", "toy", "a red table", "toy on a red table"),
        ("{ Trigger } {A CLASS}", "sks", "toy", "", "sks a toy"),
        ("no words at all", "sks", "toy", "", "no words at all"),
    ],
)
def test_a_template_is_filled_without_gaps(
    template: str, trigger: str, class_word: str, background: str, caption: str
) -> None:
    assert fill(template, trigger=trigger, class_word=class_word, background=background) == caption


def test_a_word_with_braces_or_backslashes_is_taken_as_it_is() -> None:
    assert fill("{trigger} {class}", trigger=r"a\1{class}", class_word="toy") == r"a\1{class} toy"


def test_an_unknown_placeholder_is_named() -> None:
    with pytest.raises(UserError, match=r"\{subject\}.*\{trigger\}, \{class\}, \{a class\}, \{background\}") as error:
        fill("a photo of {subject}", trigger="sks", class_word="toy")
    assert error.value.place == "data.caption_template"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("toy", "a toy"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("unusual cup", "an unusual cup"),
        ("utensil", "a utensil"),
        ("hourglass", "an hourglass"),
        ("house", "a house"),
        ("European car", "a European car"),
        ("one-eyed cat", "a one-eyed cat"),
        ("an apple", "an apple"),
        ("the moon", "the moon"),
        ("", ""),
    ],
)
def test_articles_follow_the_sound(words: str, expected: str) -> None:
    assert with_article(words) == expected


def test_a_pictures_own_caption_comes_before_the_template() -> None:
    def caption(own: str | None) -> str:
        picture = Picture(Path("a.png"), 64, 64, "hash", own)
        return caption_for(picture, template="a photo of {trigger} {class}", trigger="sks", class_word="toy")

    assert caption(None) == "a photo of sks toy"
    assert caption("my toy, {emphasis}") == "my toy, {emphasis}"
    assert caption("{trigger} {class}, {emphasis}") == "sks toy, {emphasis}"


def test_tags_are_shuffled_behind_those_that_stay() -> None:
    caption = "sks, a, b,, c , d, e, f"
    drawn = {shuffled(caption, 2, generator(0, step)) for step in range(20)}
    assert len(drawn) > 10
    for one in drawn:
        assert one.startswith("sks, a, ")
        assert sorted(one.split(", ")) == ["a", "b", "c", "d", "e", "f", "sks"]
    assert shuffled(caption, 2, generator(0, 1)) == shuffled(caption, 2, generator(0, 1))
    assert shuffled("a, b", 5, generator(0)) == "a, b"
    assert shuffled("", 1, generator(0)) == ""


def test_shared_words_are_those_in_every_caption() -> None:
    assert common_words(["A sks toy, on grass", "sks Toy in the sand", "the sks' toy"]) == ["sks", "toy"]
    assert common_words(["a toy"]) == []
    assert common_words([]) == []
