"""Whole Stable Diffusion models in a folder, tiny and random, for end-to-end tests: 32-pixel pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "assets" / "starter-model" / "tokenizer"


def save_tiny(folder: Path, family: str, *, prediction: str = "epsilon", zero_snr: bool = False) -> Path:
    """A model of a family ("sd1" or "sdxl") in diffusers layout."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=2048,
        max_position_embeddings=32, projection_dim=16, bos_token_id=2046, eos_token_id=2047, pad_token_id=2047,
    )  # fmt: skip
    is_xl = family == "sdxl"
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        cross_attention_dim=32 if is_xl else 16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **({"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True,
            "projection_class_embeddings_input_dim": 16 + 24} if is_xl else {}),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        prediction_type=prediction, rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    parts = {
        "unet": unet,
        "vae": vae,
        "scheduler": scheduler,
        "text_encoder": CLIPTextModel(text),
        "tokenizer": tokenizer,
    }
    if is_xl:
        pipe = StableDiffusionXLPipeline(
            **parts, text_encoder_2=CLIPTextModelWithProjection(text), tokenizer_2=tokenizer, add_watermarker=False
        )
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.save_pretrained(folder)
    return folder


def save_quick(folder: Path, family: str) -> Path:
    """The same, used to pictures in two steps, for tests whose runs are about something else than previews."""
    save_tiny(folder, family)
    (folder / "habits.json").write_text('{"steps": 2}', encoding="utf-8")
    return folder


def save_pictures(folder: Path, *, count: int = 3, size: tuple[int, int] = (40, 40)) -> Path:
    """Plain pictures that differ, with a caption beside the first."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        Image.new("RGB", size, (40 * n % 256, 90, 200 - 20 * n % 200)).save(folder / f"{n}.png")
    (folder / "0.txt").write_text("a photo of sks toy, red, small", encoding="utf-8")
    return folder


def copy_pictures(source: Path, target: Path) -> Path:
    """A copy of a folder of pictures that a test may change."""
    shutil.copytree(source, target)
    return target
