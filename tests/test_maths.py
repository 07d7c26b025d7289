"""Formulas on tensors, against their definitions and against LyCORIS 4.1.3."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reparam_diffusion.maths.kronecker import factorization, kron, kron_linear, largest_divisor
from reparam_diffusion.maths.lowrank import relative_error, truncated_svd
from reparam_diffusion.maths.orthogonal import (
    cayley,
    cayley_turn,
    clipped,
    rotate_blocks,
    skew_from_triangle,
    triangle_from_skew,
    turn_outputs,
)


def skews(size: int, count: int = 3, seed: int = 0) -> torch.Tensor:
    numbers = torch.randn(count, size * (size - 1) // 2, generator=torch.Generator().manual_seed(seed))
    return skew_from_triangle(numbers.double(), size)


@given(size=st.integers(1, 9), seed=st.integers(0, 99))
def test_cayley_is_orthogonal_and_turns_back_with_the_opposite_sign(size: int, seed: int) -> None:
    skew = skews(size, seed=seed)
    rotation, eye = cayley(skew), torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(rotation.mT @ rotation, eye.expand_as(rotation))
    torch.testing.assert_close(rotation, (eye + skew) @ torch.linalg.inv(eye - skew))
    torch.testing.assert_close(cayley(-skew), rotation.mT)
    assert torch.equal(cayley(torch.zeros(2, size, size)), torch.eye(size).expand(2, size, size))


def test_the_turn_has_the_right_gradient() -> None:
    numbers = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda upper: cayley_turn(skew_from_triangle(upper, 4)), (numbers,))


def test_cayley_of_half_precision_is_computed_in_single() -> None:
    assert cayley(skews(4).bfloat16()).dtype == torch.float32


@given(size=st.integers(1, 6))
def test_a_triangle_and_its_skew_matrix_are_the_same_numbers(size: int) -> None:
    skew = skews(size)
    assert torch.equal(skew, -skew.mT)
    assert torch.equal(skew_from_triangle(triangle_from_skew(skew), size), skew)


@given(limit=st.sampled_from((0.0, 0.1, 1.0, 100.0)))
def test_clipping_keeps_the_direction(limit: float) -> None:
    skew = skews(4)
    found = clipped(skew, limit)
    if limit and skew.norm() > limit:
        torch.testing.assert_close(found.norm(), torch.tensor(limit, dtype=torch.float64))
        torch.testing.assert_close(found / found.norm(), skew / skew.norm())
    else:
        assert torch.equal(found, skew)


@given(lead=st.sampled_from(((), (3,), (2, 3))), size=st.integers(1, 4), num=st.integers(1, 5))
def test_rotating_blocks_is_a_block_diagonal_product(lead: tuple[int, ...], size: int, num: int) -> None:
    blocks, x = torch.randn(num, size, size).double(), torch.randn(*lead, num * size).double()
    torch.testing.assert_close(rotate_blocks(blocks, x), x @ torch.block_diag(*blocks).T)


@given(shape=st.tuples(*[st.integers(1, 4)] * 4))
def test_kron_is_the_kronecker_product_also_of_kernels(shape: tuple[int, int, int, int]) -> None:
    l, m, k, n = shape
    left, right = torch.randn(l, m), torch.randn(k, n)
    torch.testing.assert_close(kron(left, right), torch.kron(left, right))
    kernel = torch.randn(k, n, 3, 2)
    torch.testing.assert_close(kron(left, kernel)[..., 1, 0], torch.kron(left, kernel[..., 1, 0].contiguous()))


@given(shape=st.tuples(*[st.integers(1, 3)] * 4))
def test_a_kronecker_product_of_rows_needs_no_large_matrix(shape: tuple[int, int, int, int]) -> None:
    l, m, k, n = shape
    small, large = torch.randn(l, m).double().requires_grad_(), torch.randn(k, n).double().requires_grad_()
    x = torch.randn(4, m, n).double().requires_grad_()
    found = kron_linear(x, small, large)
    torch.testing.assert_close(found.reshape(4, -1), x.reshape(4, -1) @ torch.kron(small, large).T)
    assert torch.autograd.gradcheck(kron_linear, (x, small, large))


@given(num=st.integers(1, 6), size=st.integers(1, 4), with_bias=st.booleans())
def test_turned_outputs_are_the_product_and_have_its_gradient(num: int, size: int, with_bias: bool) -> None:
    y, turn = torch.randn(2, 3, num * size).double().requires_grad_(), torch.randn(num, size, size).double() / 5
    bias = torch.randn(num * size).double() if with_bias else None
    before = y if bias is None else y - bias
    turn.requires_grad_()
    torch.testing.assert_close(turn_outputs(y, turn, bias), y + before @ torch.block_diag(*turn).T)
    assert torch.autograd.gradcheck(lambda y, turn: turn_outputs(y, turn, bias), (y, turn))


@given(dimension=st.integers(1, 3000), factor=st.integers(-1, 80))
def test_factorization_is_lycoriss(dimension: int, factor: int) -> None:
    lycoris = pytest.importorskip("lycoris.functional.general")
    small, large = factorization(dimension, factor)
    assert (small, large) == lycoris.factorization(dimension, factor)
    assert small * large == dimension


@pytest.mark.parametrize(
    ("dimension", "factor", "pair"),
    [
        (320, -1, (16, 20)),
        (320, 4, (4, 80)),
        (320, 8, (8, 40)),
        (768, -1, (24, 32)),
        (1280, -1, (32, 40)),
        (12, 8, (3, 4)),
    ],
)
def test_factorization_of_layers_in_use(dimension: int, factor: int, pair: tuple[int, int]) -> None:
    assert factorization(dimension, factor) == pair


@given(dimension=st.integers(1, 400), bound=st.integers(0, 400))
def test_the_largest_divisor_divides_and_is_the_largest(dimension: int, bound: int) -> None:
    found = largest_divisor(dimension, bound)
    assert found == max(d for d in range(1, dimension + 1) if dimension % d == 0 and d <= max(bound, 1))


@given(rank=st.integers(1, 5))
def test_a_truncated_svd_is_exact_at_full_rank_and_nearest_below(rank: int) -> None:
    matrix = torch.randn(5, 7)
    up, down = truncated_svd(matrix, rank)
    left_out = torch.linalg.svdvals(matrix)[rank:].norm() / matrix.norm()
    assert relative_error(up @ down, matrix) == pytest.approx(left_out.item(), abs=1e-5)
    torch.testing.assert_close(up.norm(), down.norm())


def test_the_error_of_nothing_is_nothing() -> None:
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_error(torch.zeros(3), torch.ones(3)) == pytest.approx(1.0)
