"""add_sqnorm_: every backend against the reference, and all against float64."""

from __future__ import annotations

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wanda_kernels import ops, reference

BACKENDS = backends.names()
CPU = [name for name in BACKENDS if name.startswith("cpu")]
# What adds up segments: Triton by its interpreter, too.
SEGMENTED = ["reference", *BACKENDS, *(name for name in backends.statistics_names() if name not in BACKENDS)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw_inputs(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    sequences = data.draw(st.integers(1, 4))
    tokens = data.draw(st.sampled_from([0, 1, 2, 7, 8, 9, 63, 64, 65, 130]))
    cols = data.draw(st.sampled_from([1, 2, 15, 16, 31, 33, 64, 100, 257]))
    x = (torch.randn(sequences, tokens, cols) * torch.rand(cols) * 10).to(data.draw(st.sampled_from(DTYPES)))
    return sequences, tokens, cols, x


@pytest.mark.parametrize("backend", CPU)
@settings(max_examples=120)
@given(data=st.data())
def test_same_bits_as_the_reference(backend, data):
    sequences, tokens, cols, x = draw_inputs(data)
    mask = None
    if data.draw(st.booleans()):
        mask = torch.rand(sequences, tokens) < 0.6
        x[~mask] = torch.nan  # padding may hold anything
    for shape in ((sequences, cols), (cols,)):
        start = torch.rand(shape)
        expected, got = start.clone(), start.clone()
        reference.add_sqnorm_(expected, x, mask)
        backends.implementation(backend, "add_sqnorm_")(got, x, mask)
        assert torch.equal(got, expected)
        if len(shape) == 2 or sequences == 1:
            flat = start.clone()
            flat_mask = None if mask is None else mask.flatten()
            backends.implementation(backend, "add_sqnorm_")(flat, x.flatten(0, 1), flat_mask)
            assert torch.equal(flat, expected)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_pass_through_several_chunks(backend, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 9000, 40).to(dtype)
    mask = torch.rand(2, 9000) < 0.9
    expected, got = torch.zeros(2, 40), torch.zeros(2, 40)
    reference.add_sqnorm_(expected, x, mask)
    backends.implementation(backend, "add_sqnorm_")(got, x, mask)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["reference", *CPU])
def test_equals_torch_norm_as_the_official_code_calls_it(backend):
    """The masks of the official code stand on these very bits."""
    torch.manual_seed(0)
    for tokens, cols in ((512, 576), (2048, 100)):
        x = torch.randn(tokens, cols) * torch.rand(cols) * 3
        sqnorm = torch.zeros(cols)
        backends.implementation(backend, "add_sqnorm_")(sqnorm, x)
        official = torch.norm(x.t(), p=2, dim=1)
        assert torch.equal(sqnorm.double().sqrt().float(), official)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-6)])
def test_error_against_float64(backend, dtype, bound):
    """bfloat16: the square of an odd 8-bit significand ends in the bits 001, so rounding it off mostly rounds down,
    which adds up to -4e-6; torch.norm, and with it the official code, does the same."""
    torch.manual_seed(0)
    sqnorm = torch.zeros(64)
    exact = torch.zeros(64, dtype=torch.float64)
    for _ in range(16):
        x = torch.randn(8, 2048, 64).to(dtype)
        backends.implementation(backend, "add_sqnorm_")(sqnorm, x)
        exact += x.double().square().sum(dim=(0, 1))
    # 262,144 tokens; 128 additions to the shared float32 sum
    assert (sqnorm.double() / exact - 1).abs().max() <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_and_threads_do_not_change_a_bit(backend):
    torch.manual_seed(0)
    x = torch.randn(8, 100, 200)
    whole = torch.zeros(8, 200)
    add = backends.implementation(backend, "add_sqnorm_")
    add(whole, x)
    threads = torch.get_num_threads()
    try:
        for size in (1, 3, 8):
            torch.set_num_threads(size)
            parts = torch.zeros(8, 200)
            for first in range(0, 8, size):
                rows = parts[first : first + size].clone()
                add(rows, x[first : first + size])
                parts[first : first + size] = rows
            assert torch.equal(parts, whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", CPU)
def test_strided_inputs(backend):
    torch.manual_seed(0)
    storage = torch.randn(3, 50, 90)
    for x in (storage[:, ::2, 5:70], storage.transpose(1, 2), storage[:, :, ::3], storage[:1].expand(3, 50, 90)):
        expected, got = torch.zeros(3, x.shape[2]), torch.zeros(3, x.shape[2])
        reference.add_sqnorm_(expected, x)
        backends.implementation(backend, "add_sqnorm_")(got, x)
        assert torch.equal(got, expected)


# Where segments end, of the rows of x: empty ones, single rows, all rows in one, rows behind the last end.
ENDS = (
    [10, 10, 11, 75, 75],
    [0, 0, 130, 130],
    [0, 0, 0],
    [130],
    [1, 2, 3, 4, 67, 130],
    [],
)


@pytest.mark.parametrize("backend", SEGMENTED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_a_segment_has_the_bits_of_its_rows_alone(backend, dtype, ends):
    torch.manual_seed(len(ends))
    add = backends.implementation(backend, "add_sqnorm_")
    for cols in (1, 33, 256):
        x = (torch.randn(130, cols) * 3).to(dtype)
        got = torch.rand(len(ends), cols)
        expected = got.clone()
        for row, begin, end in zip(expected, [0, *ends], ends, strict=False):
            if end > begin:
                add(row, x[begin:end])
        add(got, x, None, torch.tensor(ends, dtype=torch.int32))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", CPU)
@settings(max_examples=60)
@given(data=st.data())
def test_segments_equal_the_reference_for_any_number_of_threads(backend, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    rows, cols = data.draw(st.sampled_from([0, 1, 7, 300])), data.draw(st.sampled_from([1, 31, 64, 257, 1000]))
    counts = torch.rand(data.draw(st.integers(1, 40))) ** data.draw(st.sampled_from([0.1, 1, 30]))  # even to skewed
    ends = (counts.cumsum(0) / counts.sum() * data.draw(st.sampled_from([1.0, 0.8])) * rows).int()
    x = torch.randn(rows, cols).to(data.draw(st.sampled_from(DTYPES)))
    x = x if data.draw(st.booleans()) else x.t().contiguous().t()
    start = torch.rand(len(ends), cols)
    expected = start.clone()
    reference.add_sqnorm_(expected, x, None, ends)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            got = start.clone()
            backends.implementation(backend, "add_sqnorm_")(got, x, None, ends)
            assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", CPU)
def test_long_segments_pass_through_several_chunks(backend):
    torch.manual_seed(0)
    x = torch.randn(13000, 40)
    ends = torch.tensor([100, 4196, 4197, 13000], dtype=torch.int32)
    expected, got = torch.zeros(4, 40), torch.zeros(4, 40)
    reference.add_sqnorm_(expected, x, None, ends)
    backends.implementation(backend, "add_sqnorm_")(got, x, None, ends)
    assert torch.equal(got, expected)


def test_nan_counts_where_the_mask_lets_it():
    x = torch.tensor([[[1.0, torch.nan], [2.0, 3.0]]])
    sqnorm = torch.zeros(1, 2)
    ops.add_sqnorm_(sqnorm, x)
    assert sqnorm[0, 0] == 5
    assert sqnorm[0, 1].isnan()
