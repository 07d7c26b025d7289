"""What an adapter file holds, told to a person: method, base, ranks, layers, trigger, and what matches nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from reparam_diffusion.adapters.base import METHODS
from reparam_diffusion.formats.families import FAMILY_TITLES, is_other
from reparam_diffusion.formats.identify import count_pictures
from reparam_diffusion.formats.read import PART_NAMES, read_adapter

Report = dict[str, Any]
"""Plain values for JSON."""

BASES = {"starter": "Starter model", **FAMILY_TITLES, "unknown": "not said"}
"""Families of base models and their names for people."""
FOREIGN = {
    "full": "Full difference",
    "norm": "Norm layers",
    "boft": "BOFT",
    "ia3": "(IA)³",
    "glora": "GLoRA",
    "mixed": "Several methods",
}
"""Methods that we read but do not train."""
STARTER = "starter-model"
"""What a header calls the bundled model."""
FEW_RANKS = 3  # different ranks that a sentence can tell
_MOST_SHOWN = 8
_MOST_DIGITS = 12


def report_of(path: Path, model: str | None = None) -> Report:
    """Everything `inspect` tells. With a model, also how the file fits it. Raises UserError for what is no adapter."""
    file = read_adapter(path)
    metadata = file.metadata
    trained_as = metadata.get("reparam_method", "")
    base_model = metadata.get("ss_sd_model_name", "")
    unmatched = list(file.unmatched)
    report: Report = {
        "file": path.name,
        "bytes": bytes_of(path),
        "method": file.method,
        "trained_as": trained_as if trained_as in METHODS and trained_as != file.method else "",
        "base": "starter" if base_model == STARTER else file.base,
        "base_model": base_model,
        "base_conflict": file.base_conflict,
        "trigger": file.trigger,
        "words": {word.text: word.count for word in file.words},
        "alpha": metadata.get("ss_network_alpha", ""),
        "layers": len(file.sites),
        "layers_by_part": dict(Counter(site.partition(".")[0] for site in file.sites)),
        "ranks": file.ranks,
        "steps": metadata.get("ss_steps", ""),
        "pictures": count_pictures(metadata),
        "made_by": metadata.get("modelspec.implementation_version", "") or metadata.get("ss_network_module", ""),
        "metadata": {key: value for key, value in metadata.items() if key != "reparam_config"},
    }
    if model is not None:
        from reparam_diffusion.models.load import load_model

        found, unmatched = file.match(load_model(model, device="cpu").parts)
        report |= {"model": model, "fits": len(found), "sites": list(found)}
    report["unmatched"] = [{"key": key, "why": why} for key, why in unmatched]
    return report


def bytes_of(path: Path) -> int:
    """The size of an adapter's tensors on the disk: of a file, or of the files in a folder."""
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def steps_of(report: Report) -> int:
    """How many steps a file says it was trained for; 0 where that is no sensible number."""
    told = str(report["steps"])
    return int(told) if told.isdecimal() and len(told) <= _MOST_DIGITS else 0


def method_title(method: str) -> str:
    """A method's name for people."""
    return METHODS[method].title if method in METHODS else FOREIGN.get(method, method)


def ranks_told(report: Report) -> str:
    """The ranks in a sentence's part: "16 everywhere", "16 in 64 layers, 8 in 30 layers", "2 to 16, 7.6 on average"."""
    ranks = list(report["ranks"].values())
    counts = Counter(ranks).most_common()
    if not ranks:
        return "none: the method has no ranks"
    if len(counts) == 1 and len(ranks) == report["layers"]:
        return f"{ranks[0]} everywhere"
    if len(counts) <= FEW_RANKS:
        return ", ".join(f"{rank} in {count} layer{'' if count == 1 else 's'}" for rank, count in counts)
    return f"{min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.1f} on average"


def words_told(report: Report) -> str:
    """The learned words: "sks (2 vectors)"."""
    return ", ".join(f"{word} ({count} vector{'' if count == 1 else 's'})" for word, count in report["words"].items())


def report_lines(report: Report) -> list[str]:
    """The report as lines of plain text."""
    names = PART_NAMES | ({"unet": "transformer"} if is_other(report["base"]) else {})
    parts = ", ".join(f"{count} in the {names.get(p, p)}" for p, count in report["layers_by_part"].items())
    base = BASES[report["base"]] + (f"  ({report['base_model']})" if report["base_model"] else "")
    method = method_title(report["method"])
    if report["trained_as"]:
        method = f"{method_title(report['trained_as'])}, saved as {method}"
    lines = [
        f"File      {report['file']}  {report['bytes'] / 1e6:.1f} MB",
        f"Method    {method}",
        f"Base      {base}",
        *([f"          {report['base_conflict']}"] if report["base_conflict"] else []),
        f"Trigger   {report['trigger'] or 'not said'}",
        *([f"Learned   {words_told(report)}"] if report["words"] else []),
        f"Layers    {report['layers']}: {parts}",
        f"Ranks     {ranks_told(report)}",
    ]
    spread = sorted(Counter(report["ranks"].values()).items())
    if len(spread) > FEW_RANKS:
        lines.append("          " + ", ".join(f"{rank} ({count})" for rank, count in spread))
    if report["made_by"]:
        lines.append(f"Made by   {report['made_by']}")
    if steps := steps_of(report):
        on = f" on {report['pictures']} pictures" if report["pictures"] else ""
        lines.append(f"Trained   {steps} steps{on}")
    if "fits" in report:
        lines.append(f"Fits      {report['fits']} of {report['layers']} layers of {report['model']}")
    unmatched = report["unmatched"]
    lines.append(f"Unmatched {len(unmatched) or 'none'}")
    lines += [f"  {row['key']}: {row['why']}" for row in unmatched[:_MOST_SHOWN]]
    if len(unmatched) > _MOST_SHOWN:
        lines.append(f"  and {len(unmatched) - _MOST_SHOWN} more")
    return lines
