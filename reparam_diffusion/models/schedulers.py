"""How the noise is taken away: plain names, which are A1111's, for diffusers' schedulers."""

from __future__ import annotations

import inspect
from typing import Any

from reparam_diffusion.errors import UserError, unknown_name

_ZERO_SNR = "rescale_betas_zero_snr"
_DPM = {"solver_order": 2, "algorithm_type": "dpmsolver++"}
_SDE = {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # Any: each scheduler's own options
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {"use_karras_sigmas": False}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", _DPM | {"use_karras_sigmas": False}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", _DPM | {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", _SDE | {"use_karras_sigmas": False}),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", _SDE | {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {"use_karras_sigmas": False}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
}
"""Name -> diffusers' class and the options that make it what the name says, whatever the model's own has set."""


def make_scheduler(own: Any, name: str = "") -> Any:
    """A fresh scheduler over a model's own noise; "" is the model's own kind. Any: diffusers' classes.

    Raises UserError for an unknown name, and for a kind that cannot do what the model was trained for.
    """
    if not name or name == own_name(own):
        return type(own).from_config(own.config)
    if name not in SCHEDULERS:
        raise unknown_name("scheduler", name, SCHEDULERS, place="scheduler")
    import diffusers

    from reparam_diffusion.models.quiet import quiet

    kind, options = SCHEDULERS[name]
    cls = getattr(diffusers, kind)
    if own.config.get(_ZERO_SNR) and _ZERO_SNR not in inspect.signature(cls.__init__).parameters:
        raise UserError(
            f"{name} cannot draw with this model.",
            "It was trained down to pure noise (zero terminal SNR).",
            "Choose DDIM, Euler or DPM++ 2M.",
        )
    with quiet():
        return cls.from_config(own.config, **options)


def require_scheduler(name: str) -> None:
    """Raise UserError for a name that no model can have; "" and diffusers' own classes are left to the model."""
    if name and name not in SCHEDULERS and not name.endswith("Scheduler"):
        raise unknown_name("scheduler", name, SCHEDULERS, place="scheduler")


def down_to_noise(own: Any) -> Any:
    """A model's scheduler with its last step at pure noise (zero terminal SNR), from which drawing starts then.

    Lin et al. 2023, arXiv:2305.08891, alg. 1. A kind that cannot becomes DDIM. Raises UserError without v-prediction.
    """
    from diffusers import DDIMScheduler

    if own.config.prediction_type != "v_prediction":
        raise UserError(
            "Zero terminal SNR needs a model with v-prediction.",
            f"This one predicts {own.config.prediction_type}: pure noise leaves nothing of the picture to predict.",
            "Switch model.zero_terminal_snr off.",
            place="model.zero_terminal_snr",
        )
    kind = type(own) if _ZERO_SNR in inspect.signature(type(own).__init__).parameters else DDIMScheduler
    return kind.from_config(own.config, **{_ZERO_SNR: True, "timestep_spacing": "trailing"})


def own_name(own: Any) -> str:
    """What the model's own scheduler is called here; its class's name where it has no other."""
    kind = type(own).__name__
    for name, (known, options) in SCHEDULERS.items():
        if known == kind and all(own.config.get(key) == value for key, value in options.items()):
            return name
    return kind
