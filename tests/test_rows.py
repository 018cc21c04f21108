"""prune_rows_ and row_mask: every backend against the reference, bit for bit."""

from __future__ import annotations

import backends
import pytest
import torch
from hypothesis import given, settings
from strategies import MORE, copy_with_strides, matrices, same_bits, sparsities, stacks, weight_of

from wanda_kernels import ops, reference

BACKENDS = backends.names()


def check_against_the_reference(backend, matrix, sparsity):
    weight, norm = matrix
    expected = reference.row_mask(weight, norm, sparsity)
    assert torch.equal(backends.implementation(backend, "row_mask")(weight, norm, sparsity), expected)
    assert (expected.sum(dim=1) == int(weight.shape[1] * sparsity)).all()

    pruned = copy_with_strides(weight)
    backends.implementation(backend, "prune_rows_")(pruned, norm, sparsity)
    assert same_bits(pruned, weight.masked_fill(expected, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=250)
@given(matrix=matrices(), sparsity=sparsities())
def test_mask_and_weights_equal_the_reference(backend, matrix, sparsity):
    check_against_the_reference(backend, matrix, sparsity)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda-simt"])  # test_simt.py has its own
@settings(max_examples=1000 * MORE)
@given(matrix=matrices(), sparsity=sparsities())
def test_thousands_of_rows(backend, matrix, sparsity):
    check_against_the_reference(backend, matrix, sparsity)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cols", [4096, 5120, 8192, 11008, 13824, 14336, 22016, 28672, 53248, 65535, 65537, 100003])
def test_wide_rows(backend, dtype, cols):
    torch.manual_seed(cols)
    weight = torch.randn(3, cols).to(dtype)
    weight[1] = weight[1].round()  # ties by the thousand
    norm = torch.rand(cols) + 0.1
    for sparsity in (0.5, 0.9):
        pruned = weight.clone()
        backends.implementation(backend, "prune_rows_")(pruned, norm, sparsity)
        assert same_bits(pruned, weight.masked_fill(reference.row_mask(weight, norm, sparsity), 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_and_threads_give_the_same_bits(backend):
    torch.manual_seed(0)
    weight = torch.randn(700, 333)
    norm = torch.rand(333)
    expected = reference.row_mask(weight, norm, 0.5)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(backends.implementation(backend, "row_mask")(weight, norm, 0.5), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(matrix=matrices(), sparsity=sparsities())
def test_score_sums(backend, matrix, sparsity):
    weight, norm = matrix
    expected = torch.full((weight.shape[0], 2), torch.nan)
    reference.prune_rows_(weight.clone(), norm, sparsity, expected)
    sums = torch.full((weight.shape[0], 2), torch.nan)
    pruned = copy_with_strides(weight)
    backends.implementation(backend, "prune_rows_")(pruned, norm, sparsity, sums)
    # float32 sums of up to 1536 squares in another order
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=0, equal_nan=True)
    assert same_bits(pruned, weight.masked_fill(reference.row_mask(weight, norm, sparsity), 0))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@settings(max_examples=100)
@given(stack=stacks(), sparsity=sparsities())
def test_a_stack_equals_its_matrices(backend, stack, sparsity):
    weight, norm = stack
    masks = [reference.row_mask(w, n, sparsity) for w, n in zip(weight, norm, strict=True)]
    expected = torch.stack(masks)
    assert torch.equal(backends.implementation(backend, "row_mask")(weight, norm, sparsity), expected)

    expected_sums = torch.full((*weight.shape[:2], 2), torch.nan)
    sums = expected_sums.clone()
    for one, w, n in zip(expected_sums, weight, norm, strict=True):
        reference.prune_rows_(w.clone(), n, sparsity, one)
    for score_sums in (None, sums):
        pruned = copy_with_strides(weight)
        backends.implementation(backend, "prune_rows_")(pruned, norm, sparsity, score_sums)
        assert same_bits(pruned, weight.masked_fill(expected, 0))
    # float32 sums of up to 1536 squares in another order
    torch.testing.assert_close(sums, expected_sums, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [2048, 2880, 4096])
def test_a_wide_stack_for_any_number_of_threads(backend, dtype, cols):
    torch.manual_seed(0)
    weight, norm = torch.randn(5, 7, cols).to(dtype), torch.rand(5, cols) + 0.1
    norm[2], norm[3, 0] = -1.0, torch.inf  # one that no fast path takes between others
    expected = reference.row_mask(weight, norm, 0.5)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(backends.implementation(backend, "row_mask")(weight, norm, 0.5), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gaps", [(0, 16), (1, 0), (2, 3)])
def test_memory_around_the_rows_of_a_stack_is_not_touched(backend, gaps):
    storage = torch.full((3, 4 + gaps[0], 80 + gaps[1]), 7.0)
    weight = storage[:, :4, :80]
    weight.copy_(torch.randn(3, 4, 80))
    backends.implementation(backend, "prune_rows_")(weight, torch.ones(3, 80), 0.5)
    assert ((weight == 0).sum(dim=2) == 40).all()
    weight.fill_(7)
    assert (storage == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_between_rows_is_not_touched(backend):
    storage = torch.full((5, 100), 7.0)
    weight = storage[:, 3:80]
    weight.copy_(torch.randn(5, 77))
    backends.implementation(backend, "prune_rows_")(weight, torch.ones(77), 0.5)
    assert (storage[:, :3] == 7).all()
    assert (storage[:, 80:] == 7).all()
    assert ((storage[:, 3:80] == 0).sum(dim=1) == 38).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_weights_are_handled(backend):
    torch.manual_seed(0)
    weight = torch.randn(40, 24).t()
    norm = torch.rand(40)
    expected = weight.masked_fill(reference.row_mask(weight, norm, 0.5), 0)
    backends.implementation(backend, "prune_rows_")(weight, norm, 0.5)
    assert torch.equal(weight, expected)


def test_ties_go_to_the_lowest_column():
    mask = ops.row_mask(torch.ones(1, 8), torch.ones(8), 0.5)
    assert mask.tolist() == [[True] * 4 + [False] * 4]


def test_nan_is_the_largest_score():
    weight = torch.tensor([[float("nan"), 3.0, float("inf"), 1.0]])
    assert ops.row_mask(weight, torch.ones(4), 0.75).tolist() == [[False, True, True, True]]


def test_pruned_weights_are_positive_zero():
    weight = torch.tensor([[-0.0, -1e-9, 1.0, 2.0]])
    ops.prune_rows_(weight, torch.ones(4), 0.5)
    assert not torch.signbit(weight).any()


def test_kept_scores_are_at_least_the_pruned_ones():
    generator = __import__("numpy").random.default_rng(0)
    weight = torch.from_numpy(weight_of("heavy tail", 50, 200, generator))
    norm = torch.rand(200)
    mask = ops.row_mask(weight, norm, 0.3)
    score = weight.abs() * norm
    assert (score.masked_fill(mask, torch.inf).amin(1) >= score.masked_fill(~mask, -torch.inf).amax(1)).all()


def test_empty_matrices():
    assert ops.row_mask(torch.empty(0, 8), torch.ones(8), 0.5).shape == (0, 8)
    assert ops.row_mask(torch.empty(8, 0), torch.ones(0), 0.5).shape == (8, 0)
    for shape in ((0, 8, 4), (3, 0, 4), (3, 8, 0)):
        assert ops.row_mask(torch.empty(shape), torch.ones(shape[0], shape[2]), 0.5).shape == shape
        ops.prune_rows_(torch.empty(shape), torch.ones(shape[0], shape[2]), 0.5, torch.empty(*shape[:2], 2))
