"""The one setting with which PEFT 0.21 gives every layer the shapes that we trained, found by trying its own rules."""

from __future__ import annotations

from collections.abc import Mapping

from reparam_diffusion.errors import UserError


def common_factor(splits: Mapping[str, tuple[int, ...]]) -> int:
    """The decompose_factor that splits every layer's (out, in) into our small factors (l, m).

    `splits` has (out, in, l, m) by site. Raises UserError when there is none.
    """
    highest = max(max(split) for split in splits.values())
    pairs = {pair for out, entry, l, m in splits.values() for pair in ((out, l), (entry, m))}
    for factor in [-1, *range(1, highest + 1)]:
        if all(_split(length, factor) == small for length, small in pairs):
            return factor
    raise UserError(
        "These LoKr factors cannot be written for PEFT.",
        "PEFT takes one factor for all layers, and none gives these shapes.",
        "Export a LyCORIS file, or train with another factor.",
    )


def _split(length: int, factor: int) -> int:
    """PEFT's first factor of `length`: a divisor as it is, unsorted; else the one grown towards the square root."""
    if factor > 0 and length % factor == 0:
        return factor
    bound = length if factor == -1 else factor
    small, large = 1, length
    while small < large:
        larger = small + 1
        while length % larger:
            larger += 1
        if larger + length // larger > small + large or larger > bound:
            break
        small, large = larger, length // larger
    return min(small, large)


def common_block_size(blocks: Mapping[str, tuple[int, int]]) -> int:
    """The oft_block_size from which PEFT comes to every layer's own block size.

    `blocks` has (in, block size) by site. Raises UserError when there is none.
    """
    pairs = set(blocks.values())
    for size in range(2, max(length for length, _ in pairs) + 1):
        if all(_adjusted(length, size) == own for length, own in pairs):
            return size
    raise UserError(
        "These OFT blocks cannot be written for PEFT.",
        "PEFT takes one block size for all layers, and none gives these shapes.",
        "Export differences, or train with a block size that divides every layer.",
    )


def _adjusted(length: int, size: int) -> int:
    """PEFT's block size for `length` inputs: the nearest divisor, the lower one when both are as near."""
    if size >= length:
        return length
    if length % size == 0:
        return size
    higher = next(number for number in range(size, length + 1) if length % number == 0)
    lower = next(number for number in range(size, 0, -1) if length % number == 0)
    return lower if size - lower <= higher - size else higher
