"""What is wrong with an adapter file, which programs open it rightly, and the repair where there is one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reparam_diffusion.errors import UserError
from reparam_diffusion.files import require_new_file
from reparam_diffusion.formats.container import data_hash
from reparam_diffusion.formats.families import FAMILY_TITLES, UNKNOWN, family_in_header, is_other
from reparam_diffusion.formats.finite import find_broken_tensor
from reparam_diffusion.formats.header import inherit_header
from reparam_diffusion.formats.names import Family, Parts, module_at
from reparam_diffusion.formats.programs import Verdict, names_of, readers, traits_of
from reparam_diffusion.formats.read import AdapterFile, Site, read_adapter
from reparam_diffusion.formats.write import AdapterWriter, Precision
from reparam_diffusion.gallery.blend.result import Progress, open_once
from reparam_diffusion.gallery.blend.sources import Base
from reparam_diffusion.models.load import Model, load_model
from reparam_diffusion.models.skeleton import skeleton
from reparam_diffusion.models.source import STARTER

FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")
_ENOUGH = 0.9
"""Share of a file's layers that must fit a base to call it the file's."""
_ODD_SCALE = (1 / 64, 8.0)
"""Scales (alpha / rank) outside of this are more often mistakes than meant."""
_FACTORS = ("lora_up.weight", "lora_B", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w2", "lokr_w2_a", "diff")
"""Leaves of which one that is all zero leaves nothing of the change."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or odd, at which layers, and what mends it ("" where nothing does)."""

    what: str
    layers: tuple[str, ...] = ()
    mend: str = ""
    is_serious: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """Everything the doctor has to say about a file."""

    file: Path
    method: str
    kinds: Mapping[str, int]
    """Layers by the form they have."""
    family: str
    certainty: str
    """How it is known which base the file is for."""
    layers: int
    fitting: int
    """Layers that are right; only counted where `is_checked`."""
    is_checked: bool
    """Whether there was a base to hold the layers against."""
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    dtypes: Mapping[str, int]
    metadata: int
    """Header entries."""
    words: Mapping[str, int]
    """Learned words and how many vectors each has."""
    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]
    left_out: tuple[tuple[str, str], ...] = field(default=())

    @property
    def is_healthy(self) -> bool:
        """Whether nothing serious is wrong."""
        return not any(finding.is_serious for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:  # Any: plain values for JSON
        """For JSON."""
        return asdict(self) | {"file": str(self.file), "healthy": self.is_healthy}


def diagnose(path: Path, model: Model | None = None) -> Diagnosis:
    """Look at a file, on `model` or on the base that fits it best. Raises UserError for what is no adapter at all."""
    file = read_adapter(path)
    base, certainty = base_of(file, model)
    located, left = file.locate(base.parts) if base is not None else ({}, list(file.unmatched))
    if base is not None:
        left += file.words_for(base.parts)[1]
    names = list(located.values()) if located else list(file.layers.values())
    kinds = Counter(site.kinds()[0] for site in names)
    alphas = Counter(_alpha(site) for site in names if "alpha" in site.leaves)
    dtypes = Counter(
        str(t.dtype).removeprefix("torch.") for site in names for n, t in site.leaves.items() if n != "alpha"
    )
    traits = {trait for site in names for trait in traits_of(site.kinds()[0], site.leaves)}
    if len(alphas) > 1 and kinds["lora"]:
        traits.add("alphas that differ")
    if file.words:
        traits.add("a learned word")
    findings, fitting = _findings(file, located, base) if base is not None else (_values(file), 0)
    if left:
        mend = "Use it with the base it was made for; what has no place is left out."
        findings.append(
            Finding("Tensors that no layer of the base takes", tuple(f"{k}: {why}" for k, why in left), mend)
        )
    family = base.family if base is not None and located else file.base
    findings += _header_findings(file, family)
    return Diagnosis(
        file=path,
        method=file.method,
        kinds=dict(kinds),
        family=family,
        certainty=certainty,
        layers=len(names),
        fitting=fitting,
        is_checked=base is not None,
        ranks=dict(sorted(Counter(file.ranks.values()).items())),
        alphas=dict(sorted(alphas.items())),
        dtypes=dict(dtypes),
        metadata=len(file.metadata),
        words={word.text: word.count for word in file.words},
        findings=tuple(findings),
        verdicts=tuple(readers(sorted(traits), names_of((site.key for site in names), family))),
        left_out=tuple(left),
    )


def base_of(file: AdapterFile, model: Model | None) -> tuple[Base | None, str]:
    """The base that the file fits, and how that is known; None for families that are not here.

    A `model` that the file is not for is set aside, so that a file is never measured against another's base.
    """
    if model is not None:
        if _fits(file, model.parts):
            return Base(model.parts, model.family, model.name), f"checked against {model.name}"
        base, how = base_of(file, None)
        return base, f"{model.name} has none of its layers, so it was not checked against that: {how}"
    told = family_in_header(file.metadata)
    shown = file.base
    if is_other(shown):
        return None, f"{FAMILY_TITLES[shown]} is not a base this program has, so shapes are not checked"
    tried: list[tuple[int, Base]] = []
    names: list[str] = [name for name in (shown, told, *FAMILIES) if name in FAMILIES]
    if file.metadata.get("ss_sd_model_name") == STARTER.name:
        names.insert(0, "starter")
    for name in dict.fromkeys(names):
        base = _known(name)
        fits = _fits(file, base.parts)
        if fits >= _ENOUGH * len(file.layers):
            how = (
                "its header says so and"
                if name in (told, "starter")
                else "its header says otherwise, but"
                if told != UNKNOWN
                else "its header does not say, but"
            )
            return base, f"{how} {fits} of {len(file.layers)} layers fit {base.name or name}"
        tried.append((fits, base))
    fits, base = max(tried, key=lambda pair: pair[0])
    return base, f"unsure: no known base fits; {fits} of {len(file.layers)} layers fit {base.name or base.family}"


def _known(name: str) -> Base:
    if name == "starter":
        model = load_model("starter", device="cpu")
        return Base(model.parts, model.family, model.name)
    return Base(skeleton(name), name)  # type: ignore[arg-type]  # one of FAMILIES


def _fits(file: AdapterFile, parts: Parts) -> int:
    """How many of a file's layers have the shape of the base's."""
    located, _ = file.locate(parts)
    return sum(_fault(site, parts, live) in ("", "NaN") for live, site in located.items())


def _fault(site: Site, parts: Parts, live: str) -> str:
    """Why a layer cannot be used: "NaN", that it does not fit, or "" where nothing is wrong."""
    if find_broken_tensor(site):
        return "NaN"
    try:
        site.adapter(module_at(parts, live))
    except ValueError as error:
        return str(error)
    return ""


def _findings(file: AdapterFile, located: Mapping[str, Site], base: Base) -> tuple[list[Finding], int]:
    """What is wrong with the layers, and how many are right."""
    faults: dict[str, list[str]] = {"NaN": [], "shape": []}
    zero, odd, missing = [], [], []
    for live, site in located.items():
        fault = _fault(site, base.parts, live)
        if fault:
            faults["NaN" if fault == "NaN" else "shape"].append(live if fault == "NaN" else f"{live}: {fault}")
        elif _is_zero(site):
            zero.append(live)
        rank, alpha = site.rank(), _alpha(site)
        if "alpha" not in site.leaves and site.kinds()[0] in ("lora", "loha", "lokr", "oft", "boft"):
            missing.append(live)
        elif rank and not _ODD_SCALE[0] <= alpha / rank <= _ODD_SCALE[1] and not site.kinds()[0].startswith("lokr"):
            odd.append(f"{live}: alpha {alpha:g} at rank {rank}")
        file.let_go()
    mend = "`doctor --repair` writes the file without these layers."
    rows = [
        Finding("Values that are not numbers (NaN or infinity)", tuple(faults["NaN"]), mend),
        Finding("Layers that do not fit the base's shapes", tuple(faults["shape"]), mend),
        Finding("Layers that change nothing (all zero)", tuple(zero), mend, is_serious=False),
        Finding("Odd alphas: the change is scaled by alpha / rank", tuple(odd), "", is_serious=False),
        Finding(
            "Layers without alpha, which LyCORIS cannot read", tuple(missing), "`doctor --repair` writes it.", False
        ),
    ]
    return [row for row in rows if row.layers], len(located) - len(faults["NaN"]) - len(faults["shape"])


def _values(file: AdapterFile) -> list[Finding]:
    """What is wrong with the numbers alone, where there is no base to hold the shapes against."""
    bad = [site.key for site in file.layers.values() if find_broken_tensor(site)]
    zero = [site.key for site in file.layers.values() if _is_zero(site)]
    rows = [
        Finding("Values that are not numbers (NaN or infinity)", tuple(bad)),
        Finding("Layers that change nothing (all zero)", tuple(zero), is_serious=False),
    ]
    return [row for row in rows if row.layers]


def _is_zero(site: Site) -> bool:
    return any(name in site.leaves and not bool(site.leaves[name].any()) for name in _FACTORS)


def _alpha(site: Site) -> float:
    alpha = site.leaves.get("alpha")
    return math.nan if alpha is None or not alpha.numel() else float(alpha.float().reshape(-1)[0])


def _header_findings(file: AdapterFile, family: str) -> list[Finding]:
    """What the header makes other programs believe."""
    rows, header = [], file.metadata
    told = family_in_header(header)
    mend = "`doctor --repair` writes it."
    if family in FAMILIES and told not in (UNKNOWN, family):
        said, shown = FAMILY_TITLES[told], FAMILY_TITLES[family]
        rows.append(Finding(f"The header says {said}, the layers are those of {shown}", (), mend))
    elif file.base_conflict:
        rows.append(Finding(file.base_conflict))
    elif header and family not in ("sd1", UNKNOWN) and told == UNKNOWN:
        rows.append(Finding("A1111 files it under SD 1, since the header does not name the base", (), mend, False))
    stored = header.get("sshs_model_hash", "").removeprefix("0x")
    if stored and file.file.is_file() and stored != data_hash(file.file):
        rows.append(
            Finding("The hash in the header is not the file's, so A1111 and Civitai mistake it", (), mend, False)
        )
    return rows


def repair(
    path: Path, out: Path, *, model: Model | None = None, precision: Precision = "fp16"
) -> Iterator[Progress | Path]:
    """Write what is right of a file anew: names, alphas and header as programs read them, broken layers left out."""
    require_new_file(out, sources=[path])
    file = read_adapter(path)
    base, why = base_of(file, model)
    if base is None:
        raise UserError(f"{path.name} cannot be repaired here.", f"{why}.", "Use a program that has its base model.")
    located, _ = file.locate(base.parts)
    right: list[str] = []
    kept = dict(file.metadata)
    for key in ("sshs_model_hash", "sshs_legacy_hash", "ss_network_module", "ss_base_model_version", "ss_v2"):
        kept.pop(key, None)
    kept = {key: value for key, value in kept.items() if key not in ("modelspec.architecture", "lora_adapter_metadata")}
    kept |= inherit_header([file.metadata], base.family)
    with AdapterWriter(out, parts=base.parts, family=base.family, precision=precision) as writer:
        for number, (live, site) in enumerate(located.items(), 1):
            if not _fault(site, base.parts, live) and not _is_zero(site):
                writer.add(live, site.adapter(module_at(base.parts, live)))
                right.append(live)
            file.let_go()
            yield Progress(number, len(located), live)
        writer.add_words(file.words_for(base.parts)[0])
        try:
            writer.finish(kept)
        except UserError as error:
            raise UserError(
                "Nothing of this file can be saved.", error.why, "Get it again from where it came."
            ) from None
    open_once(out, base, right)
    yield out


def diagnosis_lines(found: Diagnosis) -> list[str]:
    """For a person."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.kinds.items())
    lines = [
        f"File      {found.file.name}",
        f"Method    {found.method}: {kinds}",
        f"Base      {FAMILY_TITLES.get(found.family, found.family)} ({found.certainty})",
        f"Layers    {found.layers}"
        + (f", of which {found.fitting} are right" if found.is_checked else ", checked without a base"),
        f"Numbers   {', '.join(f'{name} ({count} tensors)' for name, count in found.dtypes.items())}",
    ]
    if found.ranks:
        lines.append(f"Ranks     {_spread(found.ranks)}")
    if found.alphas:
        lines.append(f"Alphas    {_spread({f'{alpha:g}': count for alpha, count in found.alphas.items()})}")
    lines += [f'Learned   the word "{word}", {count} vectors' for word, count in found.words.items()]
    lines.append("Healthy   " + ("yes" if found.is_healthy else "no"))
    for finding in found.findings:
        lines.append(
            f"  {'!' if finding.is_serious else '-'} {finding.what}"
            + (f" ({len(finding.layers)})" if finding.layers else "")
        )
        lines += [f"      {layer}" for layer in finding.layers[:3]]
        if len(finding.layers) > 3:
            lines.append(f"      and {len(finding.layers) - 3} more")
        if finding.mend:
            lines.append(f"      {finding.mend}")
    lines.append("Opens in")
    lines += [
        f"  {verdict.program:9} {verdict.answer}{f'  ({verdict.why})' if verdict.why else ''}"
        for verdict in found.verdicts
    ]
    return lines


def _spread(counts: Mapping[Any, int]) -> str:  # Any: what is counted, shown as it is
    return ", ".join(f"{value} ({count} layers)" for value, count in counts.items())
