"""Argument checks of the PyTorch reference and of the fake implementations; csrc/checks.h says the same in C++.

An error names the operator, the argument, what is required and what came.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PACKABLE = (torch.bfloat16, torch.float16)


def _same_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"wanda::{op}: {name} is on {tensor.device}, {other_name} is on {other.device}")


def check_weight(op: str, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"wanda::{op}: weight must have 2 dimensions [C_out, C_in], got {weight.dim()}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"wanda::{op}: weight must be float32, bfloat16 or float16, got {weight.dtype}")


def check_norm(op: str, norm: Tensor, weight: Tensor) -> None:
    if norm.dtype != torch.float32:
        raise TypeError(f"wanda::{op}: norm must be float32, got {norm.dtype}")
    _same_device(op, "norm", norm, "weight", weight)
    if norm.dim() != 1:
        raise ValueError(f"wanda::{op}: norm must have 1 dimension [C_in], got {norm.dim()}")
    if norm.shape[0] != weight.shape[1]:
        raise ValueError(f"wanda::{op}: norm has {norm.shape[0]} elements, weight has {weight.shape[1]} columns")


def check_score_sums(op: str, score_sums: Tensor | None, weight: Tensor) -> None:
    if score_sums is None:
        return
    if score_sums.dtype != torch.float32:
        raise TypeError(f"wanda::{op}: score_sums must be float32, got {score_sums.dtype}")
    _same_device(op, "score_sums", score_sums, "weight", weight)
    if tuple(score_sums.shape) != (weight.shape[0], 2) or not score_sums.is_contiguous():
        raise ValueError(
            f"wanda::{op}: score_sums must be contiguous [{weight.shape[0]}, 2], got {list(score_sums.shape)}"
        )


def check_sparsity(op: str, sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"wanda::{op}: sparsity must be in [0, 1), got {sparsity}")


def check_pattern(op: str, weight: Tensor, n: int, m: int) -> None:
    if not 0 < n < m:
        raise ValueError(f"wanda::{op}: a pattern n:m needs 0 < n < m, got {n}:{m}")
    if weight.shape[1] % m:
        raise ValueError(f"wanda::{op}: weight has {weight.shape[1]} columns, not a multiple of m = {m}")


def check_packable(op: str, weight: Tensor) -> None:
    check_weight(op, weight)
    if weight.dtype not in PACKABLE:
        raise TypeError(
            f"wanda::{op}: weight must be bfloat16 or float16 (torch packs float32 as 1:2), got {weight.dtype}"
        )
    if weight.shape[0] % 32 or weight.shape[1] % 64 or weight.numel() == 0:
        raise ValueError(
            f"wanda::{op}: weight must have a multiple of 32 rows and of 64 columns, got {list(weight.shape)}"
        )


def check_packed(op: str, values: Tensor, metadata: Tensor) -> None:
    if values.dtype not in PACKABLE:
        raise TypeError(f"wanda::{op}: values must be bfloat16 or float16, got {values.dtype}")
    if metadata.dtype != torch.int16:
        raise TypeError(f"wanda::{op}: metadata must be int16, got {metadata.dtype}")
    _same_device(op, "metadata", metadata, "values", values)
    if values.dim() != 2 or values.shape[0] % 32 or values.shape[1] % 32 or values.numel() == 0:
        raise ValueError(
            f"wanda::{op}: values must be [C_out, C_in / 2] with multiples of 32, got {list(values.shape)}"
        )
    if tuple(metadata.shape) != (values.shape[0], values.shape[1] // 8):
        raise ValueError(
            f"wanda::{op}: metadata must be [{values.shape[0]}, {values.shape[1] // 8}], got {list(metadata.shape)}"
        )


def check_sqnorm(op: str, sqnorm: Tensor, x: Tensor, token_mask: Tensor | None) -> tuple[int, int, int]:
    """Returns (sequences, tokens, C_in): x may be flattened, the sequences then come from sqnorm."""
    if sqnorm.dtype != torch.float32:
        raise TypeError(f"wanda::{op}: sqnorm must be float32, got {sqnorm.dtype}")
    if x.dtype not in FLOATS:
        raise TypeError(f"wanda::{op}: x must be float32, bfloat16 or float16, got {x.dtype}")
    _same_device(op, "sqnorm", sqnorm, "x", x)
    if sqnorm.dim() not in (1, 2) or not sqnorm.is_contiguous():
        raise ValueError(
            f"wanda::{op}: sqnorm must be contiguous [C_in] or [sequences, C_in], got {list(sqnorm.shape)}"
        )
    if x.dim() not in (2, 3):
        raise ValueError(f"wanda::{op}: x must be [sequences, tokens, C_in] or [tokens, C_in], got {list(x.shape)}")
    cols = sqnorm.shape[-1]
    if x.shape[-1] != cols:
        raise ValueError(f"wanda::{op}: x has {x.shape[-1]} columns, sqnorm has {cols}")
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
        if token_mask.dtype != torch.bool:
            raise TypeError(f"wanda::{op}: token_mask must be bool, got {token_mask.dtype}")
        _same_device(op, "token_mask", token_mask, "x", x)
        fits = token_mask.dim() == 1 or (token_mask.dim() == 2 and token_mask.shape[0] == sequences)
        if not fits or token_mask.numel() != sequences * tokens:
            raise ValueError(
                f"wanda::{op}: token_mask must be [{sequences}, {tokens}] or flattened, got {list(token_mask.shape)}"
            )
    return sequences, tokens, cols


def check_rms_norm_sqnorm(op: str, x: Tensor, weight: Tensor, sqnorm: Tensor, token_mask: Tensor | None) -> None:
    _, _, cols = check_sqnorm(op, sqnorm, x, token_mask)
    if weight.dtype != x.dtype:
        raise TypeError(f"wanda::{op}: weight must be {x.dtype}, as x is, got {weight.dtype}")
    _same_device(op, "weight", weight, "x", x)
    if tuple(weight.shape) != (cols,):
        raise ValueError(f"wanda::{op}: weight must be [{cols}], got {list(weight.shape)}")


def check_act_mul_sqnorm(op: str, gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None) -> None:
    check_sqnorm(op, sqnorm, gate, token_mask)
    if up.dtype != gate.dtype:
        raise TypeError(f"wanda::{op}: up must be {gate.dtype}, as gate is, got {up.dtype}")
    _same_device(op, "up", up, "gate", gate)
    if up.shape != gate.shape:
        raise ValueError(f"wanda::{op}: up must be {list(gate.shape)}, as gate is, got {list(up.shape)}")


def _check_packed_values(op: str, values: Tensor, codes: Tensor, name: str) -> None:
    if values.dtype not in FLOATS:
        raise TypeError(f"wanda::{op}: values must be float32, bfloat16 or float16, got {values.dtype}")
    if codes.dtype != torch.uint8:
        raise TypeError(f"wanda::{op}: {name} must be uint8, got {codes.dtype}")
    _same_device(op, name, codes, "values", values)
    if codes.dim() != 2 or codes.shape[1] % 8 or codes.numel() == 0 or not codes.is_contiguous():
        raise ValueError(
            f"wanda::{op}: {name} must be contiguous [C_out, C_in / 8] with C_in a multiple of 64, got "
            f"{list(codes.shape)}"
        )
    if not values.is_contiguous():
        raise ValueError(f"wanda::{op}: values must be contiguous")


def check_bitmap(op: str, values: Tensor, bitmap: Tensor, starts: Tensor) -> None:
    _check_packed_values(op, values, bitmap, "bitmap")
    if starts.dtype != torch.int32:
        raise TypeError(f"wanda::{op}: starts must be int32, got {starts.dtype}")
    _same_device(op, "starts", starts, "values", values)
    if tuple(starts.shape) != (bitmap.shape[0] + 1,) or not starts.is_contiguous():
        raise ValueError(f"wanda::{op}: starts must be contiguous [{bitmap.shape[0] + 1}], got {list(starts.shape)}")
    if values.dim() != 1 or values.shape[0] < 32:
        raise ValueError(f"wanda::{op}: values must be [kept + 32], got {list(values.shape)}")


def check_sparse24(op: str, values: Tensor, indices: Tensor) -> None:
    _check_packed_values(op, values, indices, "indices")
    if tuple(values.shape) != (indices.shape[0], indices.shape[1] * 4):
        raise ValueError(
            f"wanda::{op}: values must be [{indices.shape[0]}, {indices.shape[1] * 4}], got {list(values.shape)}"
        )


def check_packed_linear(op: str, x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None) -> None:
    rows, cols = codes.shape[0], codes.shape[1] * 8
    if x.dtype != values.dtype:
        raise TypeError(f"wanda::{op}: x must be {values.dtype}, as values are, got {x.dtype}")
    _same_device(op, "x", x, "values", values)
    if x.dim() == 0 or x.shape[-1] != cols:
        raise ValueError(f"wanda::{op}: x must be [.., {cols}], got {list(x.shape)}")
    if bias is not None:
        if bias.dtype != values.dtype:
            raise TypeError(f"wanda::{op}: bias must be {values.dtype}, as values are, got {bias.dtype}")
        _same_device(op, "bias", bias, "values", values)
        if tuple(bias.shape) != (rows,):
            raise ValueError(f"wanda::{op}: bias must be [{rows}], got {list(bias.shape)}")
