"""A file's tensor name -> which part, which layer, and which piece of an adapter it is; no model needed.

Covers kohya and LyCORIS ("lora_unet_….lora_up.weight"), PEFT ("base_model.model.…", with any adapter's name), diffusers
old and new ("unet.….lora_A.weight", "….processor.to_q_lora.up.weight"), "diffusion_model.…", OneTrainer ("clip_l.…")
and the original layout ("conditioner.embedders.0.transformer.…", OpenCLIP's names included).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from reparam_diffusion.formats.names import flat_name

_PREFIXES = {
    "lora_unet": "unet",
    "oft_unet": "unet",
    "lora_transformer": "unet",
    "lora_te": "te1",
    "lora_te1": "te1",
    "lora_te2": "te2",
    "lycoris": "",
}
_DOTTED = {
    "unet.": "unet",
    "text_encoder_2.": "te2",
    "text_encoder_1.": "te1",
    "text_encoder_3.": "te3",
    "text_encoder.": "te1",
    "text_encoders.clip_l.": "te1",
    "text_encoders.clip_g.": "te2",
    "text_encoders.clip_h.": "te1",
    "text_encoders.": "te3",
    "clip_l.": "te1",
    "clip_g.": "te2",
    "clip_h.": "te1",
    "t5xxl.": "te3",
    "te.": "te1",
    "te1.": "te1",
    "te2.": "te2",
    "te3.": "te3",
    "conditioner.embedders.0.": "te1",
    "conditioner.embedders.1.": "te2",
    "cond_stage_model.": "te1",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "transformer.": "",
}
"""How dotted names begin -> the part; "transformer." is diffusers' for other families, and CLIP's own wrapper."""
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")
"""What PEFT, distributed training and torch.compile put before a model's own names."""
_TEXT_WRAPPERS = ("transformer.", "model.")
_OPEN_CLIP = {
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
_TEXT_STARTS = ("text_model.", "encoder.layers.", "text_projection", "final_layer_norm", "transformer.text_model.")

LEAVES = {
    "lora_down.weight": "lora_down.weight",
    "lora_A.weight": "lora_down.weight",
    "lora.down.weight": "lora_down.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_up.weight": "lora_up.weight",
    "lora_B.weight": "lora_up.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_B.bias": "lora_up.bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
"""Other spellings of a leaf -> the one that adapters read."""

_LORA = ("lora_mid.weight", "alpha", "scalar", "dora_scale", "lora_A", "lora_E", "lora_B", "bias_scale", "init_rank")
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_OFT = ("oft_blocks", "rescale", "oft_diag", "oft_R.weight", "oft_R_channels.weight", "oft_terms", "oft_eps")
_OTHER = ("boft_R", "boft_s", "ia3_l", "weight", "on_input", "a1.weight", "a2.weight", "b1.weight", "b2.weight")
_WHOLE = ("bm.weight", "diff", "diff_b", "w_norm", "b_norm")
KNOWN = frozenset(LEAVES.values()) | frozenset(_LORA + _HADA + _LOKR + _OFT + _OTHER + _WHOLE)
"""Every leaf that some adapter form reads."""

_PEFT_HEADS = frozenset(
    ("lora_A", "lora_B", "lora_E", "lora_magnitude_vector", "oft_R", "boft_R", "boft_s", "ia3_l", *_HADA, *_LOKR)
)
"""PEFT's parameters, after which its keys may have the adapter's own name."""

THIRD_TEXT = "it is for a third text encoder, which Stable Diffusion 1, 2 and XL lack"
FUSED_TEXT = "it changes query, key and value of a text encoder as one matrix, and its name alone does not part them"

NO_NAME = "its name is none that adapter files use"


LONGEST_NAME = 400
"""Characters; a real layer's name has up to about 130."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def short(text: str, most: int = 120) -> str:
    """Text out of a file for a message: of bounded length, on one line, without what a terminal would obey."""
    text = _CONTROL.sub("\ufffd", text[: 4 * most])
    return text if len(text) <= most else f"{text[: most - 1]}…"


@dataclass(frozen=True)
class Key:
    """Where one tensor belongs. `flat` may still be an LDM name; `path` is dotted where the file has dots."""

    part: str
    flat: str
    leaf: str
    path: str
    is_dotted: bool


def parse_key(key: str, *, part: str = "") -> Key | str:
    """The Key of a tensor's name, or a plain sentence why it is none. `part` is what the file's folder says."""
    if len(key) > LONGEST_NAME:
        return f"its name is {len(key)} characters long, which no layer's is"
    if _CONTROL.search(key):
        return "its name has control characters in it"
    prefix = re.match(r"(lora_unet|oft_unet|lora_transformer|lora_te[12]?|lycoris)_.", key)
    if prefix is not None:
        return _kohya(key, prefix[1])
    if key.startswith("lora_te3_"):
        return THIRD_TEXT
    if key.startswith("bundle_emb."):
        return "it is a textual inversion packed into the file, no layer"
    return _dotted(key, part)


def _kohya(key: str, prefix: str) -> Key | str:
    name, dot, leaf = key.partition(".")
    if not dot:
        return "it has a layer's name but no piece of an adapter after it"
    flat = flat_name(name[len(prefix) + 1 :])
    part = _PREFIXES[prefix] or ("te1" if flat.startswith(("encoder_layers_", "text_projection")) else "unet")
    return Key(part, flat, LEAVES.get(leaf, leaf), flat, is_dotted=False)


def adapter_name(key: str) -> str:
    """The adapter's own name in a PEFT key: "style" in "….lora_A.style.weight"; empty where there is none."""
    words = key.split(".")
    place = next((at for at in range(len(words) - 1, 0, -1) if words[at] in _PEFT_HEADS), None)
    after = [] if place is None else words[place + 1 :]
    if len(after) == 2 and after[1] in ("weight", "bias"):
        return after[0]
    return after[0] if len(after) == 1 and after[0] not in ("weight", "bias") else ""


def _dotted(key: str, part: str) -> Key | str:
    name = adapter_name(key)
    rest = key if not name else ".".join(_without_last(key.split("."), name))
    rest = rest.replace(".default", "", 1) if ".default." in rest or rest.endswith(".default") else rest
    rest = _unwrapped(rest)
    for start, named in _DOTTED.items():
        if rest.startswith(start):
            part, rest = part or named, _unwrapped(rest[len(start) :])
            break
    if part == "te3":
        return THIRD_TEXT
    if part in ("te1", "te2"):
        rest = _text_path(rest)
    if ".attn.in_proj" in rest and "resblocks." in rest:
        return FUSED_TEXT
    words = rest.split(".")
    old = len(words) > 3 and words[-3].endswith("_lora") and words[-2] in ("up", "down") and words[-1] == "weight"
    if old:
        return _old(words, part)
    for count in (3, 2, 1):
        tail = ".".join(words[-count:])
        leaf = LEAVES.get(tail, tail)
        if leaf in KNOWN and leaf != "weight" and len(words) > count:
            path = ".".join(words[:-count])
            return Key(part or _guess_part(path), flat_name(path), leaf, path, is_dotted=True)
    return NO_NAME


def _without_last(words: list[str], name: str) -> list[str]:
    place = len(words) - 1 - words[::-1].index(name)
    return words[:place] + words[place + 1 :]


def _unwrapped(rest: str) -> str:
    """A name without what wrappers put before it."""
    while start := next((one for one in _WRAPPERS if rest.startswith(one)), ""):
        rest = rest[len(start) :]
    return rest


def _text_path(rest: str) -> str:
    """A text encoder's layer under transformers' name, whichever program's it had."""
    while rest.startswith(_TEXT_WRAPPERS) and not rest.startswith("transformer.resblocks."):
        rest = rest.partition(".")[2]
    found = re.match(r"(?:transformer\.)?resblocks\.(\d+)\.(.+)$", rest)
    if found is None:
        return rest
    for theirs, ours in _OPEN_CLIP.items():
        if found[2].startswith(f"{theirs}."):
            return f"text_model.encoder.layers.{found[1]}.{ours}{found[2][len(theirs) :]}"
    return rest


def _old(words: list[str], part: str) -> Key:
    """diffusers before 0.20: "….attn1.processor.to_q_lora.up.weight"."""
    path = [word for word in words[:-3] if word != "processor"]
    last = words[-3].removesuffix("_lora")
    part = part or _guess_part(".".join(path))
    if part == "unet":
        path.append("to_out.0" if last == "to_out" else last)
    else:
        path.append({"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}.get(last, last))
    dotted = ".".join(path)
    return Key(part, flat_name(dotted), f"lora_{words[-2]}.weight", dotted, is_dotted=True)


def _guess_part(path: str) -> str:
    return "te1" if path.startswith(_TEXT_STARTS) else "unet"
