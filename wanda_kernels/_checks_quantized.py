"""As ``_checks``, for packed weights of 8 or 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._checks import (
    FLOATS,
    _check_beside,
    _check_device,
    _check_dtype,
    _check_like,
    _check_products,
    _check_shape,
    _check_weight,
)

GROUPS = (32, 64, 128)  # columns that a scale is for, beside all of a row
MOST_COLUMNS = 1 << 20  # int32 holds their sums


def group_of(cols: int, scales: int) -> int:
    """Columns for each of ``scales`` scales of a row; 0 where there is no such group."""
    if scales == 1:
        return cols
    return next((group for group in GROUPS if -(-cols // group) == scales), 0)


def check_quantized(
    op: str, values: Tensor, scales: Tensor, codes: Tensor | None, starts: Tensor | None, bits: int,
    dtype: torch.dtype = torch.float32,
) -> int:  # fmt: skip
    """Returns C_in."""
    _check_dtype(op, "values", values, (torch.uint8,))
    _check_beside(op, "scales", scales, torch.bfloat16, "values", values)
    if bits not in (8, 4):
        raise ValueError(f"wanda::{op}: bits must be 8 or 4, got {bits}")
    if dtype not in FLOATS:
        raise TypeError(f"wanda::{op}: dtype must be float32, bfloat16 or float16, got {dtype}")
    if scales.dim() != 2 or scales.numel() == 0 or not scales.is_contiguous():
        raise ValueError(f"wanda::{op}: scales must be contiguous [C_out, groups], got {list(scales.shape)}")
    rows = scales.shape[0]
    stored = rows if bits == 8 else -(-rows // 2)  # two rows of 4 bits share bytes
    if codes is None:
        if starts is not None:
            raise ValueError(f"wanda::{op}: starts must be None without codes")
        if values.dim() != 2 or values.shape[1] % 64 or values.shape[1] == 0:
            raise ValueError(
                f"wanda::{op}: values must be [{stored}, C_in] with C_in a multiple of 64, got {list(values.shape)}"
            )
        cols = values.shape[1]
        _check_shape(op, "values", values, stored, cols, contiguous=True)
    else:
        _check_beside(op, "codes", codes, torch.uint8, "values", values)
        if codes.dim() != 2 or codes.shape[1] % 8 or codes.shape[1] == 0:
            raise ValueError(
                f"wanda::{op}: codes must be [{rows}, C_in / 8] with C_in a multiple of 64, got {list(codes.shape)}"
            )
        cols = codes.shape[1] * 8
        _check_shape(op, "codes", codes, rows, cols // 8, contiguous=True)
        if starts is None:
            _check_shape(op, "values", values, stored, cols // 2, contiguous=True)
        else:
            _check_beside(op, "starts", starts, torch.int32, "values", values)
            _check_shape(op, "starts", starts, stored + 1, contiguous=True)
            if values.dim() != 1 or values.shape[0] < 64 or not values.is_contiguous():
                raise ValueError(f"wanda::{op}: values must be contiguous [bytes + 64], got {list(values.shape)}")
    if cols > MOST_COLUMNS:
        raise ValueError(f"wanda::{op}: the weight must have at most {MOST_COLUMNS} columns, got {cols}")
    if not group_of(cols, scales.shape[1]):
        raise ValueError(
            f"wanda::{op}: scales must be for 32, 64, 128 or all of the {cols} columns, got {scales.shape[1]} of a row"
        )
    return cols


def check_quantized_linear(
    op: str, x: Tensor, values: Tensor, scales: Tensor, codes: Tensor | None = None, starts: Tensor | None = None,
    bias: Tensor | None = None, bits: int = 8,
) -> None:  # fmt: skip
    cols = check_quantized(op, values, scales, codes, starts, bits)
    _check_dtype(op, "x", x, FLOATS)
    _check_device(op, "x", x, "values", values)
    if x.dim() == 0 or x.shape[-1] != cols:
        raise ValueError(f"wanda::{op}: x must be [.., {cols}], got {list(x.shape)}")
    if bias is not None:
        _check_like(op, "bias", bias, "x", x)
        _check_shape(op, "bias", bias, scales.shape[0])


def check_quantized_experts(
    op: str, x: Tensor, values: Tensor, scales: Tensor, ends: Tensor, codes: Tensor | None = None,
    starts: Tensor | None = None, bits: int = 8,
) -> None:  # fmt: skip
    cols = check_quantized(op, values, scales, codes, starts, bits)
    _check_dtype(op, "x", x, FLOATS)
    _check_device(op, "x", x, "values", values)
    if x.dim() != 2 or x.shape[1] != cols:
        raise ValueError(f"wanda::{op}: x must be [rows, {cols}], got {list(x.shape)}")
    _check_beside(op, "ends", ends, torch.int32, "values", values)
    rows = scales.shape[0]
    if ends.dim() != 1 or len(ends) == 0 or rows % len(ends) or not ends.is_contiguous():
        raise ValueError(
            f"wanda::{op}: ends must be contiguous [E], of a number of experts that divides the {rows} rows of the "
            f"weight, got {list(ends.shape)}"
        )
    if bits == 4 and rows // len(ends) % 2:
        raise ValueError(f"wanda::{op}: experts of 4 bits need an even number of rows, got {rows // len(ends)}")


def check_quantize(op: str, weight: Tensor, bits: int, group: int = 0, importance: Tensor | None = None) -> None:
    _check_weight(op, weight)
    if weight.shape[1] == 0:
        raise ValueError(f"wanda::{op}: weight must have columns, got {list(weight.shape)}")
    if bits not in (8, 4):
        raise ValueError(f"wanda::{op}: bits must be 8 or 4, got {bits}")
    if group not in (0, *GROUPS):
        raise ValueError(f"wanda::{op}: group must be 0 (a whole row), 32, 64 or 128, got {group}")
    if importance is not None:
        _check_beside(op, "importance", importance, torch.float32, "weight", weight)
        _check_shape(op, "importance", importance, weight.shape[1])


def check_pack_kept(op: str, values: Tensor, levels: Tensor, mask: Tensor, starts: Tensor, bits: int) -> None:
    _check_dtype(op, "levels", levels, (torch.int8,))
    _check_beside(op, "values", values, torch.uint8, "levels", levels)
    _check_beside(op, "mask", mask, torch.bool, "levels", levels)
    _check_beside(op, "starts", starts, torch.int32, "levels", levels)
    if bits not in (8, 4):
        raise ValueError(f"wanda::{op}: bits must be 8 or 4, got {bits}")
    if levels.dim() != 2 or not levels.is_contiguous():
        raise ValueError(f"wanda::{op}: levels must be contiguous [C_out, C_in], got {list(levels.shape)}")
    _check_shape(op, "mask", mask, *levels.shape, contiguous=True)
    stored = levels.shape[0] if bits == 8 else -(-levels.shape[0] // 2)
    _check_shape(op, "starts", starts, stored + 1, contiguous=True)
    if values.dim() != 1 or not values.is_contiguous():
        raise ValueError(f"wanda::{op}: values must be contiguous [bytes], got {list(values.shape)}")


def check_kept(op: str, uneven: int) -> None:
    """``uneven``: rows, or pairs of 4 bits, whose bytes are others than ``starts`` says."""
    if uneven:
        raise ValueError(
            f"wanda::{op}: starts must be where the values of mask begin, {uneven} of its rows take other bytes"
        )


def stored_counts(counts: Tensor, bits: int) -> Tensor:
    """Of the values of each row: the bytes of each row, or of 4 bits of each pair."""
    return counts if bits == 8 else pad(counts, (0, len(counts) % 2)).unflatten(0, (-1, 2)).amax(dim=1)


def check_levels(
    op: str, levels: Tensor, weight: Tensor, scales: Tensor, gram: Tensor, bits: int, damping: float = 1.0,
    passes: int = 3, errors: Tensor | None = None,
) -> int:  # fmt: skip
    """Returns the columns of a scale."""
    _check_weight(op, weight)
    rows, cols = weight.shape
    _check_beside(op, "levels", levels, torch.int8, "weight", weight)
    _check_shape(op, "levels", levels, rows, cols)
    _check_beside(op, "scales", scales, torch.bfloat16, "weight", weight)
    if scales.dim() != 2 or len(scales) != rows:
        raise ValueError(f"wanda::{op}: scales must be [{rows}, groups], got {list(scales.shape)}")
    group = group_of(cols, scales.shape[1])
    if not group:
        raise ValueError(
            f"wanda::{op}: scales must be for 32, 64, 128 or all of the {cols} columns, got {scales.shape[1]} of a row"
        )
    _check_products(op, gram, weight, damping)
    if bits not in (8, 4):
        raise ValueError(f"wanda::{op}: bits must be 8 or 4, got {bits}")
    if passes < 0:
        raise ValueError(f"wanda::{op}: passes must be >= 0, got {passes}")
    if errors is not None:
        _check_beside(op, "errors", errors, torch.float64, "weight", weight)
        _check_shape(op, "errors", errors, rows, contiguous=True)
    return group
