"""Reading adapter files of every known kind, and binding them to a live model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from reparam_diffusion.adapters.base import Adapter
from reparam_diffusion.adapters.foreign import forms_of, read_forms
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.bundled import PREFIX, fitting, unbundled
from reparam_diffusion.formats.families import FAMILY_TITLES, USABLE, is_other
from reparam_diffusion.formats.identify import family_conflict, guess_family, guess_trigger, what_instead
from reparam_diffusion.formats.keys import KNOWN, NO_NAME, adapter_name, parse_key, short
from reparam_diffusion.formats.load import Piece, open_pieces
from reparam_diffusion.formats.mapped import Mapped
from reparam_diffusion.formats.names import Parts, canonical, diffusers_name, module_at, spellings
from reparam_diffusion.formats.peft_config import complete, refuse_unknown
from reparam_diffusion.models.words import Word

Unmatched = list[tuple[str, str]]
"""Names of a file's tensors or layers, each with a plain sentence why it is left out."""

PADDING = "reparam_padding"
"""Header key: layers that `write_adapter` added as zeros for other programs."""
TWICE = "the file has this layer twice, under two names"
PART_NAMES = {"unet": "UNet", "te1": "text encoder", "te2": "second text encoder"}
_LISTED = ("lora", "loha", "lokr", "oft", "adalora", "full", "norm", "ia3", "glora", "boft")
"""Forms whose leaves are all in `keys.KNOWN`; a method that is added later takes any leaf."""


@dataclass
class Site:
    """One layer's tensors in a file. `flat` is the file's own spelling, `path` the dotted one where it has dots."""

    part: str
    flat: str
    path: str
    key: str
    is_dotted: bool
    leaves: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The canonical flat name."""
        return f"{self.part}.{diffusers_name(self.flat) if self.part == 'unet' else self.flat}"

    def kinds(self) -> list[str]:
        """The names of the forms at this site, the main one first."""
        return [form.name for form, _ in forms_of(self.leaves)]

    def adapter(self, module: nn.Module) -> Adapter:
        """The adapter for a live module. Raises ValueError, with a plain sentence, where it does not fit."""
        return _build(self.leaves, _shape(module))

    def rank(self) -> int | None:
        """The rank of its factors; None for forms without one."""
        if "lora_E" in self.leaves:
            return int((self.leaves["lora_E"] != 0).sum())
        for leaf in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if leaf in self.leaves and self.leaves[leaf].ndim:
                return self.leaves[leaf].shape[0]
        return None


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read, without a model. `match` binds it to one."""

    file: Path
    metadata: dict[str, str]
    unmatched: Unmatched
    _sites: dict[str, Site]
    _maps: tuple[Mapped, ...] = ()
    words: tuple[Word, ...] = ()
    """The learned words that come with it."""

    def let_go(self) -> None:
        """Free the memory that reading layers has taken so far; what is needed again is read again."""
        for mapped in self._maps:
            mapped.let_go()

    @property
    def sites(self) -> list[str]:
        """Canonical flat names of the layers, such as "unet.mid_block_attentions_0_proj_in"."""
        return list(self._sites)

    @property
    def layers(self) -> dict[str, Site]:
        """The layers' tensors by canonical flat name."""
        return self._sites

    @property
    def method(self) -> str:
        """The method's name; "mixed" where layers differ."""
        kinds = {site.kinds()[0] for site in self._sites.values()}
        kinds = kinds - {"norm"} or kinds  # norms come along with other methods
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def base(self) -> str:
        """The base model's family: "sd1", "sd2", "sdxl", another key of FAMILY_TITLES, or "unknown"."""
        return guess_family(self.metadata, *self._shown())

    @property
    def base_conflict(self) -> str:
        """A sentence where the header names another base than the layers show; empty where they agree."""
        return family_conflict(self.metadata, *self._shown())

    def _shown(self) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
        """What tells the family: the layers by canonical name, and the file's own names of them."""
        layers = {name: site.leaves for name, site in self._sites.items()}
        return layers, [site.key for site in self._sites.values()]

    def misfit(self, left: Unmatched, family: str) -> str:
        """Why nothing of the file fits a model of `family`, for an error."""
        base = self.base
        if is_other(base) or (base in USABLE and family in USABLE and base != family):
            return f"It is for {FAMILY_TITLES[base]}; the model is {FAMILY_TITLES.get(family, family)}."
        return f"None of its layers match: {left[0][0]}: {left[0][1]}." if left else "It has no layers."

    @property
    def trigger(self) -> str:
        """The words that call it, when the file says so."""
        return guess_trigger(self.metadata) or ", ".join(word.text for word in self.words)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer that has one."""
        return {name: rank for name, site in self._sites.items() if (rank := site.rank()) is not None}

    def delta(self, site: str, weight: Tensor) -> Tensor:
        """ΔW in fp32 of one site, by canonical or module name, for its base weight; UserError where none fits."""
        try:
            return _build(self._sites[canonical(site)].leaves, tuple(weight.shape)).delta(weight)
        except KeyError:
            raise UserError(f"{self.file.name} does not change {site}.") from None
        except ValueError as error:
            raise UserError(f"{self.file.name} does not fit {site}.", f"{error}.") from None

    def words_for(self, parts: Parts) -> tuple[list[Word], Unmatched]:
        """The learned words that a model's text encoders can read, and the others with why."""
        return fitting(self.words, parts)

    def match(self, parts: Parts) -> tuple[dict[str, Adapter], Unmatched]:
        """Adapters by live site, and what was left out with why. Nothing is left out in silence."""
        located, left = self.locate(parts)
        found: dict[str, Adapter] = {}
        for live, site in located.items():
            try:
                found[live] = site.adapter(module_at(parts, live))
            except ValueError as error:
                left.append((site.key, short(str(error), 300)))
        return found, left

    def locate(self, parts: Parts) -> tuple[dict[str, Site], Unmatched]:
        """The file's layers by live site, not yet built into adapters, and what was left out with why."""
        table = spellings(parts)
        found: dict[str, Site] = {}
        left: Unmatched = list(self.unmatched)
        for site in self._sites.values():
            live = table.get(f"{site.part}.{site.flat}")
            if live is None:
                left.append((site.key, _no_layer(site, parts)))
            elif live in found:
                left.append((site.key, TWICE))
            else:
                found[live] = site
        return found, left


def read_adapter(path: Path | str) -> AdapterFile:
    """Read a .safetensors file or a PEFT folder. Raises UserError when it is no adapter, or cannot be read."""
    path = Path(path)
    pieces = open_pieces(path)
    unmatched: Unmatched = []
    words: list[Word] = []
    sites: dict[str, Site] = {}
    for piece in pieces:
        refuse_unknown(piece.config, path.name)
        found, left = unbundled(piece.tensors)
        words += found
        unmatched += left
        for site in _sites_of(piece, unmatched):
            # LDM names of a UNet with another number of layers a block may collide when turned without the model.
            name = site.name if site.name not in sites else f"{site.part}.{site.flat}"
            if name in sites:
                unmatched.append((site.key, TWICE))
            else:
                sites[name] = site
    unmatched = [(short(key), short(why, 300)) for key, why in unmatched]
    metadata = {key: value for piece in pieces for key, value in piece.metadata.items()}
    if not sites:
        told = [f"{key}: {why}." for key, why in unmatched if why != NO_NAME]
        why, do = (told[0], "Check the file.") if told else what_instead(pieces[0].tensors)
        raise UserError(f"{path.name} is not an adapter that can be read.", why, do)
    maps = tuple(piece.mapped for piece in pieces if piece.mapped is not None)
    return AdapterFile(path, metadata, unmatched, sites, maps, tuple(words))


def _sites_of(piece: Piece, unmatched: Unmatched) -> list[Site]:
    """A piece's tensors gathered into layers; what does not belong goes to `unmatched`."""
    gathered: dict[tuple[str, str], Site] = {}
    padding = _padding_of(piece.metadata)
    several = sorted({name for key in piece.tensors if (name := adapter_name(key))})
    for key, tensor in piece.tensors.items():
        if key.startswith(PREFIX):
            continue
        if len(several) > 1 and adapter_name(key) not in ("", several[0]):
            unmatched.append((key, f'the file holds several PEFT adapters; only "{short(several[0])}" is read'))
            continue
        parsed = parse_key(key, part=piece.part)
        if isinstance(parsed, str):
            unmatched.append((key, parsed))
            continue
        if parsed.is_dotted:
            name = key[: -len(parsed.leaf)] if key.endswith(parsed.leaf) else key
        else:
            name = key.partition(".")[0]
        if name in padding:
            continue
        new = Site(parsed.part, parsed.flat, parsed.path, name.rstrip("."), parsed.is_dotted)
        site = gathered.setdefault((parsed.part, parsed.flat), new)
        if parsed.leaf in site.leaves:
            unmatched.append((key, "the file has this tensor twice, under two names"))
        else:
            site.leaves[parsed.leaf] = tensor
    return [site for site in gathered.values() if _is_complete(site, piece, unmatched)]


def _padding_of(metadata: Mapping[str, str]) -> set[str]:
    """The layers that our writer added for others; none where the header has something else under this key."""
    try:
        names = json.loads(metadata.get(PADDING, "[]"))
    except ValueError:
        return set()
    return {str(name) for name in names} if isinstance(names, list) else set()


def _is_complete(site: Site, piece: Piece, unmatched: Unmatched) -> bool:
    """Finish a site's leaves from the configuration and check that they make up an adapter."""
    if site.is_dotted:
        config = piece.config if piece.config is not None else piece.part_configs.get(site.part)
        try:
            complete(site.leaves, site.path, config)
        except (TypeError, ValueError, IndexError, ZeroDivisionError, re.error) as error:
            unmatched.append((site.key, f"its configuration makes no sense for it ({error})"))
            return False
    if fault := _kind_fault(site.leaves):
        unmatched.append((site.key, fault))
        return False
    if not site.is_dotted and piece.metadata.get("ss_network_module") == "networks.oft":
        _settle_kohya_oft(site.leaves)
    _fold_scalar(site.leaves)
    if "magnitude" in site.leaves:  # PEFT's, always per output, though (1, out, 1, 1) for convolutions
        site.leaves["dora_scale"] = site.leaves.pop("magnitude").flatten()
    kinds = site.kinds()
    if not kinds:
        names = short(", ".join(site.leaves), 200)
        unmatched.append((site.key, f"its tensors ({names}) make up no known kind of adapter"))
        return False
    for leaf in [leaf for leaf in site.leaves if kinds[0] in _LISTED and leaf not in KNOWN]:
        unmatched.append((f"{site.key}.{leaf}", "no reader uses this tensor"))
        del site.leaves[leaf]
    return True


_ONE_NUMBER = ("alpha", "scalar")
_NO_WEIGHTS = (*_ONE_NUMBER, "on_input", "init_rank", "bias_scale", "oft_terms", "oft_eps")
"""Leaves that may be whole numbers or true and false."""


def _kind_fault(leaves: Mapping[str, Tensor]) -> str:
    """What is wrong with the kind of a layer's numbers, as a plain sentence; empty where nothing is."""
    for name, tensor in leaves.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if name not in _NO_WEIGHTS and not tensor.is_floating_point():
            return f"{short(name)} holds {kind} values, and weights are floating-point numbers"
        if name in _ONE_NUMBER and tensor.numel() != 1:
            return f"{name} has {tensor.numel()} values, and it is one number"
        if name in _ONE_NUMBER and tensor.dtype == torch.bool:
            return f"{name} is {kind}, and it is a number"
    return ""


def _settle_kohya_oft(leaves: dict[str, Tensor]) -> None:
    """kohya's own OFT takes alpha 0 as "no rotation at all", everybody else as "no constraint"."""
    alpha = leaves.get("alpha")
    if "oft_blocks" in leaves and alpha is not None and not bool(alpha.any()):
        leaves["oft_blocks"] = torch.zeros_like(leaves["oft_blocks"])


def _fold_scalar(leaves: dict[str, Tensor]) -> None:
    """LyCORIS before July 2023 kept a factor apart: it belongs to one of the low-rank halves."""
    scalar = leaves.pop("scalar", None)
    for leaf in ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a"):
        if scalar is not None and leaf in leaves:
            leaves[leaf] = leaves[leaf].float() * scalar.float().sum()  # one value, of any shape


def _build(leaves: Mapping[str, Tensor], shape: Sequence[int]) -> Adapter:
    """The adapter of a site's leaves. Raises ValueError, with a plain sentence, where they do not fit the weight."""
    for name, tensor in leaves.items():
        if tensor.numel() == 0:
            raise ValueError(f"{name} is empty")
        if name == "alpha" and any(leaf.startswith("lokr") for leaf in leaves):
            continue  # "dim 100000" is infinite in fp16, and means nothing
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(f"{name} holds values that are not numbers (NaN or infinity)")
    try:
        adapter = read_forms(leaves, shape)
    except (RuntimeError, IndexError, KeyError) as error:
        # Tensors of a shape that no writer makes: torch itself finds that they do not multiply.
        shapes = short(", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in leaves.items()), 300)
        raise ValueError(f"its tensors do not fit a weight of {tuple(shape)}: {shapes}") from error
    return adapter


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise ValueError("the model's layer has no weight")
    return tuple(weight.shape)


def _no_layer(site: Site, parts: Parts) -> str:
    if site.part not in parts:
        return f"the model has no {PART_NAMES.get(site.part, site.part)}"
    return f"the model's {PART_NAMES.get(site.part, site.part)} has no such layer"
