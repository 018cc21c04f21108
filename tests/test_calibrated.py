"""quantize_rows: levels by a layer's outputs, against a plain loop in float64; and that packing finds them again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import WIDTHS
from test_quantized_model import KINDS, dequantize, sparse
from test_refine import gram_of, layers, row_masks
from test_solve import error_of, layer_of

from wanda_kernels.ops.solve import rows_of_tile
from wanda_kernels.packed.calibrated import DAMPING, PASSES, quantize_rows
from wanda_kernels.packed.values import ValueType, pack_quantized, quantize, quantized_before

FOURS = [ValueType(4, group) for group in (32, 64, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(weight, kind, gram, damping):
    """No row is worse than of the nearest levels; what is 0 stays so. Returns the levels, the errors of both."""
    before = weight.clone(), gram.clone()
    levels, scales = quantize_rows(weight, kind, gram, damping)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    assert levels.dtype == torch.int8
    assert scales.dtype == torch.bfloat16
    assert scales.shape == (len(weight), kind.scales(weight.shape[1]))
    most = 1 << (kind.bits - 1)
    assert levels.min() >= -most
    assert levels.max() <= most - 1
    assert not levels[weight == 0].any()
    ours, terms = error_of(dequantize(levels, scales), weight, gram, damping)
    nearest, terms_before = error_of(dequantize(*quantize(weight, kind)), weight, gram, damping)
    assert (ours <= nearest + 1e-6 * (terms + terms_before) + 1e-35).all()
    return levels, float(ours.sum()), float(nearest.sum())


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_row_is_worse_than_of_the_nearest_levels(data):
    weight, gram, _ = layer = data.draw(layers(widths=WIDTHS))
    mask = row_masks(layer, data.draw(st.sampled_from(["wanda", "random", "nothing", "everything"])))
    kind = data.draw(st.sampled_from([*FOURS, ValueType(8, 0)]))
    check(weight.masked_fill(mask, 0), kind, gram, data.draw(st.sampled_from([0.0, 0.3, 7.5])))


@pytest.mark.parametrize("kind", ["correlated", "outliers", "zero channels", "equal columns"])
@pytest.mark.parametrize("values", KINDS, ids=lambda kind: f"{kind.name}/{kind.group}")
def test_the_layers_error_is_smaller(kind, values):
    weight, mask, gram = layer_of(40, 200, kind)
    _, ours, nearest = check(weight.masked_fill(mask, 0), values, gram, 0.0)
    assert ours < 0.8 * nearest


def by_a_loop(weight, kind, gram, damping):
    """Passes over the columns in float64, one weight after the other: (levels, scales)."""
    levels, scales = quantize(weight, kind, gram.diagonal() * (1 + damping))
    damped = gram.double() + damping * gram.double().diagonal().diag()
    scale = scales.double().repeat_interleave(kind.columns(weight.shape[1]), dim=1)[:, : weight.shape[1]]
    for row, target, step in zip(levels, weight.double(), scale, strict=True):
        for column in PASSES * list(range(len(row))):
            if target[column] == 0 or step[column] == 0 or damped[column, column] == 0:
                continue
            others = row * step - target
            others[column] = 0
            best = target[column] - damped[column] @ others / damped[column, column]
            row[column] = (best / step[column]).round().clamp(-8, 7)
    return levels, scales


@pytest.mark.parametrize("kind", ["correlated", "zero channels"])
@pytest.mark.parametrize("cols", [17, 64, 150])
def test_levels_are_those_of_a_plain_loop(kind, cols):
    weight, mask, gram = layer_of(24, cols, kind)
    weight.masked_fill_(mask, 0)
    levels, _ = quantize_rows(weight, FOURS[0], gram)
    ours, nearest = by_a_loop(weight, FOURS[0], gram, DAMPING), quantize(weight, FOURS[0])
    errors = [error_of(dequantize(*one), weight, gram, DAMPING)[0] for one in (ours, nearest)]
    is_better = errors[0] < errors[1]
    assert is_better.sum() > 8
    assert torch.equal(levels, torch.where(is_better[:, None], ours[0], nearest[0]))


def test_channels_of_their_own_get_the_nearest_levels():
    """Without correlations, and with a large damping: each weight's error is its own."""
    weight = sparse(20, 128)
    diagonal = torch.rand(128) + 0.1
    scales = quantize(weight, FOURS[1], diagonal)[1]
    for gram in (diagonal.diag(), diagonal.diag() + 1e-4):
        levels, chosen = quantize_rows(weight, FOURS[1], gram, damping=1e7)
        assert torch.equal(chosen, scales)
        nearest = weight / scales.float().repeat_interleave(64, dim=1)
        assert ((levels - nearest.clamp(-8, 7)).abs() <= 0.5001).all()


def test_the_same_for_any_threads_and_any_share_of_the_rows(request):
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    tile = rows_of_tile(torch.device("cpu"))
    rows = 16 * tile + 2 * tile + 5
    weight, mask, gram = layer_of(rows, 130)
    weight.masked_fill_(mask, 0)
    torch.set_num_threads(1)
    expected = quantize_rows(weight, FOURS[1], gram)
    for count in (2, 3):
        torch.set_num_threads(count)
        for begin, end in ((0, rows), (tile, 3 * tile), (17 * tile, rows), (2 * tile, rows)):
            found = quantize_rows(weight[begin:end], FOURS[1], gram)
            assert all(torch.equal(one, whole[begin:end]) for one, whole in zip(found, expected, strict=True))


def test_what_cannot_be_rounded_is_refused():
    weight, gram = sparse(4, 64), torch.eye(64)
    with pytest.raises(ValueError, match=r"gram must be \[64, 64\] for a weight of 64 columns, got \[32, 32\]"):
        quantize_rows(weight, FOURS[0], torch.eye(32))
    weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="weight holds NaN or inf: it cannot be quantised"):
        quantize_rows(weight, FOURS[0], gram)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(FOURS), dtype=st.sampled_from(DTYPES), rows=st.integers(1, 40),
    cols=st.sampled_from([64, 320]),
    size=st.sampled_from([1e-4, 1.0, 300.0]), seed=st.integers(0, 99), form=st.sampled_from(["bitmap", "2:4", "dense"]),
)  # fmt: skip
def test_what_was_quantised_is_packed_as_it_was(kind, dtype, rows, cols, size, seed, form):
    """To the bit of the weight's dtype, though 16 bits round a level times its scale."""
    weight = sparse(rows, cols, seed, form == "2:4", dtype) * size
    gram = gram_of("correlated", cols, np.random.default_rng(seed))
    levels, scales = quantize_rows(weight, kind, gram)
    stored = dequantize(levels, scales).to(dtype)
    found = quantized_before(stored, kind)
    assert found is not None
    assert torch.equal(dequantize(*found).to(dtype), stored)
    assert torch.equal(found[0] != 0, stored != 0)
    packed = pack_quantized(stored, form, kind)[0]
    assert torch.equal(packed[-1].view(torch.bfloat16), found[1])


def test_other_weights_were_not():
    assert quantized_before(torch.zeros(3, 64), FOURS[0]) is not None
    assert quantized_before(sparse(40, 64), FOURS[0]) is None
    levels, scales = quantize(sparse(40, 64), FOURS[0])
    stored = dequantize(levels, scales)
    assert quantized_before(stored, ValueType(8, 0)) is None
    stored[39, 5] += 1e-6  # behind the first rows
    assert quantized_before(stored, FOURS[0]) is None
