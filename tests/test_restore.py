"""Images of other programs give back what they were made from; what is not used becomes a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.image_metadata import read_metadata
from reparam_diffusion.gallery.infotext import read_infotext
from reparam_diffusion.gallery.recipe import MOST_ADAPTERS, Use, make_recipe
from reparam_diffusion.gallery.restore import Restored, find_scheduler
from reparam_diffusion.models.lora_tags import parse_tags

IMAGE = Image.new("RGB", (16, 16), "teal")
LINE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, Model: foo, Version: v1.10.1"


def png(tmp_path: Path, **chunks: str) -> Restored:
    """What an image with these texts gives back."""
    note = PngInfo()
    for key, text in chunks.items():
        note.add_text(key.replace("__", "-"), text)
    IMAGE.save(tmp_path / "image.png", pnginfo=note)
    return read_metadata(tmp_path / "image.png")


# --- A1111's tags ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tag", "use", "unused"),
    [
        ("lora:t", (1.0, None), ""),
        ("lora:t:0.8", (0.8, None), ""),
        ("lora:t:0.3:1", (1.0, 0.3), ""),  # the first number is the text encoder's
        ("lora:t:0.5:0.5", (0.5, None), ""),
        ("lora:t:te=0.5:unet=0.8", (0.8, 0.5), ""),
        ("lora:t:te=0.5", (0.5, None), ""),  # A1111: the UNet follows the text encoder
        ("lora:t:unet=0.8", (0.8, 1.0), ""),
        ("lora:t:0.4:unet=0.8", (0.8, 0.4), ""),
        ("LYCO:t:0.3:1", (1.0, 0.3), ""),
        ("lora:t:1:lbw=IN02", (1.0, None), "lbw=IN02"),
        ("lora:t:0.25:1:lbw=0.25,0,0,1", (1.0, 0.25), "lbw=0.25,0,0,1"),
        ("lora:t:1:MIDD", (1.0, None), "MIDD"),
        ("lora:t:1:0,0,0,1,1,1", (1.0, None), "0,0,0,1,1,1"),
        ("lora:t:1:stop=0.5:start=3", (1.0, None), "stop=0.5, start=3"),
        ("lora:t:1:1:4", (1.0, None), "4"),
        ("lora:t:1:dyn=4", (1.0, None), "dyn=4"),
        ("lora: t : 0.3 : 1 ", (1.0, 0.3), ""),
    ],
)
def test_a_tag_means_what_it_means_in_a1111(tag: str, use: tuple[float, float | None], unused: str) -> None:
    for is_restored in (False, True):
        found = parse_tags(f"a <{tag}> cat", is_restored=is_restored)
        assert found.text == "a cat"
        assert [(one.name, one.strength, one.text_strength) for one in found.tags] == [("t", *use)]
        assert (unused in found.notes[0]) if unused else not found.notes


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("lora:t:0,8", "decimal comma"),
        ("lora:t:1:0,8", "decimal comma"),
        ("lora:t:te=0,8", "decimal comma"),
        ("lora:t:abc", "not a number"),
        ("lora:t:nan", "not a number"),
        ("lora:t:te=inf", "not a number"),
        ("lora::1", "names no adapter"),
    ],
)
def test_a_wrong_tag_is_an_error_when_typed_and_a_note_when_restored(tag: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_recipe({"prompt": f"a <{tag}> cat"})
    back = read_infotext(f"a <{tag}> cat\n{LINE}")
    assert back.recipe.prompt == "a cat" and back.notes


def test_notes_of_a_typed_prompt_are_given_out() -> None:
    notes: list[str] = []
    recipe = make_recipe({"prompt": "a <lora:t:1:lbw=X> <hypernet:h:1> cat"}, note=notes.append)
    assert recipe.adapters == (Use(name="t"),) and len(notes) == 2


# --- A1111's text ----------------------------------------------------------------------------------------------------
def test_lines_after_the_settings_do_no_harm() -> None:
    text = f"a red cat\nNegative prompt: bad\n{LINE}\nTemplate: a {{red|blue}} cat\nNegative Template: bad"
    recipe = read_infotext(text).recipe
    assert (recipe.prompt, recipe.negative, recipe.seed, recipe.steps) == ("a red cat", "bad", 1, 20)


@pytest.mark.parametrize(
    ("settings", "values", "noted"),
    [
        ("Steps: 99999999, Seed: 1, Size: 1x1", {"steps": None, "width": None, "seed": 1}, "Steps"),
        ("Steps: 20, Seed: -1, CFG scale: nan", {"guidance": None, "steps": 20}, "Seed"),
        ("Steps: 20, Seed: 1, CFG scale: inf", {"guidance": None}, "CFG scale"),
        ("Steps: 1e3, Seed: 0x10", {"steps": None, "seed": 0}, "Seed"),
        ("Steps: 20, Seed: 1, Size: 4x" + "9" * 5000, {"width": None, "height": None}, "Height"),
        ("Steps: 20, Seed: 1, Clip skip: 99", {"clip_skip": 0}, "Clip skip"),
        ("Steps: 20, Seed: 1, Sampler: DPM++ SDE Karras", {"scheduler": ""}, "DPM++ SDE Karras"),
        ("Steps: 20, Seed: 1, Denoising strength: 0.7, Mask blur: 4", {"image": ""}, "another image"),
        ("Steps: 20, Seed: 1, Hires upscale: 2, ADetailer model: x", {}, "ADetailer, hires fix"),
    ],
)
def test_one_value_that_cannot_be_used_leaves_the_rest(settings: str, values: dict[str, Any], noted: str) -> None:
    back = read_infotext(f"a cat\n{settings}")
    assert back.recipe.prompt == "a cat"
    assert {key: getattr(back.recipe, key) for key in values} == values
    assert any(noted in note for note in back.notes)


@pytest.mark.parametrize(
    "line",
    [
        "Steps: 20, Size: 512x768, Sampler: Euler a, Seed: 7, CFG scale: 6.5, App: SD.Next, Version: abc",
        "Steps: 20| Size: 512x768| Sampler: Euler a| Seed: 7| CFG scale: 6.5| App: SD.Next",
        "Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 6.5, Seed: 7, Size: 512x768, "
        'Version: f2.0.1v1.10.1, Module 1: "a, b", Civitai resources: [{"type":"checkpoint","Seed":"x"}]',
        "Steps: 20, Sampler: Euler a, Guidance Scale: 6.5, Seed: 7, Size: 512x768",
    ],
)
def test_spellings_of_forge_and_sdnext(line: str) -> None:
    recipe = read_infotext(f"a cat\nNegative prompt: bad\n{line}").recipe
    assert (recipe.prompt, recipe.negative) == ("a cat", "bad")
    assert (recipe.steps, recipe.seed, recipe.guidance, recipe.scheduler) == (20, 7, 6.5, "Euler a")
    assert (recipe.width, recipe.height) == (512, 768)


def test_more_adapters_than_a_recipe_takes_are_said() -> None:
    tags = "".join(f"<lora:n{n}:0.1>" for n in range(MOST_ADAPTERS + 3))
    back = read_infotext(f"a cat {tags}\n{LINE}")
    assert len(back.recipe.adapters) == MOST_ADAPTERS
    assert any(str(MOST_ADAPTERS + 3) in note for note in back.notes)


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_jpeg_and_webp_carry_it_in_exif(tmp_path: Path, order: str, ending: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\x00" + f"a cät <lora:x:0.3:1>\n{LINE}".encode(order)
    IMAGE.save(tmp_path / f"image.{ending}", exif=exif)
    recipe = read_metadata(tmp_path / f"image.{ending}").recipe
    assert (recipe.prompt, recipe.seed) == ("a cät", 1)
    assert recipe.adapters == (Use(name="x", strength=1.0, te_strength=0.3),)


@pytest.mark.parametrize(
    ("sampler", "schedule", "name"),
    [
        ("DPM++ 2M", "Karras", "DPM++ 2M Karras"), ("DPM++ 2M Karras", "", "DPM++ 2M Karras"),
        ("dpmpp_2m", "karras", "DPM++ 2M Karras"), ("dpmpp_2m_k", "", "DPM++ 2M Karras"), ("dpmpp_2m", "normal", "DPM++ 2M"),
        ("euler_ancestral", "normal", "Euler a"), ("k_euler_ancestral", "", "Euler a"), ("euler_a", "", "Euler a"),
        ("EulerAncestralDiscreteScheduler", "", "Euler a"), ("uni_pc", "simple", "UniPC"), ("ddim", "", "DDIM"),
        ("dpmpp_2m_sde", "karras", "DPM++ 2M SDE Karras"), ("heun", "", "Heun"), ("LMS", "", ""), (None, None, ""),
    ],
)  # fmt: skip
def test_samplers_of_other_programs(sampler: str | None, schedule: str | None, name: str) -> None:
    assert find_scheduler(sampler, schedule) == (name, "" if name or not sampler else find_scheduler(sampler)[1])


# --- ComfyUI ---------------------------------------------------------------------------------------------------------
GRAPH = {
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15\\dream.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {
            "lora_name": "sub/one.safetensors", "strength_model": 0.8, "strength_clip": 0.4,
            "model": ["4", 0], "clip": ["4", 1],
        },
    },
    "11": {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"lora_name": "two.safetensors", "strength_model": 0.5, "model": ["10", 0]},
    },
    "12": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["20", 0], "clip": ["12", 0]}},
    "20": {"class_type": "PrimitiveString", "inputs": {"value": "a red cat"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad", "clip": ["12", 0]}},
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 42, "steps": 25, "cfg": 6.5, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1,
            "model": ["11", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
    },
}  # fmt: skip


def test_comfyui_gives_prompt_settings_model_and_loras(tmp_path: Path) -> None:
    recipe = png(tmp_path, prompt=json.dumps(GRAPH), workflow="{}").recipe
    assert (recipe.prompt, recipe.negative) == ("a red cat", "bad")
    assert (recipe.seed, recipe.steps, recipe.guidance, recipe.scheduler) == (42, 25, 6.5, "DPM++ 2M Karras")
    assert (recipe.width, recipe.height, recipe.clip_skip, recipe.model) == (512, 768, 1, "dream")
    assert recipe.adapters == (Use(name="one", strength=0.8, te_strength=0.4), Use(name="two", strength=0.5))


def test_comfyui_custom_sampling_and_controlnet_are_followed(tmp_path: Path) -> None:
    graph = {
        **{key: node for key, node in GRAPH.items() if key != "3"},
        "30": {"class_type": "RandomNoise", "inputs": {"noise_seed": 7}},
        "31": {"class_type": "BasicScheduler", "inputs": {"steps": 12, "scheduler": "normal", "model": ["4", 0]}},
        "32": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "35": {
            "class_type": "ControlNetApplyAdvanced",
            "inputs": {"positive": ["6", 0], "negative": ["7", 0], "strength": 1.0},
        },
        "33": {
            "class_type": "CFGGuider",
            "inputs": {"cfg": 3, "positive": ["35", 0], "negative": ["35", 1], "model": ["4", 0]},
        },
        "34": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["30", 0], "guider": ["33", 0], "sampler": ["32", 0], "sigmas": ["31", 0],
                "latent_image": ["5", 0],
            },
        },
    }  # fmt: skip
    recipe = png(tmp_path, prompt=json.dumps(graph)).recipe
    assert (recipe.prompt, recipe.negative, recipe.model) == ("a red cat", "bad", "dream")
    assert (recipe.seed, recipe.steps, recipe.guidance, recipe.scheduler) == (7, 12, 3, "Euler")


def test_comfyui_workflow_alone_is_read(tmp_path: Path) -> None:
    workflow = {
        "nodes": [
            {"id": 4, "type": "CheckpointLoaderSimple", "widgets_values": ["dream.safetensors"]},
            {"id": 5, "type": "EmptyLatentImage", "widgets_values": [512, 768, 1]},
            {"id": 6, "type": "CLIPTextEncode", "widgets_values": ["a red cat"]},
            {"id": 7, "type": "CLIPTextEncode", "widgets_values": ["bad"]},
            {
                "id": 3,
                "type": "KSampler",
                "inputs": [
                    {"name": "model", "link": 1},
                    {"name": "positive", "link": 2},
                    {"name": "negative", "link": 3},
                    {"name": "latent_image", "link": 4},
                ],
                "widgets_values": [42, "randomize", 25, 6.5, "euler", "normal", 1],
            },
        ],
        "links": [[1, 4, 0, 3, 0, "MODEL"], [2, 6, 0, 3, 1, "C"], [3, 7, 0, 3, 2, "C"], [4, 5, 0, 3, 3, "LATENT"]],
    }
    recipe = png(tmp_path, workflow=json.dumps(workflow)).recipe
    assert (recipe.prompt, recipe.negative, recipe.seed, recipe.steps) == ("a red cat", "bad", 42, 25)
    assert (recipe.width, recipe.height, recipe.model, recipe.scheduler) == (512, 768, "dream", "Euler")


@pytest.mark.parametrize(
    "chunks",
    [
        {"prompt": "{}"},
        {"prompt": "{"},
        {"prompt": "[]", "workflow": "[]"},
        {"workflow": '{"nodes": [], "links": []}'},
        {"workflow": '{"nodes": 3, "links": [[1]]}'},
        {"prompt": json.dumps({"3": {"class_type": "KSampler", "inputs": {"positive": ["3", 0], "seed": ["3", 0]}}})},
        {"prompt": json.dumps({"3": {"class_type": "KSampler", "inputs": {"positive": ["9", 0]}}, "4": 5})},
        {"prompt": '{"a":' * 5000},
        {"invokeai_metadata": "[1]"},
        {"invokeai_metadata": "{"},
        {"invokeai_metadata": '{"seed": 1}'},
        {"parameters": '{"sui_image_params": {"seed": 1}}'},
        {"Comment": '{"prompt": {"a": 1}}'},
    ],
)
def test_what_cannot_be_read_is_a_sentence(tmp_path: Path, chunks: dict[str, str]) -> None:
    with pytest.raises(UserError):
        png(tmp_path, **chunks)


# --- JSON of other programs ------------------------------------------------------------------------------------------
INVOKE = {
    "positive_prompt": "a red cat", "negative_prompt": "bad", "width": 512, "height": 768, "seed": 7, "steps": 30,
    "cfg_scale": 6.5, "scheduler": "dpmpp_2m_k", "clip_skip": 1, "model": {"key": "x", "name": "dream", "base": "sd-1"},
    "loras": [{"model": {"key": "y", "name": "one"}, "weight": 0.6}], "generation_mode": "txt2img",
}  # fmt: skip


@pytest.mark.parametrize(
    "chunks",
    [
        {"invokeai_metadata": json.dumps(INVOKE)},
        {
            "parameters": json.dumps(
                {
                    "sui_image_params": {
                        "prompt": "a red cat", "negativeprompt": "bad", "model": "sub/dream.safetensors", "seed": 7,
                        "steps": 30, "cfgscale": 6.5, "width": 512, "height": 768, "sampler": "dpmpp_2m",
                        "loras": ["one"], "loraweights": ["0.6"],
                    }
                }
            )
        },
        {
            "fooocus_scheme": json.dumps(
                {
                    "prompt": "a red cat", "negative_prompt": "bad", "steps": 30, "resolution": "(512, 768)",
                    "guidance_scale": 6.5, "base_model": "dream", "seed": "7", "sampler": "dpmpp_2m_sde",
                    "loras": [["one", 0.6, "hash"]],
                }
            )
        },
    ],
)  # fmt: skip
def test_json_of_other_programs(tmp_path: Path, chunks: dict[str, str]) -> None:
    recipe = png(tmp_path, **chunks).recipe
    assert (recipe.prompt, recipe.negative, recipe.seed, recipe.steps) == ("a red cat", "bad", 7, 30)
    assert (recipe.width, recipe.height, recipe.guidance, recipe.model) == (512, 768, 6.5, "dream")
    assert recipe.adapters == (Use(name="one", strength=0.6),)
    assert recipe.scheduler.startswith("DPM++ 2M")


def test_old_invokeai_and_novelai(tmp_path: Path) -> None:
    old = {
        "model_weights": "sd15",
        "image": {
            "prompt": [{"prompt": "a red cat", "weight": 1}], "steps": 30, "cfg_scale": 7, "seed": 9, "width": 512,
            "height": 512, "sampler": "k_euler_a",
        },
    }  # fmt: skip
    recipe = png(tmp_path, sd__metadata=json.dumps(old)).recipe
    assert (recipe.prompt, recipe.seed, recipe.scheduler) == ("a red cat", 9, "Euler a")
    comment = {"prompt": "a red cat", "uc": "bad", "steps": 28, "scale": 5, "seed": 3, "sampler": "k_euler"}
    recipe = png(tmp_path, Comment=json.dumps(comment)).recipe
    assert (recipe.negative, recipe.guidance, recipe.scheduler) == ("bad", 5, "Euler")
