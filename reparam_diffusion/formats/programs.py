"""Which programs open which file rightly: what was measured and read in their code, as one table.

The tests of this library run LyCORIS, PEFT and diffusers (docs/formats.md says which versions); A1111, ComfyUI and
kohya's own networks are told from their readers. `readers` applies it to one file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

PROGRAMS = ("LyCORIS", "A1111", "ComfyUI", "diffusers", "kohya")
_NOTHING = "finds nothing"
_LORA_ONLY = {"diffusers": "refuses it", "kohya": "ignores it"}

UNKNOWN_FORM = "another method"
FORMS: dict[str, dict[str, str]] = {
    "lora": {"kohya": "ignores layers outside attention and resnets"},
    "lora, Tucker": {"diffusers": "refuses it", "kohya": "refuses it"},
    "loha": _LORA_ONLY,
    "lokr": _LORA_ONLY,
    "lokr, Tucker": {"LyCORIS": "cannot read it", "ComfyUI": "loses these layers", **_LORA_ONLY},
    "oft": _LORA_ONLY,
    "oft, constrained": {"ComfyUI": "turns too little: it takes the constraint otherwise", **_LORA_ONLY},
    "oft, rescaled": {"ComfyUI": "leaves the scale out", **_LORA_ONLY},
    "boft": {"ComfyUI": "loses it without alpha, and takes a constraint otherwise", **_LORA_ONLY},
    "adalora": dict.fromkeys(PROGRAMS, "has no such form; export it as the LoRA it equals"),
    "full": _LORA_ONLY,
    "norm": {"ComfyUI": "knows those of the UNet only", **_LORA_ONLY},
    "ia3": {"LyCORIS": "cannot read it", "ComfyUI": "ignores it", **_LORA_ONLY},
    "glora": {"A1111": "cannot read it", **_LORA_ONLY},
    "weight decomposition on outputs": {
        "A1111": "takes it for inputs", "ComfyUI": "takes the wrong norm", "diffusers": "drops it",
        "kohya": "ignores it",
    },
    "weight decomposition on inputs": {"LyCORIS": "cannot read it", "diffusers": "drops it", "kohya": "ignores it"},
    "layers without alpha": {"LyCORIS": "cannot read it", "kohya": "takes the rank, as we do"},
    "a learned word": {
        "LyCORIS": "ignores the word", "ComfyUI": "ignores the word", "diffusers": "refuses it",
        "kohya": "ignores the word",
    },
    UNKNOWN_FORM: dict.fromkeys(PROGRAMS, "unknown: not measured for this method"),
    "alphas that differ": {"diffusers": "uses the commonest alpha in attention layers"},
}  # fmt: skip
"""What a file may hold -> what goes wrong in which program; a program that is not named reads it rightly."""

NAMES: dict[str, dict[str, str]] = {
    "kohya": {},
    "kohya, SGM": {"LyCORIS": "finds them on kohya's own UNet only"},
    "kohya, diffusers names on SDXL": {
        "A1111": "loses the added embedding and one upsampler", "diffusers": "loses the added embedding",
    },
    "kohya, SGM on SD 1 or 2": {"LyCORIS": _NOTHING, "diffusers": "refuses it", "kohya": _NOTHING},
    "lycoris_": {"A1111": _NOTHING, "diffusers": "refuses it", "kohya": _NOTHING},
    "oft_unet_": {"A1111": _NOTHING, "ComfyUI": _NOTHING, "LyCORIS": _NOTHING, "diffusers": "refuses it"},
    "dotted": {"A1111": _NOTHING, "ComfyUI": "loses attention layers", "LyCORIS": _NOTHING, "kohya": _NOTHING},
}  # fmt: skip
"""How a file calls its layers -> what goes wrong."""

STRENGTHS: dict[str, str] = {
    "oft": "At other strengths than 1, ComfyUI turns OFT by the square of the strength.",
    "oft, rescaled": "LyCORIS applies the scale of a rescaled OFT in full at any strength.",
    "weight decomposition on outputs": "At other strengths than 1, LyCORIS scales DoRA in its own way, not its change.",
}
"""What a file may hold -> what is not the same at strengths other than 1, at which every program agrees."""


@dataclass(frozen=True)
class Verdict:
    """Whether a program gives the change that the file holds, and if not, why. Nobody measured it: not `is_known`."""

    program: str
    opens: bool
    why: str
    is_known: bool = True

    @property
    def answer(self) -> str:
        """Yes, no, or unknown."""
        return ("yes" if self.opens else "no") if self.is_known else "unknown"


def markdown_table() -> str:
    """The table of docs/blending.md: what a file may hold, how it calls its layers, and what programs make of it."""
    lines = ["| in the file | " + " | ".join(PROGRAMS) + " |", "|---" * (len(PROGRAMS) + 1) + "|"]
    for what, row in FORMS.items():
        lines.append(f"| {what} | " + " | ".join(row.get(program, "yes") for program in PROGRAMS) + " |")
    for what, row in NAMES.items():
        lines.append(f"| names: {what} | " + " | ".join(row.get(program, "yes") for program in PROGRAMS) + " |")
    return "\n".join(lines)


def readers(traits: Iterable[str], names: str) -> list[Verdict]:
    """What every program makes of a file with these traits (keys of FORMS) and names (a key of NAMES)."""
    rows = [(trait, FORMS.get(trait, FORMS[UNKNOWN_FORM])) for trait in traits] + [
        (f"names of the kind {names}", NAMES[names])
    ]
    verdicts = []
    for program in PROGRAMS:
        troubles = [f"{what}: {row[program]}" for what, row in rows if program in row]
        fatal = [trouble for trouble in troubles if not _is_harmless(trouble)]
        # What is known to fail fails; only where nothing else stands against it does the unknown decide.
        is_known = not fatal or any("unknown: not measured" not in trouble for trouble in fatal)
        verdicts.append(Verdict(program, not fatal, "; ".join(troubles), is_known))
    return verdicts


def _is_harmless(trouble: str) -> bool:
    """What holds for few files, or does not change what the file does."""
    return trouble.startswith("lora: ") or trouble.endswith("as we do")


def traits_of(kind: str, leaves: Mapping[str, Tensor], outputs: int | None = None) -> set[str]:
    """What one layer's tensors have, as keys of FORMS. `outputs` is the layer's, which a constraint is measured by."""
    traits = {kind if kind in FORMS else UNKNOWN_FORM}
    if "lora_mid.weight" in leaves:
        traits = traits - {"lora"} | {"lora, Tucker"}
    if "lokr_t2" in leaves:
        traits = traits - {"lokr"} | {"lokr, Tucker"}
    if kind == "oft":
        if 0 < _number(leaves.get("alpha")) < 100:
            traits.add("oft, constrained")
        if "rescale" in leaves:
            traits.add("oft, rescaled")
    if "dora_scale" in leaves:
        scale = leaves["dora_scale"]
        on_inputs = scale.ndim > 1 and scale.shape[0] == 1 and scale.shape[1] != 1
        traits.add(f"weight decomposition on {'inputs' if on_inputs else 'outputs'}")
    if "alpha" not in leaves and kind in ("lora", "loha", "lokr", "oft", "boft"):
        traits.add("layers without alpha")
    return traits


def names_of(keys: Iterable[str], family: str) -> str:
    """How a file calls its layers, as a key of NAMES."""
    keys = list(keys)
    if any(key.startswith("lycoris_") for key in keys):
        return "lycoris_"
    if any(key.startswith("oft_unet_") for key in keys):
        return "oft_unet_"
    if not any(key.startswith("lora_") for key in keys):
        return "dotted"
    is_sgm = any(re.match(r"lora_unet_(input|middle|output)_block", key) for key in keys)
    has_unet = any(key.startswith("lora_unet_") for key in keys)
    if family == "sdxl":
        return "kohya, SGM" if is_sgm or not has_unet else "kohya, diffusers names on SDXL"
    return "kohya, SGM on SD 1 or 2" if is_sgm else "kohya"


def _number(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None or not tensor.numel() else float(tensor.float().reshape(-1)[0])
