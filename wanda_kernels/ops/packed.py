"""Products with packed sparse weights, and unpacking."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend  # noqa: F401  (registers the operators)
from .._checks import check_bitmap, check_packed_linear, check_sparse24


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


def unpack_bitmap(values: Tensor, bitmap: Tensor, starts: Tensor) -> Tensor:
    """The dense weight, [C_out, C_in], bit for bit what was packed. Arguments as in :func:`bitmap_linear`.

    ``bitmap[a:b]`` and ``starts[a : b + 1]``, with all values, give rows a to b.
    """
    return torch.ops.wanda.unpack_bitmap(values, bitmap, starts)


def unpack_sparse24(values: Tensor, indices: Tensor) -> Tensor:
    """The dense weight, [C_out, C_in], bit for bit what was packed. Arguments as in :func:`sparse24_linear`."""
    return torch.ops.wanda.unpack_sparse24(values, indices)


@torch.library.register_fake("wanda::bitmap_linear")
def _(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    check_bitmap("bitmap_linear", values, bitmap, starts)
    check_packed_linear("bitmap_linear", x, values, bitmap, bias)
    return x.new_empty((*x.shape[:-1], bitmap.shape[0]))


@torch.library.register_fake("wanda::sparse24_linear")
def _(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    check_sparse24("sparse24_linear", values, indices)
    check_packed_linear("sparse24_linear", x, values, indices, bias)
    return x.new_empty((*x.shape[:-1], indices.shape[0]))


@torch.library.register_fake("wanda::unpack_bitmap")
def _(values: Tensor, bitmap: Tensor, starts: Tensor) -> Tensor:
    check_bitmap("unpack_bitmap", values, bitmap, starts)
    return values.new_empty((bitmap.shape[0], bitmap.shape[1] * 8))


@torch.library.register_fake("wanda::unpack_sparse24")
def _(values: Tensor, indices: Tensor) -> Tensor:
    check_sparse24("unpack_sparse24", values, indices)
    return values.new_empty((indices.shape[0], indices.shape[1] * 8))
