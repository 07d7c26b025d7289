"""One path for settings: layers settle into a total config, mistakes carry their place, the file reads back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from drawn import specs
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reparam_diffusion.adapters import METHODS, Spec
from reparam_diffusion.config import (
    PRESETS,
    Rule,
    TrainConfig,
    find_preset,
    parse_set,
    read_settings,
    settle,
    spec_of,
    to_toml,
)
from reparam_diffusion.errors import UserError


def test_no_layers_give_the_defaults() -> None:
    assert settle() == TrainConfig()


def test_later_layers_win_key_by_key() -> None:
    config = settle({"training": {"steps": 10, "batch": 2}}, {"training": {"steps": 20}}, {"data": {"trigger": "sks"}})
    assert (config.training.steps, config.training.batch, config.data.trigger) == (20, 2, "sks")


def test_a_change_of_method_starts_its_settings_afresh() -> None:
    config = settle({"adapter": {"rank": 4, "dropout": 0.1}}, {"adapter": {"method": "loha"}})
    assert config.adapter == METHODS["loha"].spec()
    config = settle({"adapter": {"method": "loha", "rank": 4}}, {"adapter": {"method": "loha", "alpha": 2.0}})
    assert config.adapter == spec_of("loha", rank=4, alpha=2.0)
    config = settle({"adapter": {"method": "loha"}}, {"adapter": {"rank": 3}})
    assert config.adapter == spec_of("loha", rank=3)


def test_layers_are_left_as_they_were() -> None:
    layer = {"adapter": {"method": "loha"}, "training": {"steps": 3}}
    settle(layer, {"training": {"steps": 4}, "adapter": {"rank": 2}})
    assert layer == {"adapter": {"method": "loha"}, "training": {"steps": 3}}


def ruled(**rule) -> dict:
    return {"targets": {"rules": [rule]}}


@pytest.mark.parametrize(
    ("given", "place", "words"),
    [
        ({"adapter": {"rank": 0}}, "adapter.rank", "adapter.rank must be at least 1, not 0."),
        ({"adapter": {"rank": 2.5}}, "adapter.rank", "must be a whole number"),
        ({"adapter": {"method": "loha", "rank": "many"}}, "adapter.rank", "must be a whole number, not 'many'"),
        ({"adapter": {"rnak": 3}}, "adapter.rnak", 'Did you mean "rank"?'),
        ({"adapter": {"method": "lokr", "facter": 3}}, "adapter.facter", 'Did you mean "factor"?'),
        ({"adapter": {"method": "lora2"}}, "adapter.method", 'Did you mean "lora"?'),
        ({"adapter": 5}, "adapter", "must be a group of settings"),
        ({"training": {"step": 3}}, "training.step", 'Did you mean "steps"?'),
        ({"trainin": {"steps": 3}}, "trainin", 'Did you mean "training"?'),
        ({"training": 5}, "training", "must be a group of settings"),
        ({"training": {"optimizer": "tiger"}}, "training.optimizer", "must be one of 'adamw'"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate", "must be more than 0"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate", "not nan"),
        ({"training": {"betas": [0.9]}}, "training.betas.1", "must be given"),
        ({"data": {"trigger": 2024}}, "data.trigger", "must be text, in quotes, not 2024"),
        ({"data": {"images": 7}}, "data.images", "must be text, in quotes"),
        ({"data": {"flip": "perhaps"}}, "data.flip", "must be true or false"),
        ({"schema_version": 2}, "schema_version", "must be one of 1"),
        (ruled(match="*", adapter={"method": "loha", "rank": 0}), "targets.rules.0.adapter.rank", "at least 1"),
        (ruled(match="*", adapter={"method": "lokr", "fcator": 1}), "targets.rules.0.adapter.fcator", '"factor"'),
        (ruled(mach="*", adapter={"method": "lokr"}), "targets.rules.0.match", "must be given"),
    ],
)
def test_a_mistake_carries_its_place(given: dict, place: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        settle(given)
    assert caught.value.place == place
    assert words in str(caught.value)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        settle().training.steps = 3


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


@given(data=st.data(), texts=st.lists(TEXT, min_size=3, max_size=3), flip=st.booleans())
def test_the_file_reads_back_equal(data: st.DataObject, texts: list[str], flip: bool) -> None:
    one, two, three = (data.draw(specs(data.draw(st.sampled_from(tuple(METHODS))))) for _ in range(3))
    config = settle(
        {
            "title": texts[0],
            "adapter": one.model_dump(),
            "data": {
                "trigger": texts[1],
                "images": data.draw(st.sampled_from(("a", ["a.png", "b c.png"]))),
                "flip": flip,
            },
            "targets": {
                "unet": data.draw(st.sampled_from(("all", ["unet.*.attn2.*"]))),
                "rules": [{"match": f"unet.{n}*", "adapter": each.model_dump()} for n, each in enumerate((two, three))],
            },
            "output": {"sample_prompts": texts},
            "training": {"betas": (0.5, 0.75), "learning_rate": 3e-5},
        }
    )
    text = to_toml(config)
    assert settle(tomllib.loads(text)) == config
    assert to_toml(settle(tomllib.loads(text))) == text


def test_the_file_explains_every_setting() -> None:
    text = to_toml(settle({"targets": {"rules": []}}))
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert "# Rank of the update. Higher learns more and makes a larger file." in comments
    groups = (name for name, field in TrainConfig.model_fields.items() if hasattr(field.annotation, "model_fields"))
    for group in groups:
        for name, field in TrainConfig.model_fields[group].annotation.model_fields.items():
            assert field.description, f"{group}.{name}"
            assert f"# {field.description}" in comments


def test_rules_are_settings_too() -> None:
    rule = settle({"targets": {"rules": [{"match": "te1.*", "adapter": {"method": "oft"}}]}}).targets.rules[0]
    assert rule == Rule(match="te1.*", adapter=METHODS["oft"].spec())
    assert isinstance(rule.adapter, Spec)


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["adapter.rank=8"], {"adapter": {"rank": 8}}),
        (["adapter.rank = 8", "adapter.alpha=2.5"], {"adapter": {"rank": 8, "alpha": 2.5}}),
        (["data.flip=true"], {"data": {"flip": True}}),
        (["data.trigger=sks"], {"data": {"trigger": "sks"}}),
        (['data.trigger="true"'], {"data": {"trigger": "true"}}),
        (["data.images=C:\\my pictures=new"], {"data": {"images": "C:\\my pictures=new"}}),
        (
            ['targets.unet=["unet.*.attn2.*", "unet.conv_in"]'],
            {"targets": {"unet": ["unet.*.attn2.*", "unet.conv_in"]}},
        ),
        (["training.learning_rate=1e-3"], {"training": {"learning_rate": 1e-3}}),
        (["data.trigger="], {"data": {"trigger": ""}}),
        ([], {}),
    ],
)
def test_assignments_become_overrides(words: list[str], overrides: dict) -> None:
    assert parse_set(words) == overrides


@pytest.mark.parametrize(
    "words", [["adapter.rank"], ["=3"], ["adapter=3", "adapter.rank=3"], ["adapter.rank=3\nbatch=2"]]
)
def test_an_assignment_that_sets_nothing_is_told(words: list[str]) -> None:
    with pytest.raises(UserError):
        settle(parse_set(words))


def test_a_settings_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_settings(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("rank = = 3", encoding="utf-8")
    with pytest.raises(UserError, match="not TOML"):
        read_settings(tmp_path / "bad.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        read_settings(tmp_path / "bytes.toml")


def test_a_config_file_is_a_preset(tmp_path: Path) -> None:
    config = settle({"adapter": {"method": "oft"}, "training": {"steps": 7}})
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert settle(find_preset(str(tmp_path / "config.toml"))) == config


def test_a_preset_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match="no preset called"):
        find_preset("no-such-preset")


@pytest.mark.parametrize("file", sorted(PRESETS.glob("*.toml")), ids=lambda file: file.stem)
def test_every_preset_settles(file: Path) -> None:
    config = settle(find_preset(file.stem))
    assert config.title
    assert config.about


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_settings_file_may_have_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes('[data]\ntrigger = "bär"\n'.encode(encoding))
    assert read_settings(file) == {"data": {"trigger": "bär"}}


def test_a_settings_file_in_another_encoding_is_refused_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes('[data]\ntrigger = "bär"\n'.encode("cp1252"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_settings(file)
