"""Packed weights of 8 or 4 bits in plain PyTorch: unpacking, and the product as every CPU backend computes it, to the
bit.

A product rounds x, too: to 16 bits beside values of 8 (max |x| = 32639 = 127 * 256 + 127: two signed bytes), to 8
beside values of 4 (max |x| = 127), with a scale for each row of x and group of columns. Whole numbers add up exactly in
any order. Four columns of every 64 are a lane: each of the sixteen adds up its groups in float32, in order, and a tree
adds up the lanes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from .. import _checks_quantized as _checks
from .._checks import check_ends

LANES, WIDTH = 16, 4
MOST_ROUNDED = 32  # rows of x; more go through the unpacked weight as they are
MOST_OF_X = {8: 32639, 4: 127}


def levels_of(values: Tensor, scales: Tensor, codes: Tensor | None, starts: Tensor | None, bits: int) -> Tensor:
    """[C_out, C_in], int32 from -128 to 127, or -8 to 7; 0 where nothing is kept."""
    rows, offset = scales.shape[0], 1 << (bits - 1)
    if codes is None:
        return _rows(values, rows, bits).int() - offset
    kept = _kept(codes, starts is not None)
    levels = torch.zeros(kept.shape, dtype=torch.int32, device=values.device)
    if starts is None:
        levels[kept] = _rows(values, rows, bits).int().flatten() - offset
        return levels
    for row in range(rows):
        begin = int(starts[row if bits == 8 else row // 2])
        taken = values[begin : begin + int(kept[row].sum())].int()
        if bits == 4:
            taken = taken >> 4 if row % 2 else taken & 15
        levels[row, kept[row]] = taken - offset
    return levels


def _rows(values: Tensor, rows: int, bits: int) -> Tensor:
    """[rows, kept]: of 4 bits the even rows are the low halves of bytes, the odd ones the high."""
    if bits == 8:
        return values
    return torch.stack([values & 15, values >> 4], dim=1).flatten(0, 1)[:rows]


def _kept(codes: Tensor, is_bitmap: bool) -> Tensor:
    """[C_out, C_in], bool."""
    if is_bitmap:
        return ((codes[:, :, None] >> torch.arange(8, device=codes.device)) & 1).bool().flatten(1)
    inside = (codes[:, :, None] >> torch.arange(0, 8, 2, device=codes.device)) & 3
    groups = inside.view(codes.shape[0], -1, 2).long()
    kept = torch.zeros(*groups.shape[:2], 4, dtype=torch.bool, device=codes.device)
    return kept.scatter_(2, groups, True).flatten(1)


def unpack_quantized(
    values: Tensor, scales: Tensor, codes: Tensor | None, starts: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    _checks.check_quantized("unpack_quantized", values, scales, codes, starts, bits, dtype)
    return _times_scales(levels_of(values, scales, codes, starts, bits), scales).to(dtype)


def _times_scales(levels: Tensor, scales: Tensor) -> Tensor:
    """[C_out, C_in] float32."""
    cols = levels.shape[1]
    group = _checks.group_of(cols, scales.shape[1])
    return levels.float() * scales.float().repeat_interleave(group, dim=1)[:, :cols]


def _rounded(x: Tensor, group: int, most: int) -> tuple[Tensor, Tensor]:
    """x [tokens, C_in] as (whole numbers [tokens, C_in], scales [tokens, groups] float32). What is not finite makes its
    group's scale so, and the product NaN. A denormal scale would be too coarse: such a group is 0."""
    parts = pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    scale = parts.abs().amax(dim=2) / most
    usable = (scale >= torch.finfo(torch.float32).tiny) & scale.isfinite()
    whole = torch.where(usable[..., None], (parts / scale[..., None]).round(), 0.0)
    return whole.flatten(1)[:, : x.shape[1]], scale


def quantized_linear(
    x: Tensor, values: Tensor, scales: Tensor, codes: Tensor | None = None, starts: Tensor | None = None,
    bias: Tensor | None = None, bits: int = 8,
) -> Tensor:  # fmt: skip
    _checks.check_quantized_linear("quantized_linear", x, values, scales, codes, starts, bias, bits)
    if x.numel() > MOST_ROUNDED * x.shape[-1]:
        return linear(x, unpack_quantized(values, scales, codes, starts, bits, x.dtype), bias)
    levels = levels_of(values, scales, codes, starts, bits)
    y = torch.empty(*x.shape[:-1], len(levels), dtype=torch.float32, device=x.device)
    for row, one in zip(y.view(-1, len(levels)), x.reshape(-1, x.shape[-1]), strict=True):
        row.copy_(_product(one, levels, scales, bits))
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _product(x: Tensor, levels: Tensor, scales: Tensor, bits: int) -> Tensor:
    """x [C_in] -> [C_out], float32."""
    rows, cols = levels.shape
    group = _checks.group_of(cols, scales.shape[1])
    whole, x_scales = _rounded(x[None], group, MOST_OF_X[bits])
    block = LANES * WIDTH  # columns are a multiple
    products = (levels.double() * whole.double()).view(rows, -1, LANES, WIDTH).sum(dim=3)  # in each block and lane
    # A high half is used where it is in its byte, times 16, which shows where a factor is denormal.
    weights = torch.ones(rows, 1, device=x.device)
    weights[1::2] = 16 if bits == 4 else 1
    # of each block and lane: with groups of 32 lanes of a block belong to two
    factors = (
        (scales.float() * x_scales / weights).repeat_interleave(group, dim=1)[:, :cols:WIDTH].view(rows, -1, LANES)
    )
    together = max(1, group // block)  # blocks of a group are added before they are scaled
    lanes = torch.zeros(rows, LANES, dtype=torch.float32, device=x.device)
    for first in range(0, cols // block, together):
        whole_sums = products[:, first : first + together].sum(dim=1) * weights
        lanes = lanes + whole_sums.float() * factors[:, first]
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
    return lanes[:, 0]


def quantized_experts(
    x: Tensor, values: Tensor, scales: Tensor, ends: Tensor, codes: Tensor | None = None,
    starts: Tensor | None = None, bits: int = 8,
) -> Tensor:  # fmt: skip
    _checks.check_quantized_experts("quantized_experts", x, values, scales, ends, codes, starts, bits)
    levels = levels_of(values, scales, codes, starts, bits)
    y = x.new_zeros(len(x), len(levels) // len(ends))
    begin, experts = 0, zip(levels.chunk(len(ends)), scales.chunk(len(ends)), strict=True)
    for (matrix, factors), end in zip(experts, check_ends("quantized_experts", ends, len(x)), strict=True):
        if end - begin > MOST_ROUNDED:
            y[begin:end] = linear(x[begin:end], _times_scales(matrix, factors).to(x.dtype))
            begin = end
        for token in range(begin, end):
            y[token] = _product(x[token], matrix, factors, bits)
        begin = end
    return y
