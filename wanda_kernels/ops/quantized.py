"""Products with packed weights of 8 or 4 bits, and unpacking."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import fake
from .._checks_quantized import check_quantized, check_quantized_experts, check_quantized_linear


def quantized_linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    codes: Tensor | None = None,
    starts: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    """``x @ unpack_quantized(..).T + bias``.

    Few rows of ``x`` (32 on the CPU, 16 on CUDA) are rounded, too, to 16 bits beside values of 8, to 8 bits beside
    values of 4, for each row and group of columns (max |x| / 32639, or / 127). Sums of whole numbers are exact. Floats
    are added in one order on every CPU, hence the same bits, and in another on CUDA, the same in every run. More rows
    are multiplied with the unpacked weight.

    Args:
        x: [.., C_in], float32, bfloat16 or float16.
        values: uint8, what is stored (:mod:`wanda_kernels.packed.values`): of a bitmap [bytes + 64]; of 2:4
            [C_out, C_in / 2] or, of 4 bits, [ceil(C_out / 2), C_in / 2]; without codes as many rows of C_in.
        scales: [C_out, groups], bfloat16: of all of a row's columns, or of 32, 64 or 128 each.
        codes: [C_out, C_in / 8], uint8: a bitmap, or without ``starts`` the indices of 2:4, as in
            :func:`bitmap_linear` and :func:`sparse24_linear`. None: every column is kept. C_in is a multiple of 64.
        starts: [C_out + 1] or, of 4 bits, [ceil(C_out / 2) + 1], int32: where a row's, or a pair of rows', bytes begin.
        bias: [C_out], of the dtype of ``x``, or None.
        bits: 8 or 4.

    Returns:
        [.., C_out] of the dtype of ``x``.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came. Counts are not checked here.
    """
    return torch.ops.wanda.quantized_linear(x, values, scales, codes, starts, bias, bits)


def quantized_experts(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    ends: Tensor,
    codes: Tensor | None = None,
    starts: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    """Products of tokens with the weights of their experts, a stack [E * C_out, C_in]: as :func:`bitmap_experts`, with
    the arguments of :func:`quantized_linear`. Of 4 bits C_out is even.

    Args:
        x: [rows, C_in], sorted by expert.
        ends: [E], int32, contiguous: where each expert's rows end.

    Returns:
        [rows, C_out] of the dtype of ``x``. Rows behind the last end are 0.
    """
    return torch.ops.wanda.quantized_experts(x, values, scales, ends, codes, starts, bits)


def unpack_quantized(
    values: Tensor, scales: Tensor, codes: Tensor | None, starts: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight, [C_out, C_in] of ``dtype``: each value times its scale in float32, rounded. Arguments as in
    :func:`quantized_linear`."""
    return torch.ops.wanda.unpack_quantized(values, scales, codes, starts, bits, dtype)


def _empty_product(x: Tensor, _values: Tensor, scales: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[0]))


def _empty_rows(x: Tensor, _values: Tensor, scales: Tensor, ends: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], scales.shape[0] // ends.shape[0]))


def _empty_weight(
    values: Tensor, scales: Tensor, codes: Tensor | None, _starts: Tensor | None, _bits: int, dtype: torch.dtype
) -> Tensor:
    cols = values.shape[1] if codes is None else codes.shape[1] * 8
    return values.new_empty((scales.shape[0], cols), dtype=dtype)


fake("quantized_linear", check_quantized_linear, _empty_product)
fake("quantized_experts", check_quantized_experts, _empty_rows)
fake("unpack_quantized", check_quantized, _empty_weight)
