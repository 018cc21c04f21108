"""Weights to levels of 8 or 4 bits, and those that a bitmap keeps to bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import fake
from .._checks_quantized import check_pack_kept, check_quantize


def quantize(weight: Tensor, bits: int, group: int = 0, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """To the nearest whole number, with the scale of the least squared error among some for each group.

    Scales are a group's largest weight divided by 6.5, 6.75, .. 10.75 of 4 bits, or by 127, 127.5, 128 or 129 of 8,
    rounded to bfloat16. Levels of 4 bits are -8 to 7, of 8 bits -128 to 127. The same bits for any number of threads.

    Args:
        weight: [C_out, C_in], float32, bfloat16 or float16, finite.
        bits: 8 or 4.
        group: columns of a scale, 32, 64 or 128; 0: all of a row.
        importance: [C_in], float32, >= 0: what the squared errors of each column count; None: the same.

    Returns:
        levels [C_out, C_in] int8 (0 where the weight is 0 or next to it), scales [C_out, groups] bfloat16.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came. ValueError: a weight is not finite.
    """
    return torch.ops.wanda.quantize(weight, bits, group, importance)


def exact_levels(weight: Tensor, bits: int, group: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The levels and scales that a weight already consists of: each level times its scale, rounded to the weight's
    dtype, is the weight to the bit (-0.0 counts as 0).

    Args:
        weight, bits, group: as in :func:`quantize`; NaN and infinity are no levels.

    Returns:
        levels [C_out, C_in] int8, scales [C_out, groups] bfloat16, and whether there are any, bool without dimensions:
        where it is False, the others are unspecified.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came.
    """
    return torch.ops.wanda.exact_levels(weight, bits, group)


def pack_kept_(values: Tensor, levels: Tensor, mask: Tensor, starts: Tensor, bits: int) -> None:
    """Write a bitmap's values of 8 or 4 bits, as :func:`quantized_linear` takes them, to ``values``, in place.

    Args:
        values: [bytes], uint8, contiguous. What is before the first start and behind the last one stays as it is.
        levels: [C_out, C_in], int8, contiguous, of 4 bits from -8 to 7 (not checked).
        mask: [C_out, C_in], bool, contiguous, True = kept.
        starts: [C_out + 1] or, of 4 bits, [ceil(C_out / 2) + 1], int32, contiguous: where a row's, or a pair of rows',
            bytes begin; a pair has as many as the longer of its rows.
        bits: 8 or 4.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came. ValueError: ``starts`` does not fit
            ``mask``; what is in ``values`` then is unspecified.
    """
    torch.ops.wanda.pack_kept_(values, levels, mask, starts, bits)


def _empty_levels(weight: Tensor, _bits: int, group: int = 0, *_: object) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    group = min(group or cols, cols)
    scales = weight.new_empty((rows, -(-cols // group)), dtype=torch.bfloat16)
    return weight.new_empty((rows, cols), dtype=torch.int8), scales


fake("quantize", check_quantize, _empty_levels)


def _empty_exact(weight: Tensor, bits: int, group: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return *_empty_levels(weight, bits, group), weight.new_empty((), dtype=torch.bool)


fake("exact_levels", check_quantize, _empty_exact)
fake("pack_kept_", check_pack_kept)
