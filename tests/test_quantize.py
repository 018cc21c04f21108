"""Weights to levels and scales, and levels to a bitmap's bytes: the reference's to the bit on every backend."""

from __future__ import annotations

import backends
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, KINDS, WIDTHS, same_bits, weight_of
from torch import Tensor

from wanda_kernels import _backend, ops, reference
from wanda_kernels.packed.format import bitmap_of, counts_of
from wanda_kernels.packed.values import ValueType, pack_kept
from wanda_kernels.reference.quantize import sum_of

BACKENDS = [name for name in backends.names() if name != "cuda-simt"]
FINITE = [*(kind for kind in KINDS if kind != "non-finite"), "huge", "smallest", "a few"]
COUNTS = ("none", "usual", "some zero", "far apart", "overflowing", "infinite")


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """[rows, cols], finite; now and then with rows that are not adjacent in memory."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, cols = draw(st.sampled_from([0, 1, 2, 5])), draw(st.sampled_from([*WIDTHS, 128, 129, 2049]))
    kind, dtype = draw(st.sampled_from(FINITE)), draw(st.sampled_from(DTYPES))
    largest = torch.finfo(dtype).max
    if kind == "huge":
        values = generator.uniform(-1, 1, (rows, cols)) * largest
    elif kind == "smallest":  # a few times the smallest denormal
        values = generator.integers(-40, 41, (rows, cols)) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    elif kind == "a few":
        values = np.where(generator.random((rows, cols)) < 0.02, generator.standard_normal((rows, cols)), 0)
    else:
        values = weight_of(kind, rows, cols, generator)
    weight = torch.from_numpy(np.asarray(values, dtype=np.float64)).clamp(-largest, largest).to(dtype)
    if draw(st.booleans()):
        storage = torch.full((rows, cols + 3), 7.0, dtype=dtype)
        storage[:, :cols] = weight
        weight = storage[:, :cols]
    return weight


def importance_of(kind: str, cols: int, seed: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    usual, some = torch.rand(cols, generator=generator), torch.rand(cols, generator=generator)
    if kind == "some zero":
        return usual.masked_fill(some < 0.4, 0)
    if kind == "far apart":
        return usual * 10 ** (some * 60 - 30)
    if kind == "overflowing":  # sums of all but the smallest errors do
        return usual * 3e38
    if kind == "infinite":  # no error is finite: the scale is 0
        return usual.masked_fill(some < 0.1, torch.inf)
    return None if kind == "none" else usual


def same_tensors(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(same_bits(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=300)
@given(
    weight=weights(), bits=st.sampled_from([8, 4]), group=st.sampled_from([0, 32, 64, 128]),
    counts=st.sampled_from(COUNTS), seed=st.integers(0, 99),
)  # fmt: skip
def test_levels_and_scales_are_the_references(backend, weight, bits, group, counts, seed):
    importance = importance_of(counts, weight.shape[1], seed)
    got = backends.implementation(backend, "quantize")(weight, bits, group, importance)
    expected = reference.quantize(weight, bits, group, importance)
    assert same_tensors(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "cols", "group"), [(1003, 200, 64), (3, 40000, 0), (1, 8192, 128)])
def test_any_number_of_threads_gives_the_same_bits(backend, rows, cols, group):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).bfloat16()
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(cols)) < 0.5
    expected = reference.quantize(weight, 4, group)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            levels, scales = backends.implementation(backend, "quantize")(weight, 4, group)
            assert same_bits(levels, expected[0])
            assert same_bits(scales, expected[1])
            packed = packed_by(backends.implementation(backend, "pack_kept_"), levels, mask, 4)
            assert torch.equal(packed, packed_by(reference.pack_kept_, levels, mask, 4))
    finally:
        torch.set_num_threads(threads)


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """What its levels and scales stand for."""
    levels, scales = reference.quantize(weight, bits, group)
    steps = scales.float().repeat_interleave(min(group or weight.shape[1], weight.shape[1]), dim=1)
    return (levels.float() * steps[:, : weight.shape[1]]).to(weight.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_rounded_to_4_bits_is_found(backend, dtype):
    weight = rounded(torch.randn(40, 200, generator=torch.Generator().manual_seed(0)).to(dtype), 4, 64)
    levels, scales, are_exact = backends.implementation(backend, "exact_levels")(weight, 4, 64)
    assert bool(are_exact)
    assert same_tensors((levels, scales), reference.exact_levels(weight, 4, 64)[:2])
    steps = scales.float().repeat_interleave(64, dim=1)[:, :200]
    assert torch.equal((levels.float() * steps).to(dtype), weight)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=200)
@given(
    weight=weights(), bits=st.sampled_from([8, 4]), group=st.sampled_from([0, 32, 64, 128]),
    change=st.sampled_from(["quantised", "one is not", "not"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_exact_levels_are_the_references(backend, weight, bits, group, change, seed):
    if change != "not":
        weight = rounded(weight, bits, group)
        if change == "one is not" and weight.numel():
            weight.view(-1)[seed % weight.numel()] += 3 * torch.finfo(weight.dtype).eps
    *got, are_exact = backends.implementation(backend, "exact_levels")(weight, bits, group)
    *expected, are_exact_there = reference.exact_levels(weight, bits, group)
    assert bool(are_exact) == bool(are_exact_there)
    assert not are_exact or same_tensors(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_has_no_levels(backend, bad):
    weight = torch.ones(3, 70).bfloat16()
    assert bool(backends.implementation(backend, "exact_levels")(weight, 4, 32)[2])
    weight[2, 69] = bad
    assert not bool(backends.implementation(backend, "exact_levels")(weight, 4, 32)[2])


def by_one(weight: list[float], divisors: list[float], most: int) -> tuple[list[int], float]:
    """A group's levels and scale in plain Python, with exact sums."""
    best, least = 0.0, float("inf")
    for divisor in divisors:
        tried = float(torch.tensor(max(map(abs, weight)) / divisor).bfloat16())
        error = sum((max(-most, min(most - 1, round(w / tried))) * tried - w) ** 2 for w in weight)
        best, least = (tried, error) if error < least else (best, least)
    return [max(-most, min(most - 1, round(w / best))) for w in weight], best


@pytest.mark.parametrize("bits", [8, 4])
def test_the_reference_is_what_it_says(bits):
    divisors = {8: [127, 127.5, 128, 129], 4: [6.5 + i / 4 for i in range(18)]}[bits]
    weight = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    levels, scales = reference.quantize(weight, bits, 32)
    for row, got, scale in zip(weight.tolist(), levels.tolist(), scales[:, 0].tolist(), strict=True):
        assert (got, scale) == by_one(row, divisors, 1 << (bits - 1))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 127, 128, 129, 385, 5000])
def test_a_sum_of_squares_has_its_terms(size):
    squares = torch.randint(0, 9, (2, 3, size)).float()
    assert torch.equal(sum_of(squares), squares.sum(dim=2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 69), (4, 130)])
def test_what_is_not_finite_is_refused(backend, bad, place):
    for dtype in DTYPES:
        weight = torch.randn(5, 131).to(dtype)
        weight[place] = bad
        for bits, group in ((8, 0), (4, 64)):
            with pytest.raises(ValueError, match="wanda::quantize: weight holds NaN or inf: it cannot be quantised"):
                backends.implementation(backend, "quantize")(weight, bits, group)


@pytest.mark.skipif(_backend.extension is None, reason="PyTorch's operations flush them")
def test_flushed_denormals_change_nothing():
    weight = torch.randn(4, 64) * 1e-38
    expected = ops.quantize(weight, 8, 32)
    assert bool((expected[1] != 0).all())
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor flushes no denormals")
        got = ops.quantize(weight, 8, 32)
    finally:
        torch.set_flush_denormal(False)
    assert same_tensors(got, expected)


def packed_by(pack_kept_, levels: Tensor, mask: Tensor, bits: int, before: int = 0) -> Tensor:
    """Bytes with some around them that must stay."""
    starts = pack_kept(levels, mask, bits)[1] + before
    values = torch.full((int(starts[-1]) + 9,), 77, dtype=torch.uint8)
    pack_kept_(values, levels, mask, starts, bits)
    assert bool((values[:before] == 77).all())
    assert bool((values[int(starts[-1]) :] == 77).all())
    return values


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150)
@given(data=st.data())
def test_kept_bytes_are_the_references(backend, data):
    bits, rows = data.draw(st.sampled_from([8, 4])), data.draw(st.sampled_from([1, 2, 3, 8, 17]))
    cols, seed = data.draw(st.sampled_from(WIDTHS)), data.draw(st.integers(0, 2**31))
    generator, most = torch.Generator().manual_seed(seed), 1 << (bits - 1)
    levels = torch.randint(-most, most, (rows, cols), generator=generator).to(torch.int8)
    mask = torch.rand(rows, cols, generator=generator) >= data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    mask[torch.rand(rows, generator=generator) < 0.2] = data.draw(st.booleans())  # rows of nothing, or of everything
    before = data.draw(st.sampled_from([0, 5]))
    got = packed_by(backends.implementation(backend, "pack_kept_"), levels, mask, bits, before)
    assert torch.equal(got, packed_by(reference.pack_kept_, levels, mask, bits, before))
    for row in range(rows):  # and what they should be
        begin = int(pack_kept(levels, mask, bits)[1][row if bits == 8 else row // 2]) + before
        stored = got[begin : begin + int(mask[row].sum())].int()
        stored = stored if bits == 8 else stored >> 4 if row % 2 else stored & 15
        assert torch.equal(stored - most, levels[row, mask[row]].int())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_starts_that_do_not_fit_are_refused_and_nothing_is_written_past_the_end(backend, bits):
    levels, mask = torch.zeros(6, 70, dtype=torch.int8), torch.rand(6, 70) < 0.5
    starts = pack_kept(levels, mask, bits)[1]
    values = torch.zeros(int(starts[-1]) + 1000, dtype=torch.uint8)
    wrong = [starts - 1, starts.flip(0), starts * 1000, starts.clone()]
    wrong[-1][1] -= 1
    for one in wrong:
        with pytest.raises(ValueError, match=r"wanda::pack_kept_: starts must be where the values of mask begin, . of"):
            backends.implementation(backend, "pack_kept_")(values, levels, mask, one, bits)
    with pytest.raises(ValueError, match="starts must be where the values of mask begin, 1 of its rows take other"):
        backends.implementation(backend, "pack_kept_")(values[: int(starts[-1]) - 1], levels, mask, starts, bits)
    assert not bool(values[int(starts[-1]) :].any())


def test_a_group_of_more_columns_than_there_are_is_a_row():
    weight = torch.randn(3, 40)
    assert same_tensors(ops.quantize(weight, 4, 64), ops.quantize(weight, 4, 0))
    assert ops.quantize(weight, 4, 64)[1].shape == (3, ValueType(4, 64).scales(40))


@pytest.mark.parametrize("cols", [8, 64, 72, 512, 1000, 4096])
def test_a_mask_is_counted_and_becomes_bits(cols):
    mask = torch.rand(9, cols, generator=torch.Generator().manual_seed(cols)) < 0.5
    mask[0], mask[1] = True, False
    assert torch.equal(counts_of(mask), mask.sum(dim=1))
    bits = (mask.view(9, -1, 8) << torch.arange(8)).sum(dim=2)
    assert torch.equal(bitmap_of(mask), bits.to(torch.uint8))
