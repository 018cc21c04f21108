"""Products with packed sparse weights and with dense ones, and unpacking."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import fake
from .._checks import (
    check_bitmap,
    check_bitmap_experts,
    check_bitmap_linear,
    check_dense_linear,
    check_sparse24,
    check_sparse24_experts,
    check_sparse24_linear,
)


def bitmap_linear(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ unpack_bitmap(values, bitmap, starts).T + bias``, sums in float32, rounded once.

    Few rows of ``x`` (32 on the CPU, 16 on CUDA) are multiplied with the packed weight as it is; more with the unpacked
    one (:func:`wanda_kernels.packed.dispatch.direct_tokens`).

    Args:
        x: [.., C_in], of the dtype of ``values``.
        values: [kept + 32], float32, bfloat16 or float16: the weights that are not +0, row by row, and 32 zeros that
            kernels may read.
        bitmap: [C_out, C_in / 8], uint8: bit i of a byte says that its column i is kept. C_in is a multiple of 64.
        starts: [C_out + 1], int32: where each row's values begin.
        bias: [C_out] or None.

    Returns:
        [.., C_out] of the dtype of ``x``.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came. Counts are not checked here but
            where weights are packed or loaded (:func:`wanda_kernels.packed.validate_bitmap`).
    """
    return torch.ops.wanda.bitmap_linear(x, values, bitmap, starts, bias)


def sparse24_linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ unpack_sparse24(values, indices).T + bias``, otherwise as :func:`bitmap_linear`.

    Args:
        x: [.., C_in], of the dtype of ``values``.
        values: [C_out, C_in / 2], float32, bfloat16 or float16: two of every four columns.
        indices: [C_out, C_in / 8], uint8: for each four columns ``first | second << 2``, two groups a byte, the lower
            bits first; first < second. C_in is a multiple of 64.
        bias: [C_out] or None.
    """
    return torch.ops.wanda.sparse24_linear(x, values, indices, bias)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, sums in float32, rounded once.

    On the CPU up to 32 rows of ``x`` take the weight from memory once, and a row has the same bits in any batch, for
    any number of threads; more go through torch's product, as all do on CUDA.

    Args:
        x: [.., C_in], of the dtype of ``weight``.
        weight: [C_out, C_in], contiguous, float32, bfloat16 or float16; any C_out and C_in.
        bias: [C_out] or None.

    Returns:
        [.., C_out] of the dtype of ``x``.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came.
    """
    return torch.ops.wanda.dense_linear(x, weight, bias)


def bitmap_experts(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Products of tokens with the weights of their experts: rows ends[e - 1] to ends[e] of ``x`` with matrix e of a
    stack, as :func:`bitmap_linear`. What belongs to experts without a token is not read.

    On the CPU up to 32 tokens of an expert are multiplied with the packed weight as it is, with the same bits for any
    number of threads; more with the unpacked one, a band at a time.

    Args:
        x: [rows, C_in], of the dtype of ``values``, sorted by expert.
        values: [kept + 32], as in :func:`bitmap_linear`, of all experts, one after the other.
        bitmap: [E * C_out, C_in / 8], uint8.
        starts: [E * C_out + 1], int32.
        ends: [E], int32, contiguous, on the device of ``x``. Ascending from >= 0 to <= rows: where each expert's rows
            end. On CUDA what is in it is not checked, for that would wait for the device: no kernel reads or writes
            outside of its tensors, but the products are wrong.

    Returns:
        [rows, C_out] of the dtype of ``x``. Rows behind the last end are 0.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came. Counts are not checked here, as in
            :func:`bitmap_linear`.
    """
    return torch.ops.wanda.bitmap_experts(x, values, bitmap, starts, ends)


def sparse24_experts(x: Tensor, values: Tensor, indices: Tensor, ends: Tensor) -> Tensor:
    """As :func:`bitmap_experts`, of 2:4 weights.

    Args:
        x: [rows, C_in], of the dtype of ``values``, sorted by expert.
        values: [E * C_out, C_in / 2].
        indices: [E * C_out, C_in / 8], uint8, as in :func:`sparse24_linear`.
        ends: [E], int32.
    """
    return torch.ops.wanda.sparse24_experts(x, values, indices, ends)


def unpack_bitmap(values: Tensor, bitmap: Tensor, starts: Tensor) -> Tensor:
    """The dense weight, [C_out, C_in], bit for bit what was packed. Arguments as in :func:`bitmap_linear`.

    ``bitmap[a:b]`` and ``starts[a : b + 1]``, with all values, give rows a to b.
    """
    return torch.ops.wanda.unpack_bitmap(values, bitmap, starts)


def unpack_sparse24(values: Tensor, indices: Tensor) -> Tensor:
    """The dense weight, [C_out, C_in], bit for bit what was packed. Arguments as in :func:`sparse24_linear`."""
    return torch.ops.wanda.unpack_sparse24(values, indices)


def _empty_product(x: Tensor, _values: Tensor, codes: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _empty_dense_product(x: Tensor, weight: Tensor, _bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _empty_rows(x: Tensor, _values: Tensor, codes: Tensor, *others: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0] // others[-1].shape[0]))


def _empty_weight(values: Tensor, codes: Tensor, *_: Tensor) -> Tensor:
    return values.new_empty((codes.shape[0], codes.shape[1] * 8))


fake("bitmap_linear", check_bitmap_linear, _empty_product)
fake("sparse24_linear", check_sparse24_linear, _empty_product)
fake("dense_linear", check_dense_linear, _empty_dense_product)
fake("bitmap_experts", check_bitmap_experts, _empty_rows)
fake("sparse24_experts", check_sparse24_experts, _empty_rows)
fake("unpack_bitmap", check_bitmap, _empty_weight)
fake("unpack_sparse24", check_sparse24, _empty_weight)
