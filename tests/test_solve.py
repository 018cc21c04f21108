"""solve_rows_: against float64 solutions of the same equations, and what better weights must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, WIDTHS
from test_refine import errors, gram_of, layers, row_masks

from wanda_kernels import ops, reference

ROWS = reference.gram.SOLVED_ROWS["cpu"]
DAMPINGS = (0.0, 0.03, 0.3, 1.0, 7.5)


def layer_of(rows, cols, kind="correlated", dtype=torch.float32, seed=0):
    generator = np.random.default_rng(seed)
    gram = gram_of(kind, cols, generator)
    weight = torch.from_numpy(generator.standard_normal((rows, cols))).to(dtype)
    return weight, reference.row_mask(weight, gram.diagonal().sqrt(), 0.5), gram


def solved(target, mask, gram, damping=0.3, steps=10):
    """Weights and sums, after what must always hold: see :func:`check`."""
    weight = torch.full_like(target, torch.nan)  # what it holds is not read
    sums = torch.full((len(weight), 2), torch.nan, dtype=torch.float64)
    ops.solve_rows_(weight, mask, gram, target, damping, steps, sums)
    return weight, sums


def error_of(weight, target, gram, damping):
    """Each row's error in float64, and what the absolute values of its terms add up to."""
    return errors(torch.ones_like(weight, dtype=torch.bool), weight.double() - target.double(), gram, damping)


def exact(target, mask, gram, damping):
    """The least-squares solution of each row, in float64; of several the one nearest to the target."""
    damped = gram.double() + damping * gram.double().diagonal().diag()
    w = target.double().masked_fill(mask, 0)
    for row, pruned, dense in zip(w, mask, target.double(), strict=True):
        kept = ~pruned
        right = damped[kept][:, pruned] @ dense[pruned]
        row[kept] += torch.linalg.lstsq(damped[kept][:, kept], right[:, None], driver="gelsd").solution[:, 0]
    return w


def check(target, mask, gram, damping, steps):
    """Zeros where it is pruned, finite, no larger error; sums that say so. Returns the weights."""
    before = [tensor.clone() for tensor in (target, mask, gram)]
    weight, sums = solved(target, mask, gram, damping, steps)
    assert all(torch.equal(a, b) for a, b in zip(before, (target, mask, gram), strict=True))
    assert not weight[mask].any()
    assert torch.isfinite(weight).all()
    began = target.masked_fill(mask, 0)
    (start, terms), (end, terms_after) = (error_of(w, target, gram, damping) for w in (began, weight))
    rounding = 1e-6 * (terms + terms_after) + 1e-35  # float32 sums of up to 600 terms, its smallest numbers
    assert (end <= start + rounding).all()
    assert (sums[:, 1] <= sums[:, 0]).all()
    assert ((sums - torch.stack([start, end], 1)).abs() <= rounding[:, None]).all()
    without = torch.empty_like(weight)
    ops.solve_rows_(without, mask, gram, target, damping, steps)
    assert torch.equal(without, weight)
    return weight


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_errors_are_never_larger(data):
    weight, gram, _ = layer = data.draw(layers(widths=WIDTHS))
    mask = row_masks(layer, data.draw(st.sampled_from(["wanda", "wanda", "random", "nothing", "everything"])))
    steps = data.draw(st.sampled_from([0, 1, 3, 10, 40]))
    got = check(weight, mask, gram, data.draw(st.sampled_from(DAMPINGS)), steps)
    nothing_to_do = ~mask.any(1) | (steps == 0)
    assert torch.equal(got[nothing_to_do], weight.masked_fill(mask, 0)[nothing_to_do])


@pytest.mark.parametrize("kind", ["correlated", "outliers", "zero channels", "equal columns"])
@pytest.mark.parametrize("damping", [0.03, 0.3, 1.0])
def test_many_steps_reach_the_exact_solution(kind, damping):
    target, mask, gram = layer_of(20, 96, kind)
    want = exact(target, mask, gram, damping)
    got = check(target, mask, gram, damping, 200)
    alive = gram.diagonal() > 0
    # a residual of 1e-5 of the first, and float32 rounding, times the matrix' condition of up to 1000
    assert (got - want)[:, alive].norm() <= 1e-3 * (want - target)[:, alive].norm()
    assert torch.equal(got[:, ~alive], target.masked_fill(mask, 0)[:, ~alive])
    (least, _), (reached, _) = error_of(want, target, gram, damping), error_of(got, target, gram, damping)
    (start, _) = error_of(target.masked_fill(mask, 0), target, gram, damping)
    assert (reached <= least + 1e-5 * start).all()


def test_ten_steps_come_near():
    target, mask, gram = layer_of(64, 576)
    start, ten, end = (error_of(check(target, mask, gram, 0.3, n), target, gram, 0.3)[0].sum() for n in (0, 10, 300))
    assert ten - end <= 0.01 * (start - end)
    assert ten < 0.7 * start


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_one_input_and_two_equal_channels(damping):
    """Gram matrices of rank one: without damping every solution is as good, and none may run away."""
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    target, mask, _ = layer_of(30, 40)
    got = check(target, mask, x.T @ x, damping, 50)
    if not damping:
        assert (((got - target) @ x[0]).square() <= 1e-8 * (target.abs() @ x[0].abs()).square()).all()
    assert (got - target).norm() <= 2 * target.norm()


@pytest.mark.parametrize("condition", [1e4, 1e8, 1e12])
@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.3])
def test_ill_conditioned(condition, damping):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(128, 128, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.logspace(0, -np.log10(condition), 128, dtype=torch.float64)
    target, mask, _ = layer_of(32, 128)
    for steps in (1, 10, 500):
        check(target, mask, ((basis * spectrum) @ basis.T).float(), damping, steps)


@pytest.mark.parametrize("gram", [-torch.eye(16), torch.ones(16, 16) - 2 * torch.eye(16), torch.zeros(16, 16)], ids=str)
def test_what_is_no_gram_matrix_changes_nothing_for_the_worse(gram):
    target, mask, _ = layer_of(8, 16)
    weight, sums = solved(target, mask, gram, 0.0)
    assert torch.isfinite(weight).all()
    assert not weight[mask].any()
    assert (sums[:, 1] <= sums[:, 0]).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("spoilt", ["target", "gram", "diagonal"])
def test_what_is_not_finite_spoils_no_other_row_and_no_kept_weight(bad, spoilt):
    """Of a target that row is spoilt, of a matrix all are: they stay the target's."""
    target, mask, gram = layer_of(8, 64)
    good = solved(target, mask, gram)[0]
    if spoilt == "target":
        target[3, mask[3].nonzero()[0]] = bad
    else:
        gram[5, 5 if spoilt == "diagonal" else 9] = bad
    weight = solved(target, mask, gram)[0]
    assert torch.isfinite(weight).all()
    assert not weight[mask].any()
    if spoilt == "target":
        assert torch.equal(weight[3], target[3].masked_fill(mask[3], 0))
        others = torch.arange(8) != 3
        assert torch.equal(weight[others], good[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_solved_in_float32_and_rounded(dtype):
    target, mask, gram = layer_of(40, 200, dtype=dtype)
    wide, narrow = solved(target.float(), mask, gram), solved(target, mask, gram)
    assert narrow[0].dtype == dtype
    assert torch.equal(narrow[0], wide[0].to(dtype))
    assert torch.equal(narrow[1][:, 0], wide[1][:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_that_costs_more_than_was_gained_is_not_done(dtype):
    """One small weight is pruned of each row: what makes up for it is less than the last bit of the others."""
    generator = np.random.default_rng(4)
    gram = gram_of("correlated", 64, generator)
    target = torch.from_numpy(generator.standard_normal((200, 64)) + 3).to(dtype)
    mask = torch.zeros(200, 64, dtype=torch.bool)
    mask[:, 7], target[:, 7] = True, torch.rand(200).to(dtype) * 0.01
    weight = check(target, mask, gram, 0.03, 10)
    stayed = (weight == target.masked_fill(mask, 0)).all(dim=1)
    assert stayed.any()
    assert not stayed.all()


def test_a_weight_that_overflows_its_dtype_stays():
    gram = torch.tensor([[1.0, 100.0], [100.0, 10000.0]])
    target = torch.tensor([[60000.0, 60000.0], [1.0, 1.0]]).half()  # it would have to be 100 times as large
    mask = torch.tensor([[False, True], [False, True]])
    weight, sums = solved(target, mask, gram, 0.0)
    assert weight.tolist() == [[60000.0, 0.0], [101.0, 0.0]]
    assert sums[0, 0] == sums[0, 1] > 0
    assert sums[1, 1] == 0


def test_a_large_damping_leaves_the_weights():
    target, mask, gram = layer_of(20, 96)
    weight = solved(target, mask, gram, 1e12)[0]
    assert torch.equal(weight, target.masked_fill(mask, 0))


@pytest.mark.parametrize("rows", [1, ROWS, 3 * ROWS + 37])
@pytest.mark.parametrize("cols", [33, 300])
def test_tiles_of_rows_and_threads_give_the_same_bits(rows, cols):
    target, mask, gram = layer_of(rows, cols)
    whole, sums = solved(target, mask, gram)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            for begin in range(0, rows, ROWS):
                tile = slice(begin, begin + ROWS)
                got = solved(target[tile], mask[tile], gram)
                assert torch.equal(got[0], whole[tile])
                assert torch.equal(got[1], sums[tile])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(150, 576), (64, 67), (5, 1536)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_reference_on_one_thread(shape, dtype):
    target, mask, gram = layer_of(*shape, "zero channels", dtype)
    weight, sums = solved(target, mask, gram)
    want, wanted_sums = torch.empty_like(weight), torch.empty_like(sums)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        reference.solve_rows_(want, mask, gram, target, sums=wanted_sums)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(weight, want)
    assert torch.equal(sums, wanted_sums)


def test_strides_change_nothing():
    target, mask, gram = layer_of(50, 96, dtype=torch.bfloat16)
    want, sums = solved(target, mask, gram)
    wide, large = torch.zeros(50, 100).bfloat16(), torch.zeros(97, 99)
    wide[:, :96], large[:96, :96] = target, gram
    for t, g in ((wide[:, :96], gram), (target.T.contiguous().T, large[:96, :96]), (target, gram.T)):
        weight = torch.empty_like(t)
        got = torch.empty_like(sums)
        ops.solve_rows_(weight, mask, g, t, 0.3, 10, got)
        assert torch.equal(weight, want)
        assert torch.equal(got, sums)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_nothing_to_do(shape):
    target = torch.zeros(shape)
    weight, sums = solved(target, torch.zeros(shape).bool(), torch.zeros(shape[1], shape[1]))
    assert weight.shape == shape
    assert not sums.any()
