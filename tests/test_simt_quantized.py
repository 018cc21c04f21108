"""As test_simt.py, for packed weights of 8 and 4 bits. x is rounded and weights are unpacked as the reference does it,
to the bit; products add floats in another order, and are near their exact value.
"""

from __future__ import annotations

import random

import pytest
import torch
from simt import quantized as simt
from simt.machine import ORDERS, Machine, compiler
from strategies import DTYPES
from test_quantized import FORMS, KINDS, check_near, packed_of, same_numbers, tokens_of

from wanda_kernels import reference
from wanda_kernels._checks_quantized import group_of
from wanda_kernels.packed.values import ValueType
from wanda_kernels.reference.quantized import MOST_OF_X, _rounded

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the kernels with")


def draw_weight(draw: random.Random, rows: int, generator: torch.Generator) -> tuple[simt.Packed, int]:
    """All bytes, rows of nothing or of everything, scales far apart."""
    bits, form = draw.choice([8, 4]), draw.choice(FORMS)
    cols = 64 * draw.choice([1, 2, 3, 7, 8, 9, 17, 25, 40])
    most = 1 << (bits - 1)
    levels = torch.randint(-most, most, (rows, cols), generator=generator).to(torch.int8)
    kind = ValueType(bits, draw.choice([0, 32, 64, 128]))
    scales = torch.rand(rows, kind.scales(cols), generator=generator) * 10 ** draw.choice([0, -30])
    kept = torch.rand(rows, cols, generator=generator) >= draw.choice([0.0, 0.5, 0.5, 0.9])
    kept[torch.rand(rows, generator=generator) < 0.2] = draw.random() < 0.5
    return packed_of(levels, scales.bfloat16(), form, bits, kept), bits


def draw_quantized(machine: Machine, seed: int) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    machine.order, machine.seed = draw.choice(ORDERS), seed
    rows = draw.choice([1, 2, 3, 4, 5, 8, 11])
    packed, bits = draw_weight(draw, rows, generator)
    cols = packed[0].shape[1] if packed[2] is None else packed[2].shape[1] * 8
    dtype, warps = draw.choice(DTYPES), draw.choice([1, 2, 3, 8])
    got = simt.unpack(machine, packed, bits, dtype, warps=warps)
    assert same_numbers(got, reference.unpack_quantized(*packed, bits, dtype))
    tokens = draw.choice([1, 1, 2, 4, 5, 8, 9, 16])
    x = tokens_of(draw.choice(KINDS), tokens, cols, dtype, generator)
    groups = packed[1].shape[1]
    whole, scales = simt.rounded(machine, x, group_of(cols, groups), groups, bits)
    planes = whole.int().movedim(2, 0).flatten(2).flatten(1).view(bits // 4, tokens, cols)
    want, want_scales = _rounded(x, group_of(cols, groups), MOST_OF_X[bits])
    assert torch.equal((planes[0] * 256 + planes[1] if bits == 8 else planes[0]).float(), want)
    assert same_numbers(scales, want_scales)
    bias = torch.randn(rows, generator=generator).to(dtype) if draw.random() < 0.5 else None
    block = None if draw.random() < 0.3 else (draw.choice([1, 4, 8]), warps)
    check_near(simt.linear(machine, x, packed, bits, bias, block=block), x, packed, bits, bias)


@pytest.mark.parametrize("part", range(2))
def test_quantized(machine: Machine, part: int) -> None:
    for seed in range(part * 120, part * 120 + 120):
        draw_quantized(machine, seed)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", FORMS)
def test_the_largest_values_of_wide_rows(machine: Machine, form: str, bits: int) -> None:
    """Sums of 8 bits are past 2^31; the same bits in every order; padding is nobody's."""
    levels = torch.full((3, 11008), -128 if bits == 8 else -8, dtype=torch.int8)
    levels[1] = -levels[0] - 1
    packed = packed_of(
        levels, torch.ones(3, 1 if bits == 8 else 86).bfloat16(), form, bits, torch.ones(3, 11008).bool()
    )
    x = torch.full((2, 11008), 3.0)
    x[1, ::2] = -2.9
    results = []
    for order in ORDERS:
        machine.order = order
        results.append(simt.linear(machine, x, packed, bits))
        if form == "bitmap":
            packed[0][-64:] ^= 255
    check_near(results[0], x, packed, bits, None)
    assert all(torch.equal(result, results[0]) for result in results)


def draw_quantized_experts(machine: Machine, seed: int) -> None:
    """Idle experts, more tokens than there is room for, tokens that are nobody's; ends that are wrong write nowhere
    else."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    machine.order, machine.seed = draw.choice(ORDERS), seed
    rows, counts = draw.choice([2, 4, 6]), [draw.choice([0, 0, 1, 2, 5, 9]) for _ in range(draw.randint(1, 4))]
    packed, bits = draw_weight(draw, len(counts) * rows, generator)
    values, scales, codes, starts = packed
    cols = values.shape[1] if codes is None else codes.shape[1] * 8
    ends = torch.tensor(counts).cumsum(0).int()
    tokens = int(ends[-1]) + draw.randint(0, 2)
    if tokens == 0:
        return
    x = torch.randn(tokens, cols, generator=generator).to(draw.choice(DTYPES))
    block = None if draw.random() < 0.3 else (draw.choice([1, 4, 8]), draw.choice([1, 2, 4]))
    got = simt.linear(machine, x, packed, bits, None, ends, block=block)
    begin, stored = 0, rows if bits == 8 else rows // 2
    for expert, end in enumerate(ends.tolist()):
        first = expert * rows
        own = (
            values if starts is not None else values[expert * stored : (expert + 1) * stored],
            scales[first : first + rows],
            None if codes is None else codes[first : first + rows],
            None if starts is None else starts[expert * stored : (expert + 1) * stored + 1],
        )
        check_near(got[begin:end], x[begin:end], own, bits, None)
        begin = end
    assert bool((got[begin:] == 0).all())
    wrong = torch.tensor([draw.choice([-(2**31), -1, 0, 3, 100, 2**31 - 1]) for _ in counts], dtype=torch.int32)
    machine.races = False  # experts that claim the same tokens
    try:
        simt.linear(machine, x, packed, bits, None, wrong, block=block)
    finally:
        machine.races = True


def test_quantized_experts(machine: Machine) -> None:
    for seed in range(40):
        draw_quantized_experts(machine, seed)
