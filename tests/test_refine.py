"""refine_rows_ and refine_nm_: every backend against the reference, bit for bit, and what a better mask must be."""

from __future__ import annotations

import backends
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, KINDS, WIDTHS, weight_of

from wanda_kernels import ops, reference

BACKENDS = backends.names()
GRAMS = (
    "correlated",
    "outliers",
    "equal columns",
    "opposite columns",
    "zero channels",
    "zeros",
    "few inputs",
    "denormal",
)
DAMPINGS = (0.0, 0.3, 1.0, 7.5)
PATTERNS = ((2, 4), (1, 4), (4, 8), (1, 2), (3, 5), (20, 64))


def gram_of(kind, cols, generator):
    """X^T X, float32, of correlated inputs."""
    tokens = 3 if kind == "few inputs" else 2 * cols
    rank = max(1, cols // 4)
    x = generator.standard_normal((tokens, rank)) @ generator.standard_normal((rank, cols)) / rank**0.5
    x += 0.3 * generator.standard_normal((tokens, cols)) + generator.standard_normal(cols)
    some = generator.random(cols) < 0.2
    if kind == "outliers":
        x[:, some] *= 1000
    elif kind == "equal columns":
        x[:, some] = x[:, :1]
    elif kind == "opposite columns":
        x[:, some] = -x[:, :1]
    elif kind == "zero channels":
        x[:, some] = 0
    elif kind == "zeros":
        x[:] = 0
    elif kind == "denormal":
        x *= 1e-21
    x = torch.from_numpy(x)
    return (x.T @ x).float()


@st.composite
def layers(draw, widths=WIDTHS, multiple=1, most=600):
    """(weight, gram, generator)."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cols = draw(st.sampled_from([width * multiple for width in widths if width * multiple < most]))
    rows = draw(st.integers(1, 6))
    kind = draw(st.sampled_from([kind for kind in KINDS if kind != "non-finite"]))
    with np.errstate(over="ignore"):
        values = weight_of(kind, rows, cols, generator).astype(np.float32)
    weight = torch.from_numpy(values).clamp(-60000, 60000).to(draw(st.sampled_from(DTYPES)))
    return weight, gram_of(draw(st.sampled_from(GRAMS)), cols, generator), generator


def row_masks(layer, kind):
    weight, gram, generator = layer
    if kind == "random":
        return torch.from_numpy(generator.random(weight.shape) < generator.random())
    if kind == "wanda":
        return reference.row_mask(weight, gram.diagonal().sqrt(), 0.5)
    return torch.full(weight.shape, kind == "everything")


def errors(mask, weight, gram, damping):
    """Each row's error, and what the absolute values of its terms add up to: rounding is a share of that."""
    damped = gram.double() + damping * gram.double().diagonal().diag()
    pruned = weight.double() * mask
    return ((pruned @ damped) * pruned).sum(1), ((pruned.abs() @ damped.abs()) * pruned.abs()).sum(1)


def check(backend, operator, mask, weight, gram, *args):
    """The same mask, number of swaps and sums as the reference's; never a larger error. Returns mask and swaps."""
    *pattern, damping, most = args
    got, want = mask.clone(), mask.clone()
    sums, wanted_sums = (torch.full((len(weight), 2), torch.nan, dtype=torch.float64) for _ in range(2))
    kept_weight, kept_gram = weight.clone(), gram.clone()
    wanted = getattr(reference, operator)(want, weight, gram, *pattern, damping, most, wanted_sums)
    swaps = backends.implementation(backend, operator)(got, weight, gram, *pattern, damping, most, sums)
    assert swaps.dtype == torch.int32
    assert torch.equal(swaps, wanted)
    assert torch.equal(got, want)
    assert torch.equal(sums, wanted_sums)
    assert torch.equal(weight, kept_weight)
    assert torch.equal(gram, kept_gram)
    without = mask.clone()
    backends.implementation(backend, operator)(without, weight, gram, *pattern, damping, most, None)
    assert torch.equal(without, got)

    assert torch.equal(got.sum(1), mask.sum(1))
    (before, terms), (after, terms_after) = errors(mask, weight, gram, damping), errors(got, weight, gram, damping)
    rounding = 1e-12 * (terms + terms_after)  # float64 sums of up to 600 terms
    assert (after <= before + rounding).all()
    assert ((sums - torch.stack([before, after], 1)).abs() <= rounding[:, None]).all()
    assert torch.equal(mask != got, (mask != got) & (swaps > 0)[:, None])
    return got, swaps


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_rows_equal_the_reference_and_are_no_worse(backend, data):
    layer = data.draw(layers(most=200 if backend == "cuda-simt" else 600))  # test_simt_refine.py has wide ones
    mask = row_masks(layer, data.draw(st.sampled_from(["wanda", "wanda", "random", "nothing", "everything"])))
    most = data.draw(st.sampled_from([None, None, 0, 1, 5, 1000]))
    _, swaps = check(backend, "refine_rows_", mask, *layer[:2], data.draw(st.sampled_from(DAMPINGS)), most)
    assert (swaps <= (max(1, mask.shape[1] // 16) if most is None else most)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_groups_equal_the_reference_and_are_no_worse(backend, pattern, data):
    n, m = pattern
    weight, gram, _ = layer = data.draw(layers(widths=(1, 2, 3, 5, 8, 16, 17, 33, 64), multiple=m))
    score = row_masks(layer, "random").float() if data.draw(st.booleans()) else weight
    mask = reference.nm_mask(score, gram.diagonal().sqrt(), n, m)
    sweeps = data.draw(st.sampled_from([0, 1, 4, 50]))
    got, _ = check(backend, "refine_nm_", mask, weight, gram, n, m, data.draw(st.sampled_from(DAMPINGS)), sweeps)
    assert (got.view(len(got), -1, m).sum(2) == m - n).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 1536), (3, 2053), (1, 2304), (101, 300), (193, 67)])
def test_blocks_of_rows_and_of_columns(backend, shape):
    generator = np.random.default_rng(0)
    gram = gram_of("outliers", shape[1], generator)
    weight = torch.from_numpy(generator.standard_normal(shape)).float()
    mask = reference.row_mask(weight, gram.diagonal().sqrt(), 0.5)
    _, swaps = check(backend, "refine_rows_", mask, weight, gram, 0.3, 4 if backend == "cuda-simt" else 20)
    assert swaps.any()
    if shape[1] % 4 == 0:
        mask = reference.nm_mask(weight, gram.diagonal().sqrt(), 2, 4)
        _, swaps = check(backend, "refine_nm_", mask, weight, gram, 2, 4, 0.3, 1)
        assert swaps.any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("kind", ["correlated", "outliers"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_damping_leaves_wandas_mask(backend, kind, dtype):
    generator = np.random.default_rng(1)
    gram = gram_of(kind, 512, generator)
    weight = torch.from_numpy(generator.standard_normal((64, 512))).to(dtype)
    norm = gram.diagonal().sqrt()
    rows, groups = reference.row_mask(weight, norm, 0.5), reference.nm_mask(weight, norm, 2, 4)
    for damping in (1e7, 1e12):
        mask = rows.clone()
        swaps = backends.implementation(backend, "refine_rows_")(mask, weight, gram, damping)
        assert torch.equal(mask, rows)
        assert not swaps.any()
        mask = groups.clone()
        swaps = backends.implementation(backend, "refine_nm_")(mask, weight, gram, 2, 4, damping)
        assert torch.equal(mask, groups)
        assert not swaps.any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_inputs_that_cancel_are_pruned_together(backend):
    """What un-pruning gains is worth nothing here; greedy finds the pair by what to prune first."""
    x = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    weight = torch.tensor([[1.0, 1.0, 0.5, 9.0]])
    for operator, pattern in (("refine_rows_", ()), ("refine_nm_", (2, 4))):
        mask = torch.tensor([[True, False, True, False]])
        sums = torch.zeros(1, 2, dtype=torch.float64)
        swaps = backends.implementation(backend, operator)(mask, weight, x.T @ x, *pattern, 0.0, 4, sums)
        assert mask.tolist() == [[True, True, False, False]]
        assert sums.tolist() == [[1.25, 0.0]]
        assert swaps.tolist() == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_strides_give_the_same_bits(backend):
    generator = np.random.default_rng(2)
    gram = gram_of("correlated", 96, generator)
    weight = torch.from_numpy(generator.standard_normal((300, 96))).bfloat16()
    mask = reference.row_mask(weight, gram.diagonal().sqrt(), 0.5)
    want = mask.clone()
    swaps = reference.refine_rows_(want, weight, gram)
    wide, large = torch.zeros(300, 100).bfloat16(), torch.zeros(97, 99)
    wide[:, :96], large[:96, :96] = weight, gram
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for w, g in ((weight, gram), (wide[:, :96], large[:96, :96]), (weight.T.contiguous().T, gram.T)):
                got = mask.clone()
                assert torch.equal(backends.implementation(backend, "refine_rows_")(got, w, g), swaps)
                assert torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_changes_no_count(backend, bad):
    generator = np.random.default_rng(3)
    for spoilt in ("weight", "gram"):
        gram = gram_of("correlated", 64, generator)
        weight = torch.from_numpy(generator.standard_normal((8, 64))).float()
        mask = reference.nm_mask(weight, gram.diagonal().sqrt(), 2, 4)
        (weight if spoilt == "weight" else gram)[3, 5] = bad
        for operator, pattern in (("refine_rows_", ()), ("refine_nm_", (2, 4))):
            got = mask.clone()
            backends.implementation(backend, operator)(got, weight, gram, *pattern, 0.3, 4)
            assert torch.equal(got.sum(1), mask.sum(1))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_nothing_to_do(backend, shape):
    mask, weight, gram = torch.zeros(shape).bool(), torch.zeros(shape), torch.zeros(shape[1], shape[1])
    sums = torch.full((shape[0], 2), torch.nan, dtype=torch.float64)
    swaps = backends.implementation(backend, "refine_rows_")(mask, weight, gram, 0.3, None, sums)
    assert swaps.tolist() == [0] * shape[0]
    assert not sums.any()


def test_half_the_error_of_correlated_inputs():
    generator = np.random.default_rng(4)
    gram = gram_of("correlated", 512, generator)
    weight = torch.from_numpy(generator.standard_normal((32, 512))).float()
    sums = torch.zeros(32, 2, dtype=torch.float64)
    ops.refine_rows_(reference.row_mask(weight, gram.diagonal().sqrt(), 0.5), weight, gram, sums=sums)
    assert sums[:, 1].sum() < 0.6 * sums[:, 0].sum()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_from_wandas_mask_the_error_without_damping_is_no_larger_either(data):
    weight, gram, _ = layer = data.draw(layers(widths=(4, 8, 16, 33, 64, 100)))
    damping, cols = data.draw(st.sampled_from(DAMPINGS)), weight.shape[1]
    before = row_masks(layer, "wanda")
    after = before.clone()
    ops.refine_rows_(after, weight, gram, damping)
    compared = [(before, after)]
    if cols % 4 == 0:
        groups = reference.nm_mask(weight, gram.diagonal().sqrt(), 2, 4)
        ops.refine_nm_(refined := groups.clone(), weight, gram, 2, 4, damping)
        compared.append((groups, refined))
    for old, new in compared:
        (error, terms), (refined_error, refined_terms) = errors(old, weight, gram, 0.0), errors(new, weight, gram, 0.0)
        # Wanda compares float32 scores: equals to their rounding, of which there is one in each column's square
        assert (refined_error <= error + 1e-6 * (terms + refined_terms)).all()
