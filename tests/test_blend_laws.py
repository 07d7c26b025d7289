"""The laws of blending, on the changes themselves, for adapters of every method and on files as they are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from formats_oracles import adapters_for
from formats_tiny import assert_equal, output, parts_like
from safetensors import safe_open
from torch import Tensor, nn

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.adapters.oft import Oft
from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import write_adapter
from reparam_diffusion.gallery.blend import BLENDS
from reparam_diffusion.gallery.blend.blending import blend_files, blended, settle_form, settle_options
from reparam_diffusion.gallery.blend.forms import Form
from reparam_diffusion.gallery.blend.result import Progress, finished
from reparam_diffusion.gallery.blend.sources import Base, Opened, Source
from reparam_diffusion.inject import attach, find_module
from reparam_diffusion.maths.change import Change

SPECS = {
    "lora": {"rank": 3, "alpha": 5.0},
    "loha": {"rank": 2, "alpha": 3.0},
    "lokr": {"factor": 4},
    "oft": {"block_size": 4},
    "adalora": {"init_rank": 3, "alpha": 2.0},
}
LINEAR = ("sum", "concat")


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    return parts_like("sd1")


@pytest.fixture(scope="module")
def files(parts: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file a method, and `other`, a LoRA of some of the layers only."""
    folder = tmp_path_factory.mktemp("sources")
    made = {}
    for method, spec in SPECS.items():
        adapters = adapters_for(parts, method, **spec)
        made[method] = write_adapter(
            folder / f"{method}.safetensors", adapters, parts=parts, family="sd1", precision="fp32"
        )
    some = {s: a for s, a in adapters_for(parts, "lora", rank=2, alpha=7.0).items() if "attn2" in s or "te1" in s}
    for adapter in some.values():
        adapter.up.data *= -0.7
    made["other"] = write_adapter(folder / "other.safetensors", some, parts=parts, family="sd1", precision="fp32")
    return made


def blend(parts: Mapping, sources: list[Source], method: str = "sum", **options: object) -> dict[str, Change]:
    """The exact changes of a blend, by layer."""
    opened = Opened(sources, Base(parts, "sd1"))
    layers = blended(opened, BLENDS[method], settle_options(method, options))
    return {site: as_change(made, parts, site) for site, made in layers}


def as_change(made: object, parts: Mapping, site: str) -> Change:
    from reparam_diffusion.formats.changes import change_of

    return made if isinstance(made, Change) else change_of(made, find_module(parts, site))


def changes(parts: Mapping, file: Path, strength: float = 1.0) -> dict[str, Tensor]:
    """strength · Δ of a file, read on its own, as matrices."""
    adapters, unmatched = read_adapter(file).match(parts)
    assert unmatched == []
    return {
        site: strength * adapter.delta(find_module(parts, site).weight).detach().flatten(1)
        for site, adapter in adapters.items()
    }


def assert_same(blend_: Mapping[str, Change], wanted: Mapping[str, Tensor], *, error: float = 1e-5) -> None:
    """Every layer's change is the wanted one; a layer that is not wanted changes nothing."""
    assert set(wanted) <= set(blend_)
    for site, change in blend_.items():
        exact = wanted.get(site, torch.zeros(change.sides))
        off = (change.matrix() - exact).norm()
        assert off <= error * max(float(exact.norm()), 1e-3), (site, float(off), float(exact.norm()))


@pytest.mark.parametrize("source", SPECS)
@pytest.mark.parametrize("strength", [1.0, 0.37, -2.0])
def test_one_file_at_a_strength_is_its_change_times_the_strength(
    source: str, strength: float, parts: dict, files: dict
) -> None:
    wanted = changes(parts, files[source], strength)
    assert_same(blend(parts, [Source(files[source], strength)]), wanted)
    assert_same(blend(parts, [Source(files[source], strength)], "concat"), wanted)


@pytest.mark.parametrize("source", SPECS)
def test_two_halves_of_one_file_are_the_file(source: str, parts: dict, files: dict) -> None:
    halves = [Source(files[source], 0.5), Source(files[source], 0.5)]
    for method in ("sum", "concat", "average"):
        assert_same(blend(parts, halves, method), changes(parts, files[source]))


@pytest.mark.parametrize("method", BLENDS)
def test_a_weight_of_zero_is_absence(method: str, parts: dict, files: dict) -> None:
    if BLENDS[method].fewest == 2:
        pytest.skip("it takes two files, of which none can be absent")
    name = "oft" if method == "rotations" else "lora"
    with_none = blend(parts, [Source(files[name]), Source(files["lora" if name == "lora" else "oft"], 0.0)], method)
    alone = blend(parts, [Source(files[name])], method)
    assert_same(with_none, {site: change.matrix() for site, change in alone.items()})


@pytest.mark.parametrize("method", LINEAR)
def test_the_order_of_the_files_does_not_matter(method: str, parts: dict, files: dict) -> None:
    sources = [Source(files["lora"], 0.7), Source(files["other"], -1.3), Source(files["loha"], 0.4)]
    there = blend(parts, sources, method)
    assert_same(blend(parts, sources[::-1], method), {site: change.matrix() for site, change in there.items()})


@pytest.mark.parametrize("kind", ["exact", "diff"])
def test_the_file_of_a_sum_of_all_methods_draws_what_they_draw_together(
    kind: str, parts: dict, files: dict, tmp_path: Path
) -> None:
    base = output(parts)
    sources = [Source(file, 0.2 + 0.1 * n) for n, file in enumerate(files.values())]
    out = tmp_path / "all.safetensors"
    report = finished(blend_files(sources, out, form=Form(kind=kind), model=tiny_model(parts), precision="fp32"))
    assert report.error <= 1e-6
    live = [attach(parts, read_adapter(s.file).match(parts)[0], strength=s.strength) for s in sources]
    together = output(parts)
    for injection in live:
        injection.remove()
    with attach(parts, read_adapter(out).match(parts)[0]):
        blended_output = output(parts)
    assert_equal(blended_output, together, base)


def tiny_model(parts: dict):
    """A Model with these parts and nothing to draw with."""
    from reparam_diffusion.models.load import Model

    return Model(
        "tiny", parts["unet"], None, [parts[p] for p in ("te1", "te2") if p in parts], [], None,
        torch.device("cpu"), torch.float32,
    )  # fmt: skip


# --- one law a method -------------------------------------------------------------------------------------------------
def test_slerp_has_its_ends_and_keeps_what_is_the_same(parts: dict, files: dict) -> None:
    two = [Source(files["lora"], 0.8), Source(files["loha"], 1.2)]
    assert_same(blend(parts, two, "slerp", t=0.0), changes(parts, files["lora"], 0.8))
    assert_same(blend(parts, two, "slerp", t=1.0), changes(parts, files["loha"], 1.2))
    for t in (0.0, 0.3, 1.0):
        assert_same(blend(parts, [Source(files["lora"])] * 2, "slerp", t=t), changes(parts, files["lora"]))


def test_slerp_keeps_the_size_where_an_average_shrinks(parts: dict, files: dict) -> None:
    two = [Source(files["lora"]), Source(files["loha"])]
    first, second = changes(parts, files["lora"]), changes(parts, files["loha"])
    for site, change in blend(parts, two, "slerp", t=0.5).items():
        assert change.norm() == pytest.approx((first[site].norm() + second[site].norm()).item() / 2, rel=1e-4)


def test_slerp_where_one_file_is_silent_fades_the_other(parts: dict, files: dict) -> None:
    quarter = blend(parts, [Source(files["lora"]), Source(files["other"])], "slerp", t=0.25)
    silent = {s: m * 0.75 for s, m in changes(parts, files["lora"]).items() if s not in changes(parts, files["other"])}
    assert silent
    assert_same({site: quarter[site] for site in silent}, silent)


def test_ties_at_full_density_with_one_file_is_the_file(parts: dict, files: dict) -> None:
    for name in SPECS:
        assert_same(blend(parts, [Source(files[name])], "ties", density=1.0), changes(parts, files[name]))


def test_ties_by_hand(parts: dict, files: dict) -> None:
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    first, second = changes(parts, files["lora"])[site], changes(parts, files["other"])[site]
    made = blend(parts, [Source(files["lora"]), Source(files["other"])], "ties", density=1.0)[site].matrix()
    for i in range(0, first.shape[0], 3):
        for j in range(0, first.shape[1], 5):
            a, b = float(first[i, j]), float(second[i, j])
            wanted = (a + b) / 2 if a * b > 0 else (a if abs(a) > abs(b) else b)
            assert float(made[i, j]) == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_dare_without_dropping_is_the_sum_and_its_mean_tends_to_it(parts: dict, files: dict) -> None:
    sources = [Source(files["lora"], 0.5), Source(files["loha"])]
    exact = {site: change.matrix() for site, change in blend(parts, sources).items()}
    assert_same(blend(parts, sources, "dare", drop=0.0), exact)
    site = "unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"
    opened = Opened(sources, Base(parts, "sd1"))
    layers = opened.layers(site)
    mean = torch.zeros_like(exact[site])
    errors = {}
    for seed in range(256):
        mean += BLENDS["dare"].blend(layers, settle_options("dare", {"drop": 0.5, "seed": seed})).matrix()
        if seed + 1 in (16, 256):
            errors[seed + 1] = float((mean / (seed + 1) - exact[site]).norm() / exact[site].norm())
    # The spread of one entry's mean is its size · sqrt(p / (1 − p) / n); four times the seeds halve it.
    assert errors[256] < 0.09
    assert errors[16] / errors[256] == pytest.approx(4, rel=0.25)


def test_dare_is_its_seed(parts: dict, files: dict) -> None:
    one, same, other = (blend(parts, [Source(files["lora"])], "dare", drop=0.5, seed=seed) for seed in (1, 1, 2))
    assert_same(same, {site: change.matrix() for site, change in one.items()})
    assert any((one[site].matrix() - other[site].matrix()).norm() > 0 for site in one)


def test_pruning_keeps_the_largest_entries(parts: dict, files: dict) -> None:
    exact = changes(parts, files["loha"])
    assert_same(blend(parts, [Source(files["loha"])], "prune", density=1.0), exact)
    for site, change in blend(parts, [Source(files["loha"])], "prune", density=0.25).items():
        kept = change.matrix() != 0
        assert int(kept.sum()) == pytest.approx(0.25 * kept.numel(), abs=1)
        assert exact[site][kept].abs().min() >= exact[site][~kept].abs().max()


def test_svd_at_full_rank_is_exact_and_nearest_below(parts: dict, files: dict) -> None:
    sources = [Source(files["lora"], 0.5), Source(files["oft"]), Source(files["lokr"])]
    exact = {site: change.matrix() for site, change in blend(parts, sources).items()}
    assert_same(blend(parts, sources, "svd", rank=4096), exact)
    for site, change in blend(parts, sources, "svd", rank=2).items():
        left = torch.linalg.svdvals(exact[site])[2:].square().sum().sqrt()
        assert float((change.matrix() - exact[site]).norm()) == pytest.approx(float(left), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("side", ["output", "input"])
def test_rotations_multiply_into_a_rotation(side: str, parts: dict, tmp_path: Path) -> None:
    rotated = []
    for number in (1, 2):
        adapters = adapters_for(parts, "oft", block_size=4, side=side)
        for adapter in adapters.values():
            adapter.triangle.data *= 0.5 * number * (-1) ** number
        path = tmp_path / f"{number}.safetensors"
        rotated.append(write_adapter(path, adapters, parts=parts, family="sd1", precision="fp32"))
    opened = Opened([Source(rotated[0]), Source(rotated[1])], Base(parts, "sd1"))
    for site, made in blended(opened, BLENDS["rotations"], BLENDS["rotations"].options()):
        assert isinstance(made, Oft)
        weight = find_module(parts, site).weight
        first, second = (layer.adapter for layer in opened.layers(site))
        once = weight + first.delta(weight)
        twice = once + second.delta(once)
        torch.testing.assert_close(weight + made.delta(weight), twice, rtol=1e-4, atol=1e-5)


def test_a_rotation_at_a_strength_goes_its_own_way_round(parts: dict, files: dict) -> None:
    opened = Opened([Source(files["oft"], 0.5)], Base(parts, "sd1"))
    for site, made in blended(opened, BLENDS["rotations"], BLENDS["rotations"].options()):
        weight = find_module(parts, site).weight
        turned = (weight + made.delta(weight)).flatten(1)
        linear = (weight + 0.5 * opened.layers(site)[0].adapter.delta(weight)).flatten(1)
        size = made.plan.block_size
        if size == 1:
            continue
        gram = weight.flatten(1).reshape(-1, size, turned.shape[1])
        kept = turned.reshape(-1, size, turned.shape[1])
        torch.testing.assert_close(kept.mT @ kept, gram.mT @ gram, rtol=1e-3, atol=1e-4)
        assert (linear.norm() - weight.norm()).abs() > (turned.norm() - weight.norm()).abs()
    there_and_back = blend(parts, [Source(files["oft"]), Source(files["oft"], -1.0)], "rotations")
    assert_same(there_and_back, {}, error=1e-2)


def test_only_rotations_multiply(parts: dict, files: dict) -> None:
    with pytest.raises(UserError, match="Only OFT"):
        blend(parts, [Source(files["oft"]), Source(files["lora"])], "rotations")


def test_concatenation_adds_up_the_ranks(parts: dict, files: dict, tmp_path: Path) -> None:
    finished(
        blend_files(
            [Source(files["lora"]), Source(files["other"])],
            tmp_path / "c.safetensors",
            method="concat",
            model=tiny_model(parts),
        )
    )
    file = read_adapter(tmp_path / "c.safetensors")
    assert set(file.ranks.values()) == {3, 5}
    assert file.method == "lora"


# --- strengths --------------------------------------------------------------------------------------------------------
def test_parts_and_blocks_have_their_own_strengths(parts: dict, files: dict) -> None:
    source = Source(files["lora"], 0.8, te_strength=0.3, blocks={"mid": 0.0, "down.1": 0.5, "unet.*attn1*": 2.0})
    exact = changes(parts, files["lora"])
    made = blend(parts, [source])
    assert not any("mid_block" in site for site in made)
    for site, change in made.items():
        wanted = 0.3 if site.startswith("te1") else 0.8
        wanted *= 0.5 if "down_blocks.1" in site else 2.0 if "attn1" in site and site.startswith("unet.") else 1.0
        assert_same({site: change}, {site: wanted * exact[site]})


# --- the file ---------------------------------------------------------------------------------------------------------
def test_a_blend_tells_its_sources_and_no_one_s_pictures(parts: dict, files: dict, tmp_path: Path) -> None:
    adapters = adapters_for(parts, "lora", rank=2)
    told = {
        "modelspec.trigger_phrase": "sks toy", "ss_dataset_dirs": '{"10_secret": {}}', "ss_tag_frequency": '{"a": {"private": 1}}',
        "reparam_config": "images = '/home/me'", "ss_sd_model_name": "base-x",
    }  # fmt: skip
    first = write_adapter(tmp_path / "one.safetensors", adapters, parts=parts, family="sd1", metadata=told)
    out = tmp_path / "two.safetensors"
    finished(blend_files([Source(first, 0.5), Source(files["lora"], 0.25)], out, model=tiny_model(parts), title="both"))
    with safe_open(str(out), "pt") as opened:
        header = dict(opened.metadata())
    assert header["modelspec.merged_from"] == "one.safetensors (0.5), lora.safetensors (0.25)"
    assert header["modelspec.trigger_phrase"] == "sks toy"
    assert header["ss_output_name"] == "both"
    with safe_open(str(first), "pt") as opened:
        assert opened.metadata()["sshs_model_hash"] in header["reparam_blend"]
    assert not any(word in str(header) for word in ("secret", "private", "/home", "base-x"))


def test_progress_is_told_and_stopping_leaves_no_file(parts: dict, files: dict, tmp_path: Path) -> None:
    steps = blend_files([Source(files["lora"])], tmp_path / "x.safetensors", model=tiny_model(parts))
    first = next(steps)
    assert isinstance(first, Progress)
    assert (first.done, first.total) == (1, len(read_adapter(files["lora"]).sites))
    steps.close()
    assert list(tmp_path.iterdir()) == []


def test_files_of_another_base_are_refused(parts: dict, files: dict, tmp_path: Path) -> None:
    xl = parts_like("sdxl")
    other = write_adapter(tmp_path / "xl.safetensors", adapters_for(xl, "lora", rank=2), parts=xl, family="sdxl")
    with pytest.raises(UserError, match="another base model"):
        blend(parts, [Source(files["lora"]), Source(other)])
    with pytest.raises(UserError, match="base model"):
        next(blend_files([Source(files["lora"])], tmp_path / "y.safetensors"))  # the real SD 1.5 has other shapes


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"kind": "lora"}, "needs a rank"),
        ({"kind": "lora", "rank": -1}, "rank"),
        ({"kind": "lora", "energy": 0.9, "megabytes": 3}, "hoose one"),
    ],
)
def test_a_form_without_sense_is_refused(values: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        settle_form(values)


def test_unknown_methods_and_options_are_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="sum, average, concat"):
        settle_options("mean", {})
    with pytest.raises(UserError, match="density"):
        settle_options("ties", {"dense": 1})


def test_every_method_of_adapters_is_among_the_sources() -> None:
    assert set(SPECS) == set(METHODS)
