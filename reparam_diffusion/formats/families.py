"""Which base model family an adapter file is for: what its header says, and what its layers' names and shapes show."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Leaves = Mapping[str, Tensor]
Sides = tuple[int | None, int | None]
"""The outputs and the inputs of a layer, as far as its adapter's tensors show them."""

UNKNOWN = "unknown"


@dataclass(frozen=True)
class OtherFamily:
    """A family that adapters are made for: its title, how headers call it, and how its layers are called."""

    title: str
    header: str
    """A pattern in a header's words, in lower case."""
    names: str = ""
    """A pattern that the flat name of a layer matches, from its start."""


FAMILY_TITLES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd1-or-sd2": "Stable Diffusion 1.x or 2.x",
}
USABLE = ("sd1", "sd2", "sdxl")
"""Families that this program has; the others are named only."""

OTHERS = {
    "chroma": OtherFamily("Chroma", r"chroma", r"distilled_guidance_layer_"),
    "flux2": OtherFamily(
        "FLUX.2",
        r"flux[._ -]?2|klein",
        r"(double|single)_stream_modulation|single_transformer_blocks_\d+_attn_to_qkv_mlp",
    ),
    "flux1": OtherFamily("FLUX.1", r"flux"),
    "sd3": OtherFamily("Stable Diffusion 3", r"sd[._ -]?v?3|stable-diffusion-v?3", r"joint_blocks_\d+_"),
    "wan": OtherFamily(
        "Wan",
        r"\bwan",
        r"blocks_\d+_((self|cross)_attn_(q|k|v|o|k_img|v_img)|ffn_(0|2)|ffn_net_.*|attn[12]_to_[qkv])$",
    ),
    "hunyuan-video": OtherFamily(
        "HunyuanVideo", r"hunyuan", r"txt_in_individual_token_refiner|(double|single)_blocks_\d+_(img|txt)_mlp_fc\d"
    ),
    "z-image": OtherFamily("Z-Image", r"z[_-]?image"),
    "lumina2": OtherFamily("Lumina 2", r"lumina"),
    "qwen-image": OtherFamily("Qwen-Image", r"qwen", r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_"),
    "krea2": OtherFamily("Krea 2", r"krea[._ -]?2|\bkrea", r"txtfusion_|blocks_\d+_attn_(wq|wk|wv|wo|gate)$"),
    "anima": OtherFamily(
        "Anima",
        r"anima\b",
        r"llm_adapter_|blocks_\d+_((self|cross)_attn_(q|k|v|output)_proj|adaln_modulation_|mlp_layer\d)",
    ),
    "pixart": OtherFamily("PixArt", r"pixart", r"caption_projection_"),
    "sana": OtherFamily("Sana", r"\bsana"),
    "ltx-video": OtherFamily("LTX-Video", r"\bltx"),
    "auraflow": OtherFamily("AuraFlow", r"auraflow|aura-flow", r"joint_transformer_blocks_\d+_"),
    "hidream": OtherFamily("HiDream", r"hidream", r"(double|single)_stream_blocks_\d+_"),
    "cosmos": OtherFamily("Cosmos", r"cosmos"),
    "kolors": OtherFamily("Kolors", r"kolors"),
    "cascade": OtherFamily("Stable Cascade", r"cascade"),
    "transformer": OtherFamily("a transformer model, which one is not said", r"(?!)"),
}
"""Families that adapters exist for and that this program has not. The first pattern that matches a header counts."""
FAMILY_TITLES |= {name: family.title for name, family in OTHERS.items()}

_SAYS = ("ss_base_model_version", "modelspec.architecture", "base_model_class")
_MODULES = {"flux": "flux1", "sd3": "sd3", "wan": "wan", "zimage": "z-image", "qwen": "qwen-image", "lumina": "lumina2",
            "hunyuan": "hunyuan-video", "anima": "anima", "chroma": "chroma"}  # fmt: skip
"""Words in kohya's and musubi's `ss_network_module`."""


def is_other(family: str) -> bool:
    """Whether it is a family that this program cannot use."""
    return family in OTHERS


def family_in_header(metadata: Mapping[str, str]) -> str:
    """The family that a header names; "unknown" where it names none."""
    said = " ".join(metadata.get(key, "")[:200] for key in _SAYS).lower()
    module = metadata.get("ss_network_module", "")[:200].lower()
    if re.search(r"sdxl|stable-diffusion-xl|sd_xl", said):
        return "sdxl"
    for family, other in OTHERS.items():
        if re.search(other.header, said):
            return family
    for word, family in _MODULES.items():
        if word in module:
            return family
    if metadata.get("ss_v2") == "True" or re.search(r"\bsd[._ -]?v?2|stable-diffusion-v?2", said):
        return "sd2"
    if re.search(r"\bsd[._ -]?v?1|stable-diffusion-v?1", said):
        return "sd1"
    return UNKNOWN


def families_by_layers(layers: Mapping[str, Leaves], keys: Iterable[str] = ()) -> tuple[str, ...]:
    """The families whose layers these can be, the likeliest first; empty where names and shapes decide nothing.

    `layers` are by canonical flat name ("unet.…", "te1.…"), `keys` the names that the file itself has.
    """
    names = [name.partition(".")[2] for name in layers if name.startswith("unet.")]
    sides = {name: layer_sides(leaves) for name, leaves in layers.items()}
    return _transformer(names, sides) or _stable_diffusion(sides, layers, tuple(keys))


def _transformer(names: Sequence[str], sides: Mapping[str, Sides]) -> tuple[str, ...]:
    for rule in (_named, _flux_like, _joint, _lumina_like, _plain_blocks):
        if found := rule(names, sides):
            return found
    return ()


def _named(names: Sequence[str], sides: Mapping[str, Sides]) -> tuple[str, ...]:
    """Names that only one family has."""
    for family, other in OTHERS.items():
        if other.names and any(re.match(other.names, name) for name in names):
            return (family,)
    return ()


_FLUX_TELLING = r"(double|single)_blocks_\d+_(img_attn_qkv|linear1|img_mlp_0|txt_mlp_0)$"
"""Layers of which the widths tell FLUX.2 from FLUX.1."""


def _flux_like(names: Sequence[str], sides: Mapping[str, Sides]) -> tuple[str, ...]:
    """FLUX, Chroma and HunyuanVideo share names; the widths of the feed-forward tell FLUX.2 from the rest."""
    mine = [name for name in names if re.match(r"(double_blocks|single_blocks|single_transformer_blocks)_\d+_", name)]
    for name in mine:
        out, width = sides[f"unet.{name}"]
        if not out or not width or not re.match(_FLUX_TELLING, name):
            continue
        if width in (4096, 6144) or out == 9 * width or (out == 6 * width and "mlp" in name):
            return ("flux2",)
    return ("flux1", "chroma", "hunyuan-video", "flux2") if mine else ()


def _joint(names: Sequence[str], sides: Mapping[str, Sides]) -> tuple[str, ...]:
    """diffusers' blocks over text and image: Stable Diffusion 3, FLUX.1 and Qwen-Image."""
    mine = [name for name in names if re.match(r"transformer_blocks_\d+_(attn_(add_|to_)|ff_context_)", name)]
    widths = {side for name in mine for side in sides[f"unet.{name}"] if side}
    if not mine:
        return ()
    if widths & {1536, 2432}:
        return ("sd3",)
    if any(int(name.split("_")[2]) >= 38 for name in mine):
        return ("qwen-image",)
    return ("transformer", "flux1", "sd3", "qwen-image", "flux2", "chroma")


def _lumina_like(names: Sequence[str], sides: Mapping[str, Sides]) -> tuple[str, ...]:
    mine = [name for name in names if re.match(r"(layers|noise_refiner|context_refiner)_\d+_", name)]
    widths = {side for name in mine for side in sides[f"unet.{name}"] if side}
    if not mine:
        return ()
    if 2304 in widths:
        return ("lumina2",)
    return ("z-image", "lumina2")


def _plain_blocks(names: Sequence[str], sides: Mapping[str, Sides]) -> tuple[str, ...]:
    """Blocks that stand alone, without the down, mid and up of a UNet."""
    mine = [name for name in names if re.match(r"(transformer_)?blocks_\d+_", name)]
    widths = {side for name in mine for side in sides[f"unet.{name}"] if side}
    if not mine:
        return ()
    if 1152 in widths:
        return ("pixart",)
    if 2240 in widths:
        return ("sana",)
    return ("transformer", *(name for name in OTHERS if name != "transformer"))


def _stable_diffusion(sides: Mapping[str, Sides], layers: Mapping[str, Leaves], keys: Sequence[str]) -> tuple[str, ...]:
    """What a UNet's or CLIP's widths show. Only widths of the real models count, so that small models stay unknown."""
    for name, (out, width) in sides.items():
        if re.search(r"attn2_to_[kv]$", name) and width in (768, 1024, 2048) and (out is None or out % 320 == 0):
            return {768: ("sd1",), 1024: ("sd2",), 2048: ("sdxl", "kolors")}[width]
    texts = {part: _widths(sides, f"{part}.encoder_layers_") for part in ("te1", "te2")}
    if 1280 in texts["te2"]:
        return ("sdxl", "sd3")
    if 1024 in texts["te1"] and 768 not in texts["te1"]:
        return ("sd2",)
    unet = _unet_shape(sides, layers)
    if unet:
        return unet
    if 768 in texts["te1"] and not any(name.startswith("unet.") for name in sides):
        is_single = any(re.match(r"lora_te_|text_encoder\.|cond_stage_model\.", key) for key in keys)
        return ("sd1", "sdxl", "flux1", "sd3") if is_single else ()
    return ()


def _widths(sides: Mapping[str, Sides], start: str) -> set[int]:
    return {side for name, both in sides.items() if name.startswith(start) for side in both if side}


def _unet_shape(sides: Mapping[str, Sides], layers: Mapping[str, Leaves]) -> tuple[str, ...]:
    """Blocks that only one kind of UNet has."""
    old = False
    for name, both in sides.items():
        if not any(side and side % 320 == 0 for side in both):
            continue
        deep = re.search(r"transformer_blocks_(\d+)_", name)
        if (deep and int(deep[1]) >= 1) or name.startswith(("unet.add_embedding", "unet.up_blocks_0_attentions")):
            return ("sdxl", "kolors")
        old = old or name.startswith(("unet.down_blocks_0_attentions", "unet.down_blocks_3", "unet.up_blocks_3"))
    if not old:
        return ()
    for name, leaves in layers.items():
        if re.search(r"attentions_\d+_proj_(in|out)$", name) and "lora_down.weight" in leaves:
            return ("sd1",) if leaves["lora_down.weight"].ndim == 4 else ("sd2",)
    return ("sd1-or-sd2", "sd1", "sd2")


# --- the sides of a layer --------------------------------------------------------------------------------------------
def layer_sides(leaves: Leaves) -> Sides:
    """The layer's outputs and inputs (channels), as far as an adapter's tensors show them."""
    for leaf, rule in _SIDES.items():
        if leaf in leaves:
            try:
                return rule(leaves)
            except (KeyError, IndexError, ValueError, ZeroDivisionError):
                return None, None  # of a shape that no writer makes: it shows nothing
    return None, None


def _pair(up: str, down: str) -> Callable[[Leaves], Sides]:
    return lambda leaves: (leaves[up].shape[0], leaves[down].shape[1])


def _kronecker(leaves: Leaves) -> Sides:
    small = leaves.get("lokr_w1")
    left = small.shape if small is not None else (leaves["lokr_w1_a"].shape[0], leaves["lokr_w1_b"].shape[1])
    if "lokr_t2" in leaves:
        right: Sequence[int] = (leaves["lokr_w2_a"].shape[1], leaves["lokr_w2_b"].shape[1])
    elif "lokr_w2" in leaves:
        right = leaves["lokr_w2"].shape
    else:
        right = (leaves["lokr_w2_a"].shape[0], leaves["lokr_w2_b"].shape[1])
    return left[0] * right[0], left[1] * right[1]


def _gain(leaves: Leaves) -> Sides:
    leaf = "weight" if "weight" in leaves else "ia3_l"
    count = leaves[leaf].numel()
    on_input = bool(leaves["on_input"].any()) if "on_input" in leaves else leaves[leaf].shape[0] == 1
    return (None, count) if on_input else (count, None)


def _rotation(leaves: Leaves) -> Sides:
    blocks = leaves["oft_blocks"]
    if blocks.ndim == 4:
        return blocks.shape[1] * blocks.shape[2], None
    return blocks.shape[0] * blocks.shape[1], None


def _input_rotation(leaves: Leaves) -> Sides:
    triangle = next(leaves[name] for name in ("oft_R.weight", "oft_R_channels.weight") if name in leaves)
    size = round((1 + (1 + 8 * triangle.shape[1]) ** 0.5) / 2)
    return None, triangle.shape[0] * size


_SIDES: dict[str, Callable[[Leaves], Sides]] = {
    "lora_down.weight": _pair("lora_up.weight", "lora_down.weight"),
    "lora_A": _pair("lora_B", "lora_A"),
    "hada_t1": lambda leaves: (leaves["hada_w1_a"].shape[1], leaves["hada_w1_b"].shape[1]),
    "hada_w1_b": _pair("hada_w1_a", "hada_w1_b"),
    "lokr_w1": _kronecker,
    "lokr_w1_a": _kronecker,
    "oft_blocks": _rotation,
    "oft_R.weight": _input_rotation,
    "oft_R_channels.weight": _input_rotation,
    "on_input": _gain,
    "ia3_l": _gain,
    "diff": lambda leaves: (leaves["diff"].shape[0], leaves["diff"].shape[1]),
    "b1.weight": lambda leaves: (max(leaves["b1.weight"].shape), None),
}
