"""A file's tensor name -> which part, which layer, and which piece of an adapter it is; no model needed.

Covers kohya and LyCORIS ("lora_unet_….lora_up.weight"), PEFT ("base_model.model.…"), diffusers old and new
("unet.….lora_A.weight", "….processor.to_q_lora.up.weight") and "diffusion_model.…".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from reparam_diffusion.formats.names import flat_name

_PREFIXES = {
    "lora_unet": "unet",
    "oft_unet": "unet",
    "lora_te": "te1",
    "lora_te1": "te1",
    "lora_te2": "te2",
    "lycoris": "",
}
_DOTTED = {
    "unet.": "unet",
    "text_encoder_2.": "te2",
    "text_encoder.": "te1",
    "te1.": "te1",
    "te2.": "te2",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
}
_TEXT_STARTS = ("text_model.", "encoder.layers.", "text_projection", "final_layer_norm")

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

NO_NAME = "its name is none that adapter files use"


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
    prefix = re.match(r"(lora_unet|oft_unet|lora_te[12]?|lycoris)_.", key)
    if prefix is not None:
        return _kohya(key, prefix[1])
    if key.startswith("lora_te3_"):
        return "it is for a third text encoder, which Stable Diffusion 1, 2 and XL lack"
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


def _dotted(key: str, part: str) -> Key | str:
    rest = key.replace(".default", "", 1) if ".default." in key or key.endswith(".default") else key
    rest = rest.removeprefix("base_model.model.")
    for start, named in _DOTTED.items():
        if rest.startswith(start):
            part, rest = part or named, rest[len(start) :].removeprefix("base_model.model.")
            break
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
