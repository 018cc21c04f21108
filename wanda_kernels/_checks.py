"""Argument checks of the PyTorch reference and of the fake implementations; csrc/checks.h says the same in C++.

Each takes an operator's name and arguments. An error names the operator, the argument, what is required and what came.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PACKABLE = (torch.bfloat16, torch.float16)
GRAM_STEP = 384  # rows that a part of a Gram matrix begins at a multiple of


def _check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...], note: str = "") -> None:
    if tensor.dtype not in allowed:
        required = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        required = " or ".join(required.rsplit(", ", 1))
        raise TypeError(f"wanda::{op}: {name} must be {required}{note}, got {tensor.dtype}")


def _check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"wanda::{op}: {name} is on {tensor.device}, {other_name} is on {other.device}")


def _check_beside(op: str, name: str, tensor: Tensor, dtype: torch.dtype, other_name: str, other: Tensor) -> None:
    """Of ``dtype``, where ``other`` is."""
    _check_dtype(op, name, tensor, (dtype,))
    _check_device(op, name, tensor, other_name, other)


def _check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Of the dtype and on the device of ``other``."""
    if tensor.dtype != other.dtype:
        verb = "are" if other_name == "values" else "is"
        raise TypeError(f"wanda::{op}: {name} must be {other.dtype}, as {other_name} {verb}, got {tensor.dtype}")
    _check_device(op, name, tensor, other_name, other)


def _check_shape(op: str, name: str, tensor: Tensor, *shape: int, contiguous: bool = False) -> None:
    if tuple(tensor.shape) != shape or (contiguous and not tensor.is_contiguous()):
        required = f"{'contiguous ' if contiguous else ''}{list(shape)}"
        raise ValueError(f"wanda::{op}: {name} must be {required}, got {list(tensor.shape)}")


def _check_weight(op: str, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"wanda::{op}: weight must have 2 dimensions [C_out, C_in], got {weight.dim()}")
    _check_dtype(op, "weight", weight, FLOATS)


def _check_weights(op: str, weight: Tensor) -> None:
    """A matrix or a stack of them."""
    if weight.dim() not in (2, 3):
        raise ValueError(
            f"wanda::{op}: weight must have 2 dimensions [C_out, C_in] or 3 [E, C_out, C_in], got {weight.dim()}"
        )
    _check_dtype(op, "weight", weight, FLOATS)


def _check_norm(op: str, norm: Tensor, weight: Tensor) -> None:
    _check_beside(op, "norm", norm, torch.float32, "weight", weight)
    if norm.dim() != weight.dim() - 1:
        required = "1 dimension [C_in]" if weight.dim() == 2 else "2 dimensions [E, C_in]"
        raise ValueError(f"wanda::{op}: norm must have {required}, got {norm.dim()}")
    if norm.shape[-1] != weight.shape[-1]:
        raise ValueError(f"wanda::{op}: norm has {norm.shape[-1]} elements, weight has {weight.shape[-1]} columns")
    if weight.dim() == 3 and norm.shape[0] != weight.shape[0]:
        raise ValueError(f"wanda::{op}: norm has {norm.shape[0]} rows, weight has {weight.shape[0]} matrices")


def _check_score_sums(op: str, score_sums: Tensor | None, weight: Tensor) -> None:
    if score_sums is not None:
        _check_beside(op, "score_sums", score_sums, torch.float32, "weight", weight)
        _check_shape(op, "score_sums", score_sums, *weight.shape[:-1], 2, contiguous=True)


def check_rows(op: str, weight: Tensor, norm: Tensor, sparsity: float, score_sums: Tensor | None = None) -> None:
    _check_weights(op, weight)
    _check_norm(op, norm, weight)
    if not 0 <= sparsity < 1:
        raise ValueError(f"wanda::{op}: sparsity must be in [0, 1), got {sparsity}")
    _check_score_sums(op, score_sums, weight)


def _check_pattern(op: str, weight: Tensor, n: int, m: int) -> None:
    if not 0 < n < m:
        raise ValueError(f"wanda::{op}: a pattern n:m needs 0 < n < m, got {n}:{m}")
    if weight.shape[-1] % m:
        raise ValueError(f"wanda::{op}: weight has {weight.shape[-1]} columns, not a multiple of m = {m}")


def check_nm(op: str, weight: Tensor, norm: Tensor, n: int, m: int, score_sums: Tensor | None = None) -> None:
    _check_weights(op, weight)
    _check_norm(op, norm, weight)
    _check_pattern(op, weight, n, m)
    _check_score_sums(op, score_sums, weight)


def _check_products(op: str, gram: Tensor, weight: Tensor, damping: float) -> None:
    cols = weight.shape[1]
    _check_beside(op, "gram", gram, torch.float32, "weight", weight)
    _check_shape(op, "gram", gram, cols, cols)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"wanda::{op}: damping must be finite and >= 0, got {damping}")


def _check_refine(
    op: str, mask: Tensor, weight: Tensor, gram: Tensor, damping: float, sums: Tensor | None = None
) -> None:
    _check_weight(op, weight)
    rows, cols = weight.shape
    _check_beside(op, "mask", mask, torch.bool, "weight", weight)
    _check_shape(op, "mask", mask, rows, cols, contiguous=True)
    _check_products(op, gram, weight, damping)
    if sums is not None:
        _check_beside(op, "sums", sums, torch.float64, "weight", weight)
        _check_shape(op, "sums", sums, rows, 2, contiguous=True)


def check_refine_rows(
    op: str,
    mask: Tensor,
    weight: Tensor,
    gram: Tensor,
    damping: float = 0.3,
    most_swaps: int | None = None,
    sums: Tensor | None = None,
) -> int:
    """Returns the most swaps of a row."""
    _check_refine(op, mask, weight, gram, damping, sums)
    if most_swaps is None:
        return max(1, weight.shape[1] // 16)
    if most_swaps < 0:
        raise ValueError(f"wanda::{op}: most_swaps must be None or >= 0, got {most_swaps}")
    return most_swaps


def check_refine_nm(
    op: str,
    mask: Tensor,
    weight: Tensor,
    gram: Tensor,
    n: int,
    m: int,
    damping: float = 0.3,
    sweeps: int = 4,
    sums: Tensor | None = None,
) -> None:
    _check_refine(op, mask, weight, gram, damping, sums)
    _check_pattern(op, weight, n, m)
    if sweeps < 0:
        raise ValueError(f"wanda::{op}: sweeps must be >= 0, got {sweeps}")


def check_solve(
    op: str,
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    target: Tensor,
    damping: float = 0.3,
    steps: int = 10,
    sums: Tensor | None = None,
) -> None:
    _check_refine(op, mask, weight, gram, damping, sums)
    _check_like(op, "target", target, "weight", weight)
    _check_shape(op, "target", target, *weight.shape)
    if steps < 0:
        raise ValueError(f"wanda::{op}: steps must be >= 0, got {steps}")


def check_groups(op: str, groups: int, n: int, m: int) -> None:
    """``groups``: those of the mask that keep another number than n."""
    if groups:
        raise ValueError(f"wanda::{op}: mask must keep {n} of every {m} columns, {groups} of its groups do not")


def check_packable(op: str, weight: Tensor, norm: Tensor | None = None) -> None:
    _check_weight(op, weight)
    _check_dtype(op, "weight", weight, PACKABLE, " (torch packs float32 as 1:2)")
    if weight.shape[0] % 32 or weight.shape[1] % 64 or weight.numel() == 0:
        raise ValueError(
            f"wanda::{op}: weight must have a multiple of 32 rows and of 64 columns, got {list(weight.shape)}"
        )
    if norm is not None:
        _check_norm(op, norm, weight)


def check_packed(op: str, values: Tensor, metadata: Tensor) -> None:
    _check_dtype(op, "values", values, PACKABLE)
    _check_beside(op, "metadata", metadata, torch.int16, "values", values)
    if values.dim() != 2 or values.shape[0] % 32 or values.shape[1] % 32 or values.numel() == 0:
        raise ValueError(
            f"wanda::{op}: values must be [C_out, C_in / 2] with multiples of 32, got {list(values.shape)}"
        )
    _check_shape(op, "metadata", metadata, values.shape[0], values.shape[1] // 8)


def check_sqnorm(
    op: str, sqnorm: Tensor, x: Tensor, token_mask: Tensor | None = None, ends: Tensor | None = None
) -> tuple[int, int, int]:
    """Returns (sequences, tokens, C_in): x may be flattened, the sequences then come from sqnorm. With ``ends``:
    (segments, rows, C_in)."""
    _check_dtype(op, "sqnorm", sqnorm, (torch.float32,))
    _check_dtype(op, "x", x, FLOATS)
    _check_device(op, "sqnorm", sqnorm, "x", x)
    if sqnorm.dim() not in (1, 2) or not sqnorm.is_contiguous():
        raise ValueError(
            f"wanda::{op}: sqnorm must be contiguous [C_in] or [sequences, C_in], got {list(sqnorm.shape)}"
        )
    if x.dim() not in (2, 3):
        raise ValueError(f"wanda::{op}: x must be [sequences, tokens, C_in] or [tokens, C_in], got {list(x.shape)}")
    cols = sqnorm.shape[-1]
    if x.shape[-1] != cols:
        raise ValueError(f"wanda::{op}: x has {x.shape[-1]} columns, sqnorm has {cols}")
    if ends is not None:
        return _check_segments(op, sqnorm, x, token_mask, ends)
    sequences = sqnorm.shape[0] if sqnorm.dim() == 2 else x.shape[0] if x.dim() == 3 else 1
    if x.dim() == 3:
        if x.shape[0] != sequences:
            raise ValueError(f"wanda::{op}: x has {x.shape[0]} sequences, sqnorm has {sequences}")
        tokens = x.shape[1]
    else:
        if (x.shape[0] % sequences if sequences else x.shape[0]) != 0:
            raise ValueError(
                f"wanda::{op}: x has {x.shape[0]} tokens, not a multiple of the {sequences} sequences of sqnorm"
            )
        tokens = x.shape[0] // sequences if sequences else 0
    if token_mask is not None:
        _check_beside(op, "token_mask", token_mask, torch.bool, "x", x)
        fits = token_mask.dim() == 1 or (token_mask.dim() == 2 and token_mask.shape[0] == sequences)
        if not fits or token_mask.numel() != sequences * tokens:
            raise ValueError(
                f"wanda::{op}: token_mask must be [{sequences}, {tokens}] or flattened, got {list(token_mask.shape)}"
            )
    return sequences, tokens, cols


def _check_segments(
    op: str, sqnorm: Tensor, x: Tensor, token_mask: Tensor | None, ends: Tensor
) -> tuple[int, int, int]:
    if token_mask is not None:
        raise ValueError(f"wanda::{op}: token_mask must be None where ends are given: leave those rows out of x")
    if sqnorm.dim() != 2:
        raise ValueError(f"wanda::{op}: sqnorm must be [segments, C_in] where ends are given, got {list(sqnorm.shape)}")
    if x.dim() != 2:
        raise ValueError(f"wanda::{op}: x must be [rows, C_in] where ends are given, got {list(x.shape)}")
    _check_beside(op, "ends", ends, torch.int32, "x", x)
    _check_shape(op, "ends", ends, sqnorm.shape[0], contiguous=True)
    return sqnorm.shape[0], x.shape[0], x.shape[1]


def check_ends(op: str, ends: Tensor, rows: int) -> list[int]:
    """What is in ``ends``: [segments] ascending from >= 0 to <= ``rows``."""
    found: list[int] = ends.tolist()
    for segment, (begin, end) in enumerate(zip([0, *found], found, strict=False)):
        if not begin <= end <= rows:
            raise ValueError(
                f"wanda::{op}: ends must ascend from 0 to at most {rows}, the rows of x, got ends[{segment}] = {end} "
                f"after {begin}"
            )
    return found


def check_gram(op: str, gram: Tensor, x: Tensor, beta: float = 1.0, alpha: float = 1.0, first: int = 0) -> None:
    _check_dtype(op, "gram", gram, (torch.float32,))
    _check_dtype(op, "x", x, FLOATS)
    _check_device(op, "gram", gram, "x", x)
    if x.dim() != 2:
        raise ValueError(f"wanda::{op}: x must have 2 dimensions [tokens, C_in], got {x.dim()}")
    cols = x.shape[1]
    if not 0 <= first <= cols or first % GRAM_STEP:
        raise ValueError(f"wanda::{op}: first must be a multiple of {GRAM_STEP} in [0, {cols}], got {first}")
    if gram.dim() != 2 or gram.shape[1] != cols or first + gram.shape[0] > cols:
        raise ValueError(
            f"wanda::{op}: gram must be [rows, {cols}] with at most {cols - first} rows, got {list(gram.shape)}"
        )


def check_rms_norm_sqnorm(
    op: str, x: Tensor, weight: Tensor, eps: float, sqnorm: Tensor, token_mask: Tensor | None = None, *_: bool
) -> None:
    check_sqnorm(op, sqnorm, x, token_mask)
    _check_like(op, "weight", weight, "x", x)
    _check_shape(op, "weight", weight, sqnorm.shape[-1])


def check_act_mul_sqnorm(op: str, gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None = None) -> None:
    check_sqnorm(op, sqnorm, gate, token_mask)
    _check_like(op, "up", up, "gate", gate)
    if up.shape != gate.shape:
        raise ValueError(f"wanda::{op}: up must be {list(gate.shape)}, as gate is, got {list(up.shape)}")


def _check_packed_values(op: str, values: Tensor, codes: Tensor, name: str) -> None:
    _check_dtype(op, "values", values, FLOATS)
    _check_beside(op, name, codes, torch.uint8, "values", values)
    if codes.dim() != 2 or codes.shape[1] % 8 or codes.numel() == 0 or not codes.is_contiguous():
        raise ValueError(
            f"wanda::{op}: {name} must be contiguous [C_out, C_in / 8] with C_in a multiple of 64, got "
            f"{list(codes.shape)}"
        )
    if not values.is_contiguous():
        raise ValueError(f"wanda::{op}: values must be contiguous")


def check_bitmap(op: str, values: Tensor, bitmap: Tensor, starts: Tensor) -> None:
    _check_packed_values(op, values, bitmap, "bitmap")
    _check_beside(op, "starts", starts, torch.int32, "values", values)
    _check_shape(op, "starts", starts, bitmap.shape[0] + 1, contiguous=True)
    if values.dim() != 1 or values.shape[0] < 32:
        raise ValueError(f"wanda::{op}: values must be [kept + 32], got {list(values.shape)}")


def check_sparse24(op: str, values: Tensor, indices: Tensor) -> None:
    _check_packed_values(op, values, indices, "indices")
    _check_shape(op, "values", values, indices.shape[0], indices.shape[1] * 4)


def check_bitmap_linear(
    op: str, x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, bias: Tensor | None = None
) -> None:
    check_bitmap(op, values, bitmap, starts)
    _check_product(op, x, "values", values, bitmap.shape[0], bitmap.shape[1] * 8, bias)


def check_sparse24_linear(op: str, x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> None:
    check_sparse24(op, values, indices)
    _check_product(op, x, "values", values, indices.shape[0], indices.shape[1] * 8, bias)


def check_dense_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    _check_dtype(op, "weight", weight, FLOATS)
    if weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError(
            f"wanda::{op}: weight must be contiguous [C_out, C_in], got {list(weight.shape)} with strides "
            f"{list(weight.stride())}"
        )
    _check_product(op, x, "weight", weight, weight.shape[0], weight.shape[1], bias)


def _check_product(op: str, x: Tensor, name: str, weight: Tensor, rows: int, cols: int, bias: Tensor | None) -> None:
    _check_like(op, "x", x, name, weight)
    if x.dim() == 0 or x.shape[-1] != cols:
        raise ValueError(f"wanda::{op}: x must be [.., {cols}], got {list(x.shape)}")
    if bias is not None:
        _check_like(op, "bias", bias, name, weight)
        _check_shape(op, "bias", bias, rows)


def check_bitmap_experts(op: str, x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, ends: Tensor) -> None:
    check_bitmap(op, values, bitmap, starts)
    _check_experts(op, x, values, bitmap, ends)


def check_sparse24_experts(op: str, x: Tensor, values: Tensor, indices: Tensor, ends: Tensor) -> None:
    check_sparse24(op, values, indices)
    _check_experts(op, x, values, indices, ends)


def _check_experts(op: str, x: Tensor, values: Tensor, codes: Tensor, ends: Tensor) -> None:
    rows, cols = codes.shape[0], codes.shape[1] * 8
    _check_like(op, "x", x, "values", values)
    if x.dim() != 2 or x.shape[1] != cols:
        raise ValueError(f"wanda::{op}: x must be [rows, {cols}], got {list(x.shape)}")
    _check_beside(op, "ends", ends, torch.int32, "values", values)
    if ends.dim() != 1 or len(ends) == 0 or rows % len(ends) or not ends.is_contiguous():
        raise ValueError(
            f"wanda::{op}: ends must be contiguous [E], of a number of experts that divides the {rows} rows of the "
            f"weight, got {list(ends.shape)}"
        )
