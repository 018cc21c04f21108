"""pack_24, prune_pack_24, unpack_24: bit for bit with torch's own conversions."""

from __future__ import annotations

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, KINDS, NORMS, norm_of, same_bits, weight_of
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from wanda_kernels import ops, reference

BACKENDS = backends.names()


@st.composite
def packable(draw):
    import numpy as np

    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = 32 * draw(st.integers(1, 4))
    cols = 64 * draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([d for d in DTYPES if d != torch.float32]))
    with np.errstate(over="ignore", invalid="ignore"):
        weight = weight_of(draw(st.sampled_from(KINDS)), rows, cols, generator)
    norm = torch.from_numpy(norm_of(draw(st.sampled_from(NORMS)), cols, generator))
    return torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32)).to(dtype), norm


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=120)
@given(matrix=packable())
def test_equals_torch(backend, matrix):
    weight, norm = matrix
    pruned = weight.masked_fill(reference.nm_mask(weight, norm, 2, 4), 0)
    values, metadata = sparse_semi_structured_from_dense_cutlass(pruned)
    for packed in (
        backends.implementation(backend, "prune_pack_24")(weight, norm),
        backends.implementation(backend, "pack_24")(pruned),
    ):
        assert same_bits(packed[0], values)
        assert torch.equal(packed[1], metadata)
    dense = backends.implementation(backend, "unpack_24")(values, metadata)
    assert same_bits(dense, sparse_semi_structured_to_dense_cutlass(values, metadata))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_group_of_four(backend):
    """All 81 groups of {0, 1, 2}: canonical metadata where fewer than two are not zero."""
    groups = torch.cartesian_prod(*[torch.tensor([0.0, 1.0, 2.0])] * 4)
    groups = groups[(groups != 0).sum(dim=1) <= 2]
    weight = groups.repeat(32 * 64, 1)[: 32 * 64 // 4 * 4].reshape(-1, 64)[:128].to(torch.bfloat16)
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    packed = backends.implementation(backend, "pack_24")(weight)
    assert same_bits(packed[0], values)
    assert torch.equal(packed[1], metadata)
    assert torch.equal(ops.unpack_24(*packed), weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_matrix_in_threads(backend):
    torch.manual_seed(0)
    weight = torch.randn(96, 11008).to(torch.float16)
    norm = torch.rand(11008)
    values, metadata = reference.prune_pack_24(weight, norm)
    packed = backends.implementation(backend, "prune_pack_24")(weight, norm)
    assert same_bits(packed[0], values)
    assert torch.equal(packed[1], metadata)


@pytest.mark.parametrize("implementation", [ops, reference])
def test_refusals(implementation):
    dense = torch.ones(32, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="512 of its groups of four have more than two non-zeros"):
        implementation.pack_24(dense)
    with pytest.raises(TypeError, match=r"weight must be bfloat16 or float16 .* got .*[Ff]loat"):
        implementation.pack_24(torch.zeros(32, 64))
    with pytest.raises(ValueError, match=r"multiple of 32 rows and of 64 columns, got \[32, 32\]"):
        implementation.pack_24(torch.zeros(32, 32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"metadata must be \[32, 4\], got \[32, 8\]"):
        implementation.unpack_24(torch.zeros(32, 32, dtype=torch.float16), torch.zeros(32, 8, dtype=torch.int16))
