"""prune_nm_ and nm_mask: every backend against the reference, bit for bit."""

from __future__ import annotations

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import copy_with_strides, matrices, same_bits, stacks

from wanda_kernels import ops, reference

BACKENDS = backends.names()
PATTERNS = ((1, 4), (2, 4), (4, 8), (1, 2), (3, 4), (2, 8), (7, 8), (5, 16), (16, 32), (3, 5), (10, 33), (20, 64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")
@settings(max_examples=40)
@given(data=st.data())
def test_mask_and_weights_equal_the_reference(backend, pattern, data):
    n, m = pattern
    weight, norm = data.draw(matrices(widths=(1, 2, 3, 5, 8, 16, 17, 33, 144), multiple=m))
    expected = reference.nm_mask(weight, norm, n, m)
    assert torch.equal(backends.implementation(backend, "nm_mask")(weight, norm, n, m), expected)
    assert (expected.view(weight.shape[0], -1, m).sum(dim=2) == m - n).all()

    pruned = copy_with_strides(weight)
    sums = torch.full((weight.shape[0], 2), torch.nan)
    backends.implementation(backend, "prune_nm_")(pruned, norm, n, m, sums)
    assert same_bits(pruned, weight.masked_fill(expected, 0))
    expected_sums = torch.empty_like(sums)
    reference.prune_nm_(weight.clone(), norm, n, m, expected_sums)
    # float32 sums of thousands of squares in another order
    torch.testing.assert_close(sums, expected_sums, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")
@settings(max_examples=20)
@given(data=st.data())
def test_a_stack_equals_its_matrices(backend, pattern, data):
    n, m = pattern
    weight, norm = data.draw(stacks(widths=(1, 2, 3, 5, 8, 16, 17, 33, 144), multiple=m))
    expected = torch.stack([reference.nm_mask(w, v, n, m) for w, v in zip(weight, norm, strict=True)])
    assert torch.equal(backends.implementation(backend, "nm_mask")(weight, norm, n, m), expected)

    expected_sums = torch.full((*weight.shape[:2], 2), torch.nan)
    sums = expected_sums.clone()
    for one, w, v in zip(expected_sums, weight, norm, strict=True):
        reference.prune_nm_(w.clone(), v, n, m, one)
    for score_sums in (None, sums):
        pruned = copy_with_strides(weight)
        backends.implementation(backend, "prune_nm_")(pruned, norm, n, m, score_sums)
        assert same_bits(pruned, weight.masked_fill(expected, 0))
    # float32 sums of thousands of squares in another order
    torch.testing.assert_close(sums, expected_sums, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)], ids=lambda p: f"{p[0]}:{p[1]}")
def test_wide_rows(backend, dtype, pattern):
    torch.manual_seed(1)
    weight = (torch.randn(40, 11008) * 4).round().to(dtype) / 4
    norm = torch.rand(11008) + 0.1
    pruned = weight.clone()
    backends.implementation(backend, "prune_nm_")(pruned, norm, *pattern)
    assert same_bits(pruned, weight.masked_fill(reference.nm_mask(weight, norm, *pattern), 0))


def test_every_tie_pattern_of_2_to_4():
    """All 3^4 orders of three values in a group, against torch.sort."""
    values = torch.cartesian_prod(*[torch.tensor([0.0, 1.0, 2.0])] * 4)
    assert torch.equal(ops.nm_mask(values, torch.ones(4), 2, 4), reference.nm_mask(values, torch.ones(4), 2, 4))


def test_ties_go_to_the_lowest_column():
    assert ops.nm_mask(torch.ones(1, 8), torch.ones(8), 2, 4).tolist() == [[True, True, False, False] * 2]
