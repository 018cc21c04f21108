"""calibrate_levels_: every backend against the reference and against float64, and what better levels must be."""

from __future__ import annotations

import backends
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, WIDTHS
from test_quantized_model import dequantize
from test_refine import layers, row_masks
from test_solve import error_of, layer_of

from wanda_kernels import ops, reference
from wanda_kernels.packed.values import ValueType, quantize

BACKENDS = [name for name in backends.names() if name != "cuda-simt"]
KINDS = [ValueType(4, 32), ValueType(4, 128), ValueType(8, 0), ValueType(8, 64)]
ROWS = reference.gram.SOLVED_ROWS["cpu"]


def calibrated(weight, kind, gram, damping=1.0, passes=3, by=ops.calibrate_levels_, start=None):
    """(levels, scales, errors), from the nearest levels or ``start``."""
    levels, scales = start or quantize(weight, kind)
    levels, errors = levels.clone(), torch.full((len(weight),), torch.nan, dtype=torch.float64)
    by(levels, weight, scales, gram, kind.bits, damping, passes, errors)
    return levels, scales, errors


def whole_numbers(rows, cols, kind, generator):
    """(weight, (levels, scales), gram): all that a step makes of them, float32 holds, but for quotients by powers of
    two."""
    gram = torch.from_numpy(generator.integers(-2, 3, (cols, cols))).float()
    gram = (gram + gram.T).fill_diagonal_(8)
    gram[:, generator.random(cols) < 0.1] = 0
    gram = gram * (gram != 0).T
    weight = torch.from_numpy(generator.integers(-40, 41, (rows, cols))).float() / 8
    weight[torch.from_numpy(generator.random((rows, cols)) < 0.3)] = 0
    scales = torch.from_numpy(generator.choice([0.5, 1.0, 2.0], (rows, kind.scales(cols)))).bfloat16()
    scales[torch.from_numpy(generator.random(scales.shape) < 0.1)] = 0
    levels = (dequantize(torch.ones(rows, cols).to(torch.int8), scales) != 0) * (weight.round() * 0.6)
    return weight, (levels.clamp(-8, 7).to(torch.int8), scales), gram


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name}/{kind.group}")
@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (96, 64), (97, 65), (30, 300)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_of_the_reference_where_nothing_is_rounded(backend, shape, kind):
    weight, start, gram = whole_numbers(*shape, kind, np.random.default_rng(shape[0]))
    for passes in (0, 1, 3):
        want = calibrated(weight, kind, gram, 1.0, passes, reference.calibrate_levels_, start)
        got = calibrated(weight, kind, gram, 1.0, passes, backends.implementation(backend, "calibrate_levels_"), start)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
        assert torch.equal(got[0], start[0]) == (passes == 0 or shape == (1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_of_the_reference(backend, dtype):
    """But for those next to the middle of two, which float32 sums in another order decide."""
    weight, mask, gram = layer_of(150, 200, "zero channels", dtype)
    weight.masked_fill_(mask, 0)
    kind = KINDS[0]
    levels, _, errors = calibrated(weight, kind, gram, by=backends.implementation(backend, "calibrate_levels_"))
    want, _, wanted = calibrated(weight, kind, gram, by=reference.calibrate_levels_)
    assert (levels != want).double().mean() < 1e-3
    torch.testing.assert_close(errors, wanted, rtol=1e-3, atol=0)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_pass_makes_an_error_larger(data):
    """And errors are those in float64; what is pruned stays so."""
    weight, gram, _ = layer = data.draw(layers(widths=WIDTHS))
    mask = row_masks(layer, data.draw(st.sampled_from(["wanda", "random", "nothing", "everything"])))
    weight = weight.masked_fill(mask, 0)
    kind, damping = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from([0.0, 0.3, 7.5]))
    before = weight.clone(), gram.clone()
    least = None
    for passes in range(4):
        levels, scales, errors = calibrated(weight, kind, gram, damping, passes)
        exact, terms = error_of(dequantize(levels, scales), weight, gram, damping)
        rounding = 1e-6 * terms + 1e-35
        assert ((errors - exact).abs() <= rounding).all()
        assert not levels[weight == 0].any()
        assert least is None or (exact <= least + rounding).all()
        least = exact + rounding
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def test_the_same_for_any_threads_and_any_share_of_the_rows(request):
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    rows = 3 * ROWS + 5
    weight, _, gram = layer_of(rows, 130)
    want = calibrated(weight, KINDS[0], gram)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for begin, end in ((0, rows), (ROWS, 3 * ROWS), (2 * ROWS, rows), (ROWS, ROWS + 7)):
            found = calibrated(weight[begin:end], KINDS[0], gram)
            assert all(torch.equal(one, whole[begin:end]) for one, whole in zip(found, want, strict=True))


def test_strides_change_nothing():
    weight, _, gram = layer_of(50, 96)
    want, scales, errors = calibrated(weight, KINDS[0], gram)
    start = quantize(weight, KINDS[0])[0]
    wide, large, whole = torch.zeros(50, 100), torch.zeros(97, 99), torch.zeros(50, 100, dtype=torch.int8)
    wide[:, :96], large[:96, :96] = weight, gram
    for w, g in ((wide[:, :96], gram), (weight.T.contiguous().T, large[:96, :96]), (weight, gram.T)):
        levels, got = whole[:, 2:98].copy_(start), torch.empty_like(errors)
        ops.calibrate_levels_(levels, w, scales.T.contiguous().T, g, 4, errors=got)
        assert torch.equal(levels, want)
        assert torch.equal(got, errors)
    assert not whole[:, :2].any()
    assert not whole[:, 98:].any()


def test_nothing_to_do():
    levels, _, errors = calibrated(torch.zeros(0, 8), KINDS[0], torch.eye(8), start=(
        torch.zeros(0, 8, dtype=torch.int8), torch.zeros(0, 1).bfloat16()
    ))  # fmt: skip
    assert levels.shape == (0, 8)
    assert errors.shape == (0,)
