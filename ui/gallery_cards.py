"""The gallery's HTML: cards, one adapter's details, what became of dropped files. All foreign words are escaped."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from reparam_diffusion.files import beside
from reparam_diffusion.gallery import notes, thumbs
from reparam_diffusion.gallery.catalog import Entry
from reparam_diffusion.gallery.importing import Imported
from reparam_diffusion.gallery.report import BASES, FEW_RANKS, Report, method_title, ranks_told, steps_of, words_told
from reparam_diffusion.gallery.shelf import Shelved, stem_of
from reparam_diffusion.gallery.waste import Binned
from ui.fragments import age_of, link_to, plain_size, serve

SHORT_BASES = {"starter": "Starter model", "sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "unknown": ""}


def plural(count: int, word: str) -> str:
    """ "1 adapter", "2,000 adapters"."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


# --- cards -----------------------------------------------------------------------------------------------------------
def cards_of(entries: Sequence[Entry], workspace: Path, chosen: str) -> str:
    """A card for each adapter, to press."""
    serve(thumbs.thumbs_of(workspace))
    return _shelf(
        _card(entry.stem, entry.shelved, workspace, _about(entry), chips=_chips(entry), chosen=chosen)
        for entry in entries
    )


def binned_of(binned: Sequence[Binned], workspace: Path, chosen: str) -> str:
    """A card for each thing in the bin."""
    serve(thumbs.thumbs_of(workspace))
    return _shelf(
        _card(one.key, one.shelved, workspace, [f"deleted {one.when}"], chips=[], chosen=chosen) for one in binned
    )


def _shelf(cards: Any) -> str:  # Any: an iterable of HTML
    return f'<div class="shelf">{"".join(cards)}</div>'


def _card(
    key: str, shelved: Shelved, workspace: Path, about: Sequence[str], *, chips: Sequence[str], chosen: str
) -> str:
    lines = "".join(f'<span class="quiet">{escape(line)}</span>' for line in about)
    marks = "".join(f'<span class="chip">{escape(chip)}</span>' for chip in chips)
    return (
        f'<button type="button" class="adapter" data-key="{escape(key)}" aria-pressed="{str(key == chosen).lower()}">'
        f'{_small_picture(shelved, workspace)}<span class="words"><span class="name">{escape(shelved.name)}</span>'
        f'<span class="chips">{marks}</span>{lines}</span></button>'
    )


def _small_picture(shelved: Shelved, workspace: Path) -> str:
    thumb = thumbs.thumb_of(shelved.thumbnail, workspace) if shelved.thumbnail else None
    if thumb is None:
        return '<span class="blank" aria-hidden="true">no picture</span>'
    return (
        f'<img src="{link_to(thumb)}" alt="What {escape(shelved.name)} draws" loading="lazy" '
        f'width="{thumbs.SIDE}" height="{thumbs.SIDE}">'
    )


def _chips(entry: Entry) -> list[str]:
    if entry.header is not None and entry.header.problem:
        return ["cannot be read"]
    base = SHORT_BASES.get(entry.base, BASES.get(entry.base, ""))
    return [word for word in (method_title(entry.method), base) if word]


def _about(entry: Entry) -> list[str]:
    """A card's small lines."""
    lines = [f"{plain_size(entry.bytes)} · {entry.date}"]
    if entry.trigger:
        lines.append(f"{entry.trigger} · strength\N{NO-BREAK SPACE}{entry.strength:g}")
    elif entry.strength != 1:
        lines.append(f"strength {entry.strength:g}")
    return lines


# --- details ---------------------------------------------------------------------------------------------------------
def head_of(entry: Entry, report: Report | None) -> str:
    """One adapter: its picture, what it is, what it says, and the file to take along."""
    shelved, facts = entry.shelved, entry.shelved.facts
    serve(shelved.file.parent)
    picture = ""
    if shelved.thumbnail is not None:
        address = f"{link_to(shelved.thumbnail)}?{age_of(shelved.thumbnail)}"
        picture = f'<img class="large" src="{address}" alt="What {escape(shelved.name)} draws">'
    rows: dict[str, str] = {
        "In prompts": f"<code>&lt;lora:{escape(entry.stem)}:{entry.strength:g}&gt;</code>",
        "Trigger": escape(entry.trigger),
        "Avoid": escape(notes.as_text(facts.get("negative text"))),
        **(_made(entry, report) if report else {}),
        "Size": f"{plain_size(entry.bytes)}, {escape(entry.date)}",
        "Tags": "".join(f'<span class="chip">{escape(tag)}</span> ' for tag in entry.tags),
        "About": escape(notes.as_text(facts.get("description"))),
        "Notes": escape(notes.as_text(facts.get("notes"))),
    }
    told = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows.items() if text)
    problem = entry.header.problem if entry.header else ""
    callout = f'<p class="callout bad" role="alert">{escape(problem)}</p>' if problem else ""
    return (
        f'<h2>{escape(shelved.name)}</h2>{picture}{callout}<dl class="facts">{told}</dl>'
        f'<p class="take-along">{_downloads(shelved.file)}</p>'
    )


def _made(entry: Entry, report: Report) -> dict[str, str]:
    """What the file says of its making."""
    base = BASES.get(entry.base, entry.base)
    if report["base_model"] and entry.base != "starter":
        base += f" ({report['base_model']})"
    method = method_title(entry.method)
    if report["trained_as"]:
        method += f", saved as {method_title(report['method'])}"
    trained = f"{steps:,} steps" if (steps := steps_of(report)) else ""
    trained += f" on {plural(report['pictures'], 'picture')}" if trained and report["pictures"] else ""
    rows = {
        "Learned word": words_told(report),
        "Method": method,
        "Base model": base,
        "Trained": trained,
        "Made by": report["made_by"],
    }
    return {name: escape(text) for name, text in rows.items()}


def _downloads(file: Path) -> str:
    """A link to the file; a PEFT folder goes along as one .zip."""
    if file.is_dir():
        file = _zipped(file)
        serve(file.parent)
    name = escape(file.name)
    return f'<a class="take" href="{link_to(file)}" download="{name}">Download {name}</a>'


def _zipped(folder: Path) -> Path:
    """An adapter's folder as one file in the workspace's cache, made once: an adapter is never rewritten."""
    archive = folder.parent.parent / ".cache" / "zips" / f"{folder.name}.zip"
    inside = sorted(file for file in folder.rglob("*") if file.is_file())
    newest = max((file.stat().st_mtime_ns for file in (folder, *inside)), default=0)
    if not archive.is_file() or archive.stat().st_mtime_ns < newest:
        with beside(archive) as hidden, zipfile.ZipFile(hidden, "w", zipfile.ZIP_STORED) as opened:
            for file in inside:
                opened.write(file, file.relative_to(folder))
    return archive


def binned_head_of(binned: Binned) -> str:
    """One deleted adapter."""
    return (
        f'<h2>{escape(binned.shelved.name)}</h2><p class="quiet">{escape(binned.shelved.file.name)}, '
        f"deleted {binned.when}. Its notes and its picture come back with it.</p>"
    )


def rest_of(report: Report) -> str:
    """Ranks, what no reader uses, and all metadata."""
    pairs = sorted(report["metadata"].items())
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(shortened(value))}</dd>" for key, value in pairs)
    folded = f'<details><summary>All metadata ({len(pairs)})</summary><dl class="metadata">{rows}</dl></details>'
    return f"{ranks_of(report)}{unmatched_of(report)}{folded if pairs else ''}"


def shortened(text: str, *, longest: int = 2000) -> str:
    """A header may hold megabytes of tags: their beginning, and how much more there is."""
    return text if len(text) <= longest else f"{text[:longest]} … and {len(text) - longest:,} characters more"


def ranks_of(report: Report) -> str:
    """The ranks in a sentence, and as a list of bars where they differ much, as AdaLoRA's do."""
    ranks: Mapping[str, int] = report["ranks"]
    told = f"<h3>Ranks</h3><p>{escape(ranks_told(report).capitalize())} ({plural(report['layers'], 'layer')}).</p>"
    if len(set(ranks.values())) <= FEW_RANKS:
        return told
    top = max(ranks.values())
    rows = "".join(
        f'<li><span class="layer">{escape(_readable(site))}</span><span class="bar" aria-hidden="true">'
        f'<span style="width:{100 * rank / top:.0f}%"></span></span><span class="rank">{rank}</span></li>'
        for site, rank in ranks.items()
    )
    return f'{told}<ul class="ranks" tabindex="0" aria-label="Rank of each layer">{rows}</ul>'


def _readable(site: str) -> str:
    """ "UNet down 0, attention 1 … to_q" without the words that all layers share."""
    part, _, path = site.partition(".")
    for long, short in (("_blocks_", " "), ("transformer ", "block "), ("attentions_", "attention "), ("_", " ")):
        path = path.replace(long, short)
    return f"{'' if part == 'unet' else part + ' '}{path}"


def unmatched_of(report: Report) -> str:
    """What the file holds and nobody reads."""
    left = report["unmatched"]
    if not left:
        return ""
    rows = "".join(f"<li><code>{escape(row['key'])}</code>: {escape(row['why'])}</li>" for row in left[:20])
    more = f"<li>and {len(left) - 20} more</li>" if len(left) > 20 else ""
    return f'<ul class="callout mild"><li>{plural(len(left), "name")} in the file left out:</li>{rows}{more}</ul>'


# --- what became of dropped files ------------------------------------------------------------------------------------
def imports_of(told: Sequence[Imported]) -> str:
    """The inspect report of each file that was taken in, and why the others were not."""
    taken = [one for one in told if one.file is not None]
    new = sum(one.is_new for one in taken)
    rows = "".join(_taken(one) for one in taken)
    bad = "".join(f"<li><b>{escape(one.name)}</b> is left out. {escape(one.why)}</li>" for one in told if not one.file)
    refused = f'<ul class="refused">{bad}</ul>' if bad else ""
    return f'<div role="status"><p class="count">{plural(new, "adapter")} imported.</p>{rows}{refused}</div>'


def _taken(one: Imported) -> str:
    report, file = one.report, one.file
    assert report is not None and file is not None
    known = "" if one.is_new else f" It is on the shelf already, as {escape(stem_of(file))}."
    words = [
        method_title(report["trained_as"] or report["method"]),
        f"for {BASES[report['base']]}" if report["base"] != "unknown" else "base model not said",
        report.get("base_conflict", ""),
        plural(report["layers"], "layer"),
        f"rank {ranks_told(report)}" if report["ranks"] else "",
        f"trigger “{report['trigger']}”" if report["trigger"] else "no trigger said",
        f"{plural(len(report['unmatched']), 'name')} left out" if report["unmatched"] else "",
    ]
    return f"<p><b>{escape(one.name)}</b>: {escape(', '.join(word for word in words if word))}.{known}</p>"
