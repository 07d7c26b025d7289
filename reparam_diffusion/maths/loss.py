"""How much of a change a result keeps, as a number and in words.

The measure is the relative error ‖written − wanted‖ / ‖wanted‖ in the Frobenius norm, over all layers together, where
`wanted` is the change before anything was cut off or rounded. The share that is kept is 1 − error²: the share of the
energy Σσ². For the nearest change of lower rank it is also the square of the cosine between the two.
"""

from __future__ import annotations

ROUNDING = 1e-3
"""Relative errors up to this are the rounding of the file's numbers (fp16: 3e-4), not a loss."""


def kept_share(error: float) -> float:
    """The share of the change that is kept, 0 to 1, from the relative error. 0 where leaving it out were no worse."""
    return max(0.0, 1.0 - error * error)


def describe_loss(error: float) -> str:
    """A sentence's end such as "keeps 22 % of the change (relative error 0.88)"."""
    told = f"relative error {error:.2g}"
    if error == 0:
        return "keeps all of the change, exactly (relative error 0)"
    if error <= ROUNDING:
        return f"keeps all of the change, up to rounding ({told})"
    share = kept_share(error)
    if share == 0:
        return f"keeps nothing of the change ({told})"
    percent = 100 * share
    if percent > 99.9:
        return f"keeps more than 99.9 % of the change ({told})"
    if percent < 0.1:
        return f"keeps less than 0.1 % of the change ({told})"
    shown = f"{percent:.1f}" if percent >= 99 or percent < 1 else f"{percent:.0f}"
    return f"keeps {shown} % of the change ({told})"
