"""What holds for every operator: schema, fake implementation, torch.compile, and errors that say what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import test_gpu
import torch

from wanda_kernels import _backend, ops, reference
from wanda_kernels.packed import pack_bitmap, pack_sparse24
from wanda_kernels.packed.values import ValueType, pack_kept, pack_rows, quantize

WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
NORM = torch.rand(64, generator=torch.Generator().manual_seed(1))
STACK, NORMS = WEIGHT.view(4, 8, 64), NORM + torch.arange(4)[:, None]
HALF = WEIGHT.to(torch.bfloat16)
GRAM = torch.randn(99, 64, generator=torch.Generator().manual_seed(2))
GRAM = GRAM.T @ GRAM
ENDS = torch.tensor([3, 3, 20, 31], dtype=torch.int32)


def packed():
    return ops.prune_pack_24(HALF, NORM)


SPARSE = WEIGHT.masked_fill(reference.nm_mask(WEIGHT, NORM, 2, 4), 0)

LEVELS = quantize(SPARSE, ValueType(4, 32))
BESIDE = (LEVELS[1], GRAM, 4)


def quantized(bits):
    levels, scales = quantize(SPARSE, ValueType(bits, 32))
    values, starts = pack_kept(levels, SPARSE != 0, bits)
    return values, scales, pack_bitmap(SPARSE)[1], starts


def kept(bits):
    values, starts = pack_kept(LEVELS[0], SPARSE != 0, bits)
    return torch.zeros_like(values), LEVELS[0], SPARSE != 0, starts, bits


ROWS, GROUPS = reference.row_mask(WEIGHT, NORM, 0.5), reference.nm_mask(WEIGHT, NORM, 2, 4)

CALLS = {
    "prune_rows_": lambda: (WEIGHT.clone(), NORM, 0.5, torch.zeros(32, 2)),
    "row_mask": lambda: (WEIGHT, NORM, 0.5),
    "prune_nm_": lambda: (WEIGHT.clone(), NORM, 2, 4, None),
    "nm_mask": lambda: (WEIGHT, NORM, 4, 8),
    "prune_rows_ of a stack": lambda: (STACK.clone(), NORMS, 0.5, torch.zeros(4, 8, 2)),
    "row_mask of a stack": lambda: (STACK, NORMS, 0.5),
    "prune_nm_ of a stack": lambda: (STACK.clone(), NORMS, 2, 4, torch.zeros(4, 8, 2)),
    "nm_mask of a stack": lambda: (STACK, NORMS, 4, 8),
    "refine_rows_": lambda: (ROWS.clone(), WEIGHT, GRAM, 0.3, None, torch.zeros(32, 2, dtype=torch.float64)),
    "refine_nm_": lambda: (GROUPS.clone(), HALF, GRAM, 2, 4, 0.3, 4, None),
    "solve_rows_": lambda: (WEIGHT.clone(), ROWS, GRAM, WEIGHT, 0.3, 4, torch.zeros(32, 2, dtype=torch.float64)),
    "calibrate_levels_": lambda: (LEVELS[0].clone(), SPARSE, *BESIDE, 1.0, 3, torch.zeros(32, dtype=torch.float64)),
    "pack_24": lambda: (ops.unpack_24(*packed()),),
    "prune_pack_24": lambda: (HALF, NORM),
    "unpack_24": packed,
    "add_gram_": lambda: (GRAM.clone(), WEIGHT, 0.5, 2.0, 0),
    "add_sqnorm_": lambda: (torch.zeros(4, 64), WEIGHT, torch.ones(32, dtype=torch.bool)),
    "add_sqnorm_ of segments": lambda: (torch.zeros(4, 64), WEIGHT, None, ENDS),
    "rms_norm_sqnorm": lambda: (WEIGHT, NORM, 1e-6, torch.zeros(4, 64), torch.ones(32, dtype=torch.bool), True),
    "silu_mul_sqnorm": lambda: (WEIGHT, WEIGHT.flip(0), torch.zeros(64), None),
    "bitmap_linear": lambda: (WEIGHT[:3], *pack_bitmap(SPARSE), NORM[:32]),
    "sparse24_linear": lambda: (WEIGHT[:3], *pack_sparse24(SPARSE), None),
    "dense_linear": lambda: (WEIGHT[:3], WEIGHT, NORM[:32]),
    "dense_linear of many": lambda: (HALF.repeat(2, 1), HALF, None),
    "bitmap_experts": lambda: (WEIGHT, *pack_bitmap(SPARSE), ENDS),
    "sparse24_experts": lambda: (WEIGHT, *pack_sparse24(SPARSE), ENDS),
    "unpack_bitmap": lambda: pack_bitmap(SPARSE),
    "unpack_sparse24": lambda: pack_sparse24(SPARSE),
    "quantized_linear": lambda: (WEIGHT[:3], *quantized(8), NORM[:32], 8),
    "quantized_linear of a head": lambda: (HALF[:3], pack_rows(LEVELS[0], 4), LEVELS[1], None, None, None, 4),
    "quantized_experts": lambda: (WEIGHT, *quantized(4)[:2], ENDS, *quantized(4)[2:], 4),
    "unpack_quantized": lambda: (*quantized(4), 4, torch.bfloat16),
    "quantize": lambda: (HALF, 4, 32, NORM),
    "exact_levels": lambda: (reference.unpack_quantized(*quantized(4), 4, torch.bfloat16), 4, 32),
    "pack_kept_": lambda: kept(4),
    "gelu_tanh_mul_sqnorm": lambda: (HALF, HALF.flip(0), torch.zeros(4, 64), None),
}


def test_every_schema_has_a_test_a_wrapper_and_a_reference():
    assert set(_backend.schemas()) == {name.split()[0] for name in CALLS} == set(ops.__all__) == set(reference.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.wanda, name.split()[0]).default, CALLS[name]())


@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_graph_break(name):
    operator = getattr(ops, name.split()[0])

    def call(*args):
        result = operator(*args)
        written = [arg for arg in args if isinstance(arg, torch.Tensor)]
        return written if result is None else [result, *written] if isinstance(result, torch.Tensor) else result

    torch.compiler.reset()  # each operator is a recompilation of call(), of which Dynamo makes eight
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*CALLS[name]()), call(*CALLS[name]())
    for left, right in zip(got, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.slow
def test_compiles_with_inductor():
    def call(weight, x):
        sqnorm = torch.zeros(64)
        ops.add_sqnorm_(sqnorm, x)
        ops.prune_rows_(weight, sqnorm.sqrt(), 0.5)
        return weight * 2

    args = (WEIGHT.clone(), torch.randn(3, 5, 64))
    expected = call(WEIGHT.clone(), args[1])
    assert torch.equal(torch.compile(call, fullgraph=True)(*args), expected)


SEGMENTS = torch.zeros(4, 64)

BAD = [
    ("prune_rows_", (WEIGHT, NORM[:63], 0.5), ValueError, "norm has 63 elements, weight has 64 columns"),
    ("prune_rows_", (WEIGHT, NORM.double(), 0.5), TypeError, "norm must be float32, got .*[Dd]ouble|float64"),
    ("prune_rows_", (WEIGHT, NORM[None], 0.5), ValueError, r"norm must have 1 dimension \[C_in\], got 2"),
    ("prune_rows_", (WEIGHT, NORM, 1.0), ValueError, r"sparsity must be in \[0, 1\), got 1"),
    ("prune_rows_", (WEIGHT, NORM, -0.1), ValueError, r"sparsity must be in \[0, 1\), got -0.1"),
    ("prune_rows_", (WEIGHT, NORM, float("nan")), ValueError, r"sparsity must be in \[0, 1\), got nan"),
    ("prune_rows_", (WEIGHT[0], NORM, 0.5), ValueError, r"weight must have 2 .* or 3 \[E, C_out, C_in\], got 1"),
    ("prune_rows_", (STACK[None], NORMS, 0.5), ValueError, r"weight must have 2 .* or 3 \[E, C_out, C_in\], got 4"),
    ("prune_rows_", (STACK, NORM, 0.5), ValueError, r"norm must have 2 dimensions \[E, C_in\], got 1"),
    ("prune_nm_", (STACK, NORMS[:3], 2, 4), ValueError, "norm has 3 rows, weight has 4 matrices"),
    ("nm_mask", (STACK, NORMS[:, :63], 2, 4), ValueError, "norm has 63 elements, weight has 64 columns"),
    ("nm_mask", (STACK, NORMS, 2, 5), ValueError, "weight has 64 columns, not a multiple of m = 5"),
    ("prune_nm_", (STACK, NORMS, 2, 4, torch.zeros(32, 2)), ValueError, r"score_sums .* \[4, 8, 2\], got \[32, 2\]"),
    ("prune_pack_24", (STACK.bfloat16(), NORMS), ValueError, r"weight must have 2 dimensions \[C_out, C_in\], got 3"),
    ("prune_rows_", (WEIGHT.int(), NORM, 0.5), TypeError, "weight must be float32, bfloat16 or float16, got .*[Ii]nt"),
    ("prune_rows_", (WEIGHT, NORM, 0.5, torch.zeros(31, 2)), ValueError, r"score_sums .* \[32, 2\], got \[31, 2\]"),
    ("row_mask", (WEIGHT, NORM.to("meta"), 0.5), (ValueError, NotImplementedError), "norm is on meta|[Mm]eta"),
    ("prune_nm_", (WEIGHT, NORM, 4, 4), ValueError, "a pattern n:m needs 0 < n < m, got 4:4"),
    ("prune_nm_", (WEIGHT, NORM, 0, 4), ValueError, "a pattern n:m needs 0 < n < m, got 0:4"),
    ("nm_mask", (WEIGHT, NORM, 2, 5), ValueError, "weight has 64 columns, not a multiple of m = 5"),
    *(
        ("refine_rows_", args, kind, message)
        for args, kind, message in (
            ((ROWS.int(), WEIGHT, GRAM), TypeError, "mask must be bool, got"),
            ((ROWS[:31], WEIGHT, GRAM), ValueError, r"mask must be contiguous \[32, 64\], got \[31, 64\]"),
            ((ROWS, WEIGHT[0], GRAM), ValueError, r"weight must have 2 dimensions \[C_out, C_in\], got 1"),
            ((ROWS, WEIGHT.int(), GRAM), TypeError, "weight must be float32, bfloat16 or float16, got .*[Ii]nt"),
            ((ROWS, WEIGHT, GRAM.double()), TypeError, "gram must be float32, got .*[Dd]ouble|float64"),
            ((ROWS, WEIGHT, GRAM[:63]), ValueError, r"gram must be \[64, 64\], got \[63, 64\]"),
            ((ROWS, WEIGHT, GRAM, -0.1), ValueError, "damping must be finite and >= 0, got -0.1"),
            ((ROWS, WEIGHT, GRAM, float("nan")), ValueError, "damping must be finite and >= 0, got nan"),
            ((ROWS, WEIGHT, GRAM, float("inf")), ValueError, "damping must be finite and >= 0, got inf"),
            ((ROWS, WEIGHT, GRAM, 0.3, -1), ValueError, "most_swaps must be None or >= 0, got -1"),
            ((ROWS, WEIGHT, GRAM, 0.3, 1, torch.zeros(32, 2)), TypeError, "sums must be float64, got"),
            (
                (ROWS, WEIGHT, GRAM, 0.3, 1, torch.zeros(32, 3).double()),
                ValueError,
                r"sums must be contiguous \[32, 2\], got \[32, 3\]",
            ),
        )
    ),
    ("refine_nm_", (GROUPS, WEIGHT, GRAM, 4, 4), ValueError, "a pattern n:m needs 0 < n < m, got 4:4"),
    ("refine_nm_", (GROUPS, WEIGHT, GRAM, 2, 5), ValueError, "weight has 64 columns, not a multiple of m = 5"),
    ("refine_nm_", (GROUPS, WEIGHT, GRAM, 2, 4, 0.3, -1), ValueError, "sweeps must be >= 0, got -1"),
    (
        "refine_nm_",
        (torch.ones(32, 64).bool(), WEIGHT, GRAM, 2, 4),
        ValueError,
        "mask must keep 2 of every 4 columns, 512 of its groups do not",
    ),
    *(
        ("solve_rows_", args, kind, message)
        for args, kind, message in (
            ((WEIGHT, ROWS.int(), GRAM, WEIGHT), TypeError, "mask must be bool, got"),
            ((WEIGHT, ROWS[:31], GRAM, WEIGHT), ValueError, r"mask must be contiguous \[32, 64\], got \[31, 64\]"),
            ((WEIGHT[0], ROWS, GRAM, WEIGHT), ValueError, r"weight must have 2 dimensions \[C_out, C_in\], got 1"),
            ((WEIGHT, ROWS, GRAM.double(), WEIGHT), TypeError, "gram must be float32, got .*[Dd]ouble|float64"),
            ((WEIGHT, ROWS, GRAM[:, :63], WEIGHT), ValueError, r"gram must be \[64, 64\], got \[64, 63\]"),
            ((WEIGHT, ROWS, GRAM, HALF), TypeError, "target must be .*[Ff]loat.*, as weight is, got .*[Bb][Ff]"),
            ((WEIGHT, ROWS, GRAM, WEIGHT[:31]), ValueError, r"target must be \[32, 64\], got \[31, 64\]"),
            ((WEIGHT, ROWS, GRAM, WEIGHT.to("meta")), ValueError, "target is on meta, weight is on cpu"),
            ((WEIGHT, ROWS, GRAM, WEIGHT, -0.1), ValueError, "damping must be finite and >= 0, got -0.1"),
            ((WEIGHT, ROWS, GRAM, WEIGHT, float("nan")), ValueError, "damping must be finite and >= 0, got nan"),
            ((WEIGHT, ROWS, GRAM, WEIGHT, 0.3, -1), ValueError, "steps must be >= 0, got -1"),
            (
                (WEIGHT, ROWS, GRAM, WEIGHT, 0.3, 1, torch.zeros(31, 2).double()),
                ValueError,
                r"sums must be contiguous \[32, 2\], got \[31, 2\]",
            ),
        )
    ),
    *(
        ("calibrate_levels_", args, kind, message)
        for args, kind, message in (
            ((LEVELS[0].int(), WEIGHT, *BESIDE), TypeError, "levels must be int8, got"),
            ((LEVELS[0][:31], WEIGHT, *BESIDE), ValueError, r"levels must be \[32, 64\], got \[31, 64\]"),
            ((LEVELS[0], WEIGHT[0], *BESIDE), ValueError, r"weight must have 2 dimensions \[C_out, C_in\], got 1"),
            ((LEVELS[0], WEIGHT.int(), *BESIDE), TypeError, "weight must be float32, bfloat16 or float16, got"),
            ((LEVELS[0], WEIGHT, NORM, GRAM, 4), TypeError, "scales must be bfloat16, got"),
            ((LEVELS[0], WEIGHT, LEVELS[1][:31], GRAM, 4), ValueError, r"scales must be \[32, groups\], got \[31, 2\]"),
            ((LEVELS[0], WEIGHT, HALF[:, :5], GRAM, 4), ValueError, "scales must be for 32, 64, 128 or all .* got 5"),
            ((LEVELS[0], WEIGHT, LEVELS[1], GRAM.double(), 4), TypeError, "gram must be float32, got"),
            ((LEVELS[0], WEIGHT, LEVELS[1], GRAM[:63], 4), ValueError, r"gram must be \[64, 64\], got \[63, 64\]"),
            ((LEVELS[0], WEIGHT, LEVELS[1], GRAM, 3), ValueError, "bits must be 8 or 4, got 3"),
            ((LEVELS[0], WEIGHT, *BESIDE, -0.1), ValueError, "damping must be finite and >= 0, got -0.1"),
            ((LEVELS[0], WEIGHT, *BESIDE, 1.0, -1), ValueError, "passes must be >= 0, got -1"),
            ((LEVELS[0], WEIGHT, *BESIDE, 1.0, 3, NORM[:32]), TypeError, "errors must be float64, got"),
            (
                (LEVELS[0], WEIGHT, *BESIDE, 1.0, 3, NORM[:31].double()),
                ValueError,
                r"errors must be contiguous \[32\], got \[31\]",
            ),
        )
    ),
    *(
        ("add_gram_", args, kind, message)
        for args, kind, message in (
            ((GRAM.double(), WEIGHT), TypeError, "gram must be float32, got"),
            ((GRAM, WEIGHT.int()), TypeError, "x must be float32, bfloat16 or float16, got .*[Ii]nt"),
            ((GRAM, WEIGHT[None]), ValueError, r"x must have 2 dimensions \[tokens, C_in\], got 3"),
            ((GRAM, WEIGHT[:, :63]), ValueError, r"gram must be \[rows, 63\] with at most 63 rows, got \[64, 64\]"),
            ((GRAM, WEIGHT, 1.0, 1.0, 64), ValueError, r"first must be a multiple of 384 in \[0, 64\], got 64"),
            ((GRAM, WEIGHT, 1.0, 1.0, -384), ValueError, r"first must be a multiple of 384 in \[0, 64\], got -384"),
            ((GRAM, WEIGHT, 1.0, 1.0, 384), ValueError, r"first must be a multiple of 384 in \[0, 64\], got 384"),
        )
    ),
    ("add_sqnorm_", (NORM.clone(), WEIGHT[:, :63]), ValueError, "x has 63 columns, sqnorm has 64"),
    ("add_sqnorm_", (torch.zeros(5, 64), WEIGHT), ValueError, "x has 32 tokens, not a multiple of the 5 sequences"),
    ("add_sqnorm_", (torch.zeros(2, 64), WEIGHT[None]), ValueError, "x has 1 sequences, sqnorm has 2"),
    ("add_sqnorm_", (NORM.double(), WEIGHT), TypeError, "sqnorm must be float32"),
    ("add_sqnorm_", (NORM.clone(), WEIGHT, torch.ones(32)), TypeError, "token_mask must be bool"),
    *(
        ("add_sqnorm_", (sqnorm, x, mask, ends), kind, message)
        for sqnorm, x, mask, ends, kind, message in (
            (SEGMENTS, WEIGHT, None, ENDS.long(), TypeError, "ends must be int32, got"),
            (SEGMENTS, WEIGHT, None, ENDS[:3], ValueError, r"ends must be contiguous \[4\], got \[3\]"),
            (SEGMENTS, WEIGHT, None, ENDS[None], ValueError, r"ends must be contiguous \[4\], got \[1, 4\]"),
            (SEGMENTS, WEIGHT[None], None, ENDS, ValueError, r"x must be \[rows, C_in\] .* got \[1, 32, 64\]"),
            (NORM, WEIGHT, None, ENDS, ValueError, r"sqnorm must be \[segments, C_in\] .* got \[64\]"),
            (SEGMENTS, WEIGHT, torch.ones(32).bool(), ENDS, ValueError, "token_mask must be None where ends are"),
            (SEGMENTS, WEIGHT, None, ENDS + 2, ValueError, r"ends .* most 32, .* x, got ends\[3\] = 33 after 22"),
            (SEGMENTS, WEIGHT, None, -ENDS, ValueError, r"ends must ascend from 0 .* got ends\[0\] = -3 after 0"),
            (SEGMENTS, WEIGHT, None, ENDS.flip(0), ValueError, r"ends must ascend .* got ends\[1\] = 20 after 31"),
            (SEGMENTS, WEIGHT[:0], None, ENDS, ValueError, r"ends must ascend .* most 0, .* got ends\[0\] = 3"),
        )
    ),
    (
        "rms_norm_sqnorm",
        (WEIGHT, NORM.bfloat16(), 1e-6, NORM.clone()),
        TypeError,
        "weight must be .*[Ff]loat.* as x is",
    ),
    ("rms_norm_sqnorm", (WEIGHT, NORM[:63], 1e-6, NORM.clone()), ValueError, r"weight must be \[64\], got \[63\]"),
    ("rms_norm_sqnorm", (WEIGHT, NORM, 1e-6, NORM[:63]), ValueError, "x has 64 columns, sqnorm has 63"),
    ("silu_mul_sqnorm", (WEIGHT, WEIGHT[:31], NORM.clone()), ValueError, r"up must be \[32, 64\], .* got \[31, 64\]"),
    ("silu_mul_sqnorm", (WEIGHT, HALF, NORM.clone()), TypeError, "up must be .*, as gate is, got .*[Bb][Ff]loat16"),
    ("gelu_tanh_mul_sqnorm", (WEIGHT, WEIGHT.double(), NORM.clone()), TypeError, "up must be .*, as gate is"),
    ("bitmap_linear", (WEIGHT[:, :63], *pack_bitmap(SPARSE)), ValueError, r"x must be \[\.\., 64\], got \[32, 63\]"),
    (
        "bitmap_linear",
        (HALF, *pack_bitmap(SPARSE)),
        TypeError,
        "x must be [Ff]loat.*, as values are|x must be torch.fl",
    ),
    ("bitmap_linear", (WEIGHT, *pack_bitmap(SPARSE), NORM), ValueError, r"bias must be \[32\], got \[64\]"),
    ("sparse24_linear", (WEIGHT, SPARSE, torch.zeros(32, 8)), TypeError, "indices must be uint8, got"),
    *(
        ("dense_linear", args, kind, message)
        for args, kind, message in (
            ((WEIGHT[:, :63], WEIGHT), ValueError, r"x must be \[\.\., 64\], got \[32, 63\]"),
            ((WEIGHT[0, 0], WEIGHT), ValueError, r"x must be \[\.\., 64\], got \[\]"),
            ((HALF, WEIGHT), TypeError, "x must be [Ff]loat.*, as weight is|x must be torch.float32, as weight is"),
            ((WEIGHT, WEIGHT, HALF[0, :32]), TypeError, "bias must be [Ff]loat|bias must be torch.float32, as weight"),
            ((WEIGHT, WEIGHT, NORM), ValueError, r"bias must be \[32\], got \[64\]"),
            ((WEIGHT, WEIGHT.int()), TypeError, "weight must be float32, bfloat16 or float16, got .*[Ii]nt"),
            ((WEIGHT, WEIGHT[0]), ValueError, r"weight must be contiguous \[C_out, C_in\], got \[64\] with"),
            ((WEIGHT[:, :32], WEIGHT.t()), ValueError, r"got \[64, 32\] with strides \[1, 64\]"),
        )
    ),
    ("unpack_sparse24", (SPARSE, pack_sparse24(SPARSE)[1]), ValueError, r"values must be \[32, 32\], got \[32, 64\]"),
    *(
        ("bitmap_experts", (x, *pack_bitmap(SPARSE), ends), kind, message)
        for x, ends, kind, message in (
            (HALF, ENDS, TypeError, "x must be [Ff]loat.*, as values are|x must be torch.fl"),
            (WEIGHT[:, :63], ENDS, ValueError, r"x must be \[rows, 64\], got \[32, 63\]"),
            (WEIGHT[None], ENDS, ValueError, r"x must be \[rows, 64\], got \[1, 32, 64\]"),
            (WEIGHT, ENDS.long(), TypeError, "ends must be int32, got"),
            (WEIGHT, ENDS[:3], ValueError, r"ends must be contiguous \[E\], .* divides the 32 rows .* got \[3\]"),
            (WEIGHT, ENDS[:0], ValueError, r"ends must be contiguous \[E\], .* divides the 32 rows .* got \[0\]"),
            (WEIGHT, ENDS[None], ValueError, r"ends must be contiguous \[E\], .* got \[1, 4\]"),
            (WEIGHT, ENDS + 2, ValueError, r"ends .* most 32, .* x, got ends\[3\] = 33 after 22"),
            (WEIGHT, -ENDS, ValueError, r"ends must ascend from 0 .* got ends\[0\] = -3 after 0"),
        )
    ),
    ("sparse24_experts", (WEIGHT, *pack_sparse24(SPARSE), ENDS.flip(0)), ValueError, r"ends must ascend"),
    ("sparse24_experts", (WEIGHT, SPARSE, torch.zeros(32, 8), ENDS), TypeError, "indices must be uint8, got"),
    *(
        ("quantize", args, kind, message)
        for args, kind, message in (
            ((WEIGHT[0], 8), ValueError, r"weight must have 2 dimensions \[C_out, C_in\], got 1"),
            ((WEIGHT.int(), 8), TypeError, "weight must be float32, bfloat16 or float16, got .*[Ii]nt"),
            ((WEIGHT[:, :0], 8), ValueError, r"weight must have columns, got \[32, 0\]"),
            ((WEIGHT, 3), ValueError, "bits must be 8 or 4, got 3"),
            ((WEIGHT, 4, 48), ValueError, r"group must be 0 \(a whole row\), 32, 64 or 128, got 48"),
            ((WEIGHT, 4, 32, NORM.double()), TypeError, "importance must be float32, got"),
            ((WEIGHT, 4, 32, NORM[:63]), ValueError, r"importance must be \[64\], got \[63\]"),
        )
    ),
    ("exact_levels", (WEIGHT.int(), 4), TypeError, "weight must be float32, bfloat16 or float16, got .*[Ii]nt"),
    ("exact_levels", (WEIGHT, 4, 16), ValueError, r"group must be 0 \(a whole row\), 32, 64 or 128, got 16"),
    *(
        ("pack_kept_", tuple(change.get(i, one) for i, one in enumerate(kept(4))), kind, message)
        for change, kind, message in (
            ({0: torch.zeros(9)}, TypeError, "values must be uint8, got"),
            ({0: torch.zeros(9, 9).byte()}, ValueError, r"values must be contiguous \[bytes\], got \[9, 9\]"),
            ({1: LEVELS[0].int()}, TypeError, "levels must be int8, got"),
            ({1: LEVELS[0].t()}, ValueError, r"levels must be contiguous \[C_out, C_in\], got \[64, 32\]"),
            ({2: SPARSE}, TypeError, "mask must be bool, got"),
            ({2: ROWS[:31]}, ValueError, r"mask must be contiguous \[32, 64\], got \[31, 64\]"),
            ({3: torch.zeros(17)}, TypeError, "starts must be int32, got"),
            ({3: ENDS}, ValueError, r"starts must be contiguous \[17\], got \[4\]"),
            ({4: 2}, ValueError, "bits must be 8 or 4, got 2"),
        )
    ),
    (
        "add_sqnorm_",
        (NORM.clone(), WEIGHT, torch.ones(31, dtype=torch.bool)),
        ValueError,
        r"token_mask must be \[1, 32\]",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0]}-{case[3][:30]}")
@pytest.mark.parametrize("implementation", [ops, reference], ids=["ops", "reference"])
def test_errors_name_the_argument_what_is_required_and_what_came(implementation, case):
    name, args, kind, message = case
    args = tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
    before = args[0].clone()
    with pytest.raises(kind, match=message) as raised:
        getattr(implementation, name)(*args)
    if raised.type is not NotImplementedError:
        assert f"wanda::{name}: " in str(raised.value)
    assert torch.equal(args[0], before)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' compilers may have no OpenMP")
def test_the_cpu_kernels_are_built_for_threads():
    if _backend.extension is None:
        pytest.skip("the extension is not built")
    assert _backend.extension.build_info()["threads"] == "OpenMP"


def test_instruction_set_can_be_forced():
    if _backend.extension is None:
        pytest.skip("the extension is not built")
    before = _backend.extension.isa()
    with pytest.raises(ValueError, match="must be scalar, avx2 or avx512, got 'sse9'"):
        _backend.extension.set_isa("sse9")
    _backend.extension.set_isa("scalar")
    assert _backend.extension.isa() == "scalar"
    _backend.extension.set_isa(before)


@pytest.mark.parametrize("name", sorted(set(ops.__all__) - {"add_gram_"}))  # here it adds below the diagonal only
def test_what_the_tests_on_a_gpu_give_an_operator(name):
    """Here, on the CPU: a new operator is not forgotten there, and what they allow is enough."""
    test_gpu.check(name, test_gpu.call(name, test_gpu.arguments(name)))


UNDER_AUTOCAST = """
import torch
from wanda_kernels import ops

torch.manual_seed(0)
weight, x = torch.randn(300, 96), torch.randn(200, 96)
gram, mask = x.T @ x, torch.rand(300, 96) < 0.5
levels, scales = ops.quantize(weight, 4, 32)


def solved():
    found = weight.clone()
    ops.solve_rows_(found, mask, gram, weight)
    return found


def chosen():
    found = levels.clone()
    ops.calibrate_levels_(found, weight, scales, gram, 4)
    return found


def summed():
    found = torch.zeros(96, 96)
    ops.add_gram_(found, x)
    return found


for compute in (solved, chosen, summed, lambda: ops.dense_linear(x, weight), lambda: ops.dense_linear(x[:3], weight)):
    expected = compute()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = compute()
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
print("equal")
"""


@pytest.mark.parametrize("variables", [{}, {"WANDA_KERNELS_REFERENCE": "1"}], ids=["kernels", "reference"])
def test_autocast_changes_nothing_inside(variables):
    """In a process of its own: which kernels serve is found out once."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER_AUTOCAST], capture_output=True, text=True, env=os.environ | variables
    )
    assert done.stdout == "equal\n", done.stderr
