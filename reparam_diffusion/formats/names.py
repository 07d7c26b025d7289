"""How a layer is called: on a live model, in kohya-style files, and in the original (LDM, SGM) layout.

A live site is "<part>.<module path>" with part "unet", "te1" or "te2". A file's canonical name is the part and the
path with "." written as "_" and a leading `text_model.` left out, since transformers has it in some models only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

Family = Literal["sd1", "sd2", "sdxl"]
Parts = Mapping[str, nn.Module]

CARRIERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
"""Modules that a file may change. Norm layers are read, not trained."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_OUTER_BACK = {ldm.replace(".", "_"): ours.replace(".", "_") for ours, ldm in _OUTER.items()}
_RESNET_BACK = {ldm.replace(".", "_"): ours for ours, ldm in _RESNET.items()}


@dataclass(frozen=True)
class Layout:
    """How a UNet's blocks are counted: resnets in each down and up block, and which up blocks have attention."""

    down: tuple[int, ...] = (2, 2, 2, 2)
    up: tuple[int, ...] = (3, 3, 3, 3)
    up_attention: tuple[bool, ...] = (False, True, True, True)

    @classmethod
    def of(cls, paths: Iterable[str]) -> Layout:
        """The layout that a live UNet's module paths show."""
        down: dict[int, int] = {}
        up: dict[int, int] = {}
        attention: set[int] = set()
        for path in paths:
            found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", path)
            if found is None:
                continue
            side, block, kind, number = found[1], int(found[2]), found[3], int(found[4])
            counts = down if side == "down" else up
            if kind == "resnets":
                counts[block] = max(counts.get(block, 0), number + 1)
            elif side == "up":
                attention.add(block)
        return cls(
            down=tuple(down.get(block, 0) for block in range(max(down, default=-1) + 1)),
            up=tuple(up.get(block, 0) for block in range(max(up, default=-1) + 1)),
            up_attention=tuple(block in attention for block in range(max(up, default=-1) + 1)),
        )

    def input_number(self, block: int, layer: int) -> int:
        """N in input_blocks.N for a layer of a down block; the layer after the last is the downsampler."""
        return 1 + sum(count + 1 for count in self.down[:block]) + layer

    def output_number(self, block: int, layer: int) -> int:
        """N in output_blocks.N for a layer of an up block; the upsampler sits with the last layer."""
        return sum(self.up[:block]) + layer


STANDARD = Layout()


def ldm_path(path: str, layout: Layout) -> str | None:
    """The LDM (SGM) path of a diffusers UNet path, or None for what LDM has no name for."""
    if path in _OUTER:
        return _OUTER[path]
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", path):
        number = 2 * int(found[2]) + (found[1] == "attentions")
        return _inner(f"middle_block.{number}", found[1], found[3], place="")
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", path):
        block = int(found[1])
        return f"input_blocks.{layout.input_number(block, layout.down[block])}.0.op"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", path):
        block = int(found[1])
        place = 2 if layout.up_attention[block] else 1
        return f"output_blocks.{layout.output_number(block, layout.up[block] - 1)}.{place}.conv"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", path):
        number, layer = int(found[2]), int(found[4])
        if found[1] == "down":
            start = f"input_blocks.{layout.input_number(number, layer)}"
        else:
            start = f"output_blocks.{layout.output_number(number, layer)}"
        return _inner(start, found[3], found[5], place=".0" if found[3] == "resnets" else ".1")
    return None


def _inner(start: str, kind: str, rest: str, *, place: str) -> str | None:
    """The end of an LDM path: resnets rename what is inside them, attention does not."""
    if kind == "attentions":
        return f"{start}{place}.{rest}"
    return f"{start}{place}.{_RESNET[rest]}" if rest in _RESNET else None


def diffusers_name(flat: str, layers: int = 2) -> str:
    """A flat LDM name as the flat diffusers name, for files read without a model; any other name as it is.

    `layers` is the UNet's layers_per_block, 2 in every Stable Diffusion model.
    """
    if flat in _OUTER_BACK:
        return _OUTER_BACK[flat]
    if found := re.fullmatch(r"middle_block_(\d+)_(.+)", flat):
        number = int(found[1])
        kind = "attentions" if number % 2 else "resnets"
        return f"mid_block_{kind}_{number // 2}_{_RESNET_BACK.get(found[2], found[2])}"
    if found := re.fullmatch(r"input_blocks_(\d+)_([01])_(.+)", flat):
        block, layer = divmod(int(found[1]) - 1, layers + 1)
        if layer == layers:  # only a downsampler can stand here; anything else is of another layout
            return f"down_blocks_{block}_downsamplers_0_conv" if found[3] == "op" else flat
        return _block(f"down_blocks_{block}", layer, found[2], found[3])
    if found := re.fullmatch(r"output_blocks_(\d+)_([012])_(.+)", flat):
        block, layer = divmod(int(found[1]), layers + 1)
        if found[3] == "conv" and found[2] != "0":
            return f"up_blocks_{block}_upsamplers_0_conv"
        return _block(f"up_blocks_{block}", layer, found[2], found[3])
    return flat


def _block(start: str, layer: int, place: str, rest: str) -> str:
    if place == "0":
        return f"{start}_resnets_{layer}_{_RESNET_BACK.get(rest, rest)}"
    return f"{start}_attentions_{layer}_{rest}"


def canonical(site: str) -> str:
    """A live site's canonical name: "te1.text_model.encoder.layers.0.mlp.fc1" -> "te1.encoder_layers_0_mlp_fc1"."""
    part, _, path = site.partition(".")
    return f"{part}.{flat_name(path)}"


def flat_name(path: str) -> str:
    """A module path or a kohya-style name, flat and without a leading text_model."""
    return path.replace(".", "_").removeprefix("text_model_")


def kohya_key(site: str, *, family: Family, layout: Layout = STANDARD) -> str:
    """The name of a live site in a kohya-style file, without its leaf.

    SD1 and SD2 keep diffusers names; SDXL has LDM names. Text encoder names always have text_model_ in them.
    """
    part, _, path = site.partition(".")
    if part == "unet":
        name = ldm_path(path, layout) if family == "sdxl" else None
        return f"lora_unet_{(name or path).replace('.', '_')}"
    prefix = {"te1": "lora_te1_" if family == "sdxl" else "lora_te_", "te2": "lora_te2_"}[part]
    flat = flat_name(path)
    return f"{prefix}{flat}" if flat == "text_projection" else f"{prefix}text_model_{flat}"


def spellings(parts: Parts) -> dict[str, str]:
    """Every accepted "<part>.<flat name>" -> the live site, for all layers of a model that a file may change."""
    table: dict[str, str] = {}
    for part, model in parts.items():
        paths = [path for path, module in model.named_modules() if isinstance(module, CARRIERS)]
        layout = Layout.of(paths)
        for path in paths:
            site = f"{part}.{path}"
            names = {flat_name(path)}
            if part == "unet" and (ldm := ldm_path(path, layout)) is not None:
                names.add(ldm.replace(".", "_"))
            for name in names:
                other = table.setdefault(f"{part}.{name}", site)
                assert other == site, f"{site} and {other} have one flat name"
    return table


def layout_of(parts: Parts) -> Layout:
    """The layout of the model's UNet; the standard one where there is none."""
    unet = parts.get("unet")
    return STANDARD if unet is None else Layout.of(path for path, _ in unet.named_modules())


def module_at(parts: Parts, site: str) -> nn.Module:
    """The module of a live site."""
    part, _, path = site.partition(".")
    return parts[part].get_submodule(path)
