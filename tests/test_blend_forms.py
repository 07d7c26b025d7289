"""The forms of a result: exact where they can be, nearest where not, and what they say they lose is what they lose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from formats_oracles import adapters_for
from formats_tiny import parts_like
from test_blend_laws import changes, tiny_model
from torch import nn

from reparam_diffusion.errors import UserError
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import write_adapter
from reparam_diffusion.gallery.blend.blending import blend_files
from reparam_diffusion.gallery.blend.forms import Form, in_form
from reparam_diffusion.gallery.blend.result import Report, finished
from reparam_diffusion.gallery.blend.sources import Source
from reparam_diffusion.inject import find_module
from reparam_diffusion.maths.change import Change, distance, nothing, total
from reparam_diffusion.maths.kronecker import kron, nearest_kronecker
from reparam_diffusion.maths.lowrank import (
    rank_for_energy,
    rank_for_norm,
    rank_for_ratio,
    rank_for_sum,
    relative,
    share_ranks,
    svd,
)
from reparam_diffusion.maths.orthogonal import cayley, inverse_cayley, nearest_rotation, skew_from_triangle

CHANCE = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    return parts_like("sd1")


@pytest.fixture(scope="module")
def lokr(parts: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forms") / "lokr.safetensors"
    return write_adapter(path, adapters_for(parts, "lokr", factor=4), parts=parts, family="sd1", precision="fp32")


def convert(source: Path, out: Path, parts: dict, *, precision: str = "fp32", **form: object) -> Report:
    steps = blend_files([Source(source)], out, form=Form(**form), model=tiny_model(parts), precision=precision)
    return finished(steps)


@pytest.mark.parametrize(
    "form",
    [
        {"kind": "exact"}, {"kind": "diff"}, {"kind": "lora", "rank": 4}, {"kind": "lora", "energy": 0.9},
        {"kind": "lora", "megabytes": 0.25}, {"kind": "loha", "rank": 4}, {"kind": "adalora", "rank": 3},
        {"kind": "lokr", "factor": 2}, {"kind": "oft", "block_size": 4},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_error_told_is_the_error_of_the_file(
    form: dict, precision: str, parts: dict, lokr: Path, tmp_path: Path
) -> None:
    report = convert(lokr, tmp_path / "a.safetensors", parts, precision=precision, **form)
    exact, written = changes(parts, lokr), changes(parts, tmp_path / "a.safetensors")
    assert {row.site for row in report.layers} == set(exact)
    wrong = 0.0
    for row in report.layers:
        off = float((written.get(row.site, torch.zeros(())) - exact[row.site]).norm())
        assert row.norm == pytest.approx(float(exact[row.site].norm()), rel=1e-4)
        assert row.error * row.norm == pytest.approx(off, rel=1e-3, abs=1e-5 * row.norm)
        wrong += off**2
    size = sum(float(change.norm()) ** 2 for change in exact.values()) ** 0.5
    assert report.error == pytest.approx(wrong**0.5 / size, rel=1e-3, abs=1e-5)
    if form["kind"] in ("exact", "diff"):
        assert report.error < (1e-6 if precision == "fp32" else 1e-3)
    method = {"exact": "lokr", "diff": "full", "adalora": "lora"}.get(form["kind"], form["kind"])
    assert read_adapter(tmp_path / "a.safetensors").method == method


@pytest.mark.parametrize("energy", [0.95, 0.99])
def test_a_share_of_the_energy_is_kept_with_as_few_ranks_as_can_be(
    energy: float, parts: dict, lokr: Path, tmp_path: Path
) -> None:
    report = convert(lokr, tmp_path / "a.safetensors", parts, kind="lora", energy=energy)
    ranks = read_adapter(tmp_path / "a.safetensors").match(parts)[0]
    for row in report.layers:
        assert row.error**2 <= 1 - energy + 1e-5
        values = torch.linalg.svdvals(changes(parts, lokr)[row.site]).square()
        less = values[: ranks[row.site].plan.rank - 1].sum() / values.sum()
        assert less < energy


@pytest.mark.parametrize("megabytes", [0.3, 0.6])
def test_a_file_has_the_size_that_was_asked_for(megabytes: float, parts: dict, lokr: Path, tmp_path: Path) -> None:
    report = convert(lokr, tmp_path / "a.safetensors", parts, kind="lora", megabytes=megabytes)
    size = report.file.stat().st_size / 1e6
    whole = convert(lokr, tmp_path / "b.safetensors", parts, kind="lora", rank=4096).file.stat().st_size / 1e6
    assert size <= megabytes
    assert size >= 0.75 * min(megabytes, whole)


def test_a_size_that_holds_nothing_is_refused(parts: dict, lokr: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too small"):
        convert(lokr, tmp_path / "a.safetensors", parts, kind="lora", megabytes=0.01)
    assert list(tmp_path.iterdir()) == []


def test_adalora_spends_its_ranks_where_they_keep_the_most(parts: dict, lokr: Path, tmp_path: Path) -> None:
    spread = convert(lokr, tmp_path / "a.safetensors", parts, kind="adalora", rank=3)
    even = convert(lokr, tmp_path / "b.safetensors", parts, kind="lora", rank=3)
    ranks = read_adapter(spread.file).ranks
    assert len(set(ranks.values())) > 1
    assert sum(ranks.values()) <= 3 * len(spread.layers)
    assert spread.error <= even.error


def test_shared_ranks_are_the_best_within_the_budget() -> None:
    spectra = {"a": torch.tensor([3.0, 2.0, 0.1]), "b": torch.tensor([2.5, 0.2])}
    assert share_ranks(spectra, {"a": 1, "b": 1}, 3) == {"a": 2, "b": 1}
    assert share_ranks(spectra, {"a": 10, "b": 1}, 2) == {"a": 0, "b": 2}


def test_the_rank_rules_by_hand() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])  # Σσ² = 22, Σσ = 8
    assert [rank_for_energy(values, e) for e in (0.7, 16 / 22, 0.8, 20 / 22, 0.95, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert [rank_for_sum(values, s) for s in (0.5, 0.74, 0.75, 0.8, 1.0)] == [1, 2, 2, 3, 4]
    assert rank_for_norm(values, (20 / 22) ** 0.5) == 2
    assert [rank_for_ratio(values, r) for r in (1.0, 2.0, 3.9, 4.0)] == [1, 2, 2, 4]
    assert rank_for_energy(torch.zeros(3), 0.9) == rank_for_ratio(torch.zeros(3), 2.0) == 0


# --- the maths below ---------------------------------------------------------------------------------------------------
def test_a_factored_svd_is_the_svd_of_the_product() -> None:
    up, down = torch.randn(40, 6, generator=CHANCE), torch.randn(6, 27, generator=CHANCE)
    change = Change((40, 3, 3, 3), up=up, down=down)
    left, values, right = svd(change)
    torch.testing.assert_close(values, torch.linalg.svdvals(up @ down)[:6], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left * values @ right, up @ down, rtol=1e-4, atol=1e-4)


def test_the_leading_triplets_of_a_large_matrix_are_as_good_as_all_of_its() -> None:
    matrix = torch.randn(400, 300, generator=CHANCE) * torch.linspace(1, 0.2, 300)  # slowly falling: the hard case
    left, values, right = svd(Change((400, 300), whole=matrix), most=8)
    best = torch.linalg.svdvals(matrix)
    off = (left * values @ right - matrix).norm()
    assert float(off) <= 1.01 * float(best[8:].square().sum().sqrt())
    assert left.shape[1] == len(values) == 8
    again = svd(Change((400, 300), whole=matrix), most=8)
    assert torch.equal(again[1], values)


def test_sizes_and_angles_need_no_dense_matrix() -> None:
    pairs = [(torch.randn(20, r, generator=CHANCE), torch.randn(r, 30, generator=CHANCE)) for r in (3, 5)]
    a, b = (Change((20, 30), up=up, down=down, bias=torch.ones(20)) for up, down in pairs)
    dense_a, dense_b = a.dense(), b.dense()
    assert a.norm() == pytest.approx(dense_a.norm())
    for left in (a, dense_a):
        for right in (b, dense_b):
            assert left.dot(right) == pytest.approx(float((a.matrix() * b.matrix()).sum()) + 20, rel=1e-5)
            assert distance(left, right) == pytest.approx(float((a.matrix() - b.matrix()).norm()), rel=1e-5)
    assert distance(a, a) <= 1e-6 * a.norm()
    assert nothing((4, 5)).norm() == 0.0
    assert total([a, b]).up is not None
    assert total([a, b] * 4).up is None, "as many ranks as the layer has need no factors"


@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 3, 3), (6, 35)])
def test_the_nearest_kronecker_product_of_one_is_itself_and_else_the_nearest(shape: tuple) -> None:
    l, m = 3, (4 if shape[1] == 8 else 5)
    small = torch.randn(l, m, generator=CHANCE)
    large = torch.randn(shape[0] // l, shape[1] // m, *shape[2:], generator=CHANCE)
    exact = kron(small, large)
    torch.testing.assert_close(kron(*nearest_kronecker(exact.flatten(1), shape, l, m)), exact, rtol=1e-4, atol=1e-5)
    noisy = exact + 0.3 * torch.randn(shape, generator=CHANCE)
    best = (kron(*nearest_kronecker(noisy.flatten(1), shape, l, m)) - noisy).norm()
    assert best <= (exact - noisy).norm()
    for _ in range(5):
        other = kron(small + 0.05 * torch.randn(l, m, generator=CHANCE), large)
        assert best <= (other - noisy).norm()


def test_the_inverse_of_cayley_gives_the_rotation_back() -> None:
    skew = skew_from_triangle(torch.randn(5, 6, generator=CHANCE, dtype=torch.float64), 4)
    torch.testing.assert_close(inverse_cayley(cayley(skew)), skew)


def test_the_nearest_rotation_of_a_turned_matrix_is_that_turn() -> None:
    turn = cayley(skew_from_triangle(torch.randn(3, 6, generator=CHANCE, dtype=torch.float64), 4))
    before = torch.randn(3, 4, 9, generator=CHANCE, dtype=torch.float64)
    torch.testing.assert_close(nearest_rotation(before, turn @ before), turn)
    mirrored = nearest_rotation(before, -before)
    assert torch.allclose(torch.linalg.det(mirrored), torch.ones(3, dtype=torch.float64)), "a mirror is no rotation"


@pytest.mark.parametrize("kind", ["lora", "loha", "adalora", "diff", "exact"])
def test_a_change_of_its_rank_is_held_exactly(kind: str, parts: dict) -> None:
    module = find_module(parts, "unet.mid_block.resnets.0.conv1")
    shape = tuple(module.weight.shape)
    up, down = torch.randn(16, 2, generator=CHANCE), torch.randn(2, 144, generator=CHANCE)
    change = Change(shape, up=up, down=down, bias=torch.randn(16, generator=CHANCE))
    adapter = in_form(change, Form(kind=kind, rank=2), module)
    delta = adapter.delta(module.weight).detach().flatten(1)
    assert relative(float((delta - up @ down).norm()), float((up @ down).norm())) < 1e-5
    torch.testing.assert_close(adapter.delta_bias(module.bias), change.bias)
