"""The adapter methods, in the order a person sees them. A new one is a file here and its name in the import below."""

# isort: off
from reparam_diffusion.adapters import lora, loha, lokr, oft, adalora  # noqa: F401  (importing registers them)

# isort: on
from reparam_diffusion.adapters.base import METHODS, Adapter, Host, Method, Plan, Spec

__all__ = ["METHODS", "Adapter", "Host", "Method", "Plan", "Spec"]
