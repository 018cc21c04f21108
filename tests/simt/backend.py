"""The operators on the CUDA kernels under SIMT, with the plans of csrc/cuda/plan.h: a backend for the tests that every
backend has to pass. Each call takes the next of the thread orders.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from wanda_kernels.packed import pack_bitmap

from . import operators, quantized
from .machine import ORDERS, Machine, load

_orders = itertools.cycle(ORDERS)


@functools.cache
def _machine() -> Machine:
    return Machine(load())


def _next_machine() -> Machine:
    machine = _machine()
    machine.order = next(_orders)
    machine.seed += 1
    return machine


def _plain(weight: Tensor) -> tuple[Tensor, int]:
    """(the rows, the elements between them): a copy where rows are not evenly strided, of a stack as a whole"""
    stack = weight if weight.dim() == 3 else weight[None]
    matrices, rows, cols = stack.shape
    stride = stack.stride(1) if rows > 1 else stack.stride(0) if matrices > 1 else cols
    is_even = (cols <= 1 or stack.stride(2) == 1) and (matrices <= 1 or stack.stride(0) == rows * stride)
    return (weight, stride - cols) if is_even and stride >= cols else (weight.contiguous(), 0)


def _select_rows(weight: Tensor, norm: Tensor, sparsity: float, output: str) -> tuple[Tensor, Tensor]:
    cols, (rows, gap) = weight.shape[-1], _plain(weight)
    if rows.numel() == 0:
        return rows, torch.empty(rows.shape if output == "mask" else (*rows.shape[:-1], 2))
    return operators.rows(_next_machine(), rows, norm, int(cols * sparsity), output=output, gap=gap)


def prune_rows_(weight: Tensor, norm: Tensor, sparsity: float, score_sums: Tensor | None = None) -> None:
    pruned, sums = _select_rows(weight, norm, sparsity, "prune" if score_sums is None else "sums")
    weight.copy_(pruned)
    if score_sums is not None:
        score_sums.copy_(sums)


def row_mask(weight: Tensor, norm: Tensor, sparsity: float) -> Tensor:
    return _select_rows(weight, norm, sparsity, "mask")[1].bool()


def _select_nm(weight: Tensor, norm: Tensor, n: int, m: int, output: str) -> tuple[Tensor, Tensor]:
    rows, gap = _plain(weight)
    return operators.nm(_next_machine(), rows, norm, n, m, output=output, gap=gap)


def prune_nm_(weight: Tensor, norm: Tensor, n: int, m: int, score_sums: Tensor | None = None) -> None:
    pruned, sums = _select_nm(weight, norm, n, m, "prune" if score_sums is None else "sums")
    weight.copy_(pruned)
    if score_sums is not None:
        score_sums.copy_(sums)


def nm_mask(weight: Tensor, norm: Tensor, n: int, m: int) -> Tensor:
    return _select_nm(weight, norm, n, m, "mask")[1].bool()


def _refine(mask: Tensor, weight: Tensor, gram: Tensor, damping: float, sums: Tensor | None, **limits: int) -> Tensor:
    if len(weight) == 0:
        return torch.zeros(0, dtype=torch.int32)
    pruned, swaps, errors = operators.refine(
        _next_machine(), mask, weight.contiguous(), gram.contiguous(), damping, has_sums=sums is not None, **limits
    )
    mask.copy_(pruned)
    if sums is not None:
        sums.copy_(errors)
    return swaps


def refine_rows_(
    mask: Tensor, weight: Tensor, gram: Tensor, damping: float = 0.3, most_swaps: int | None = None,
    sums: Tensor | None = None,
) -> Tensor:  # fmt: skip
    most = max(1, weight.shape[1] // 16) if most_swaps is None else most_swaps
    return _refine(mask, weight, gram, damping, sums, most_swaps=most)


def refine_nm_(
    mask: Tensor, weight: Tensor, gram: Tensor, n: int, m: int, damping: float = 0.3, sweeps: int = 4,
    sums: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _refine(mask, weight, gram, damping, sums, m=m, sweeps=sweeps)


def pack_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    values, metadata, overfull = operators.pack_24(_next_machine(), weight, None)
    assert overfull == 0
    return values, metadata


def prune_pack_24(weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    values, metadata, _ = operators.pack_24(_next_machine(), weight, norm)
    return values, metadata


def unpack_24(values: Tensor, metadata: Tensor) -> Tensor:
    return operators.unpack_24(_next_machine(), values, metadata)


def add_sqnorm_(sqnorm: Tensor, x: Tensor, token_mask: Tensor | None = None, ends: Tensor | None = None) -> None:
    if ends is not None:
        if x.numel() and ends.numel():
            sqnorm.copy_(operators.add_sqnorm(_next_machine(), sqnorm, x.contiguous(), None, ends))
        return
    if x.dim() == 2:
        x = x.reshape(1 if sqnorm.dim() == 1 else sqnorm.shape[0], -1, x.shape[1])
    if x.numel() == 0:
        return
    sqnorm.copy_(operators.add_sqnorm(_next_machine(), sqnorm, x.contiguous(), token_mask))


def unpack_bitmap(values: Tensor, bitmap: Tensor, starts: Tensor) -> Tensor:
    return operators.unpack(_next_machine(), (values, bitmap, starts))


def unpack_sparse24(values: Tensor, indices: Tensor) -> Tensor:
    return operators.unpack(_next_machine(), (values, indices))


def _linear(x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, most: int) -> Tensor:
    """Launches of at most `most` tokens; more than two of them go through the unpacked weight."""
    if x.shape[0] > 2 * most:
        return torch.nn.functional.linear(x, operators.unpack(_next_machine(), packed), bias)
    return torch.cat([operators.packed_linear(_next_machine(), part, packed, bias) for part in x.split(most)])


def bitmap_linear(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    return _linear(x, (values, bitmap, starts), bias, 8)


def sparse24_linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype == torch.float32:
        return torch.nn.functional.linear(x, operators.unpack(_next_machine(), (values, indices)), bias)
    return _linear(x, (values, indices), bias, 32)


def _experts(x: Tensor, packed: tuple[Tensor, ...], ends: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, packed[1].shape[0] // len(ends))
    if len(packed) == 3 or x.dtype != torch.float32:
        return operators.packed_experts(_next_machine(), x, packed, ends)
    dense = operators.unpack(_next_machine(), packed)
    packed = pack_bitmap(dense)  # float32 has no sparse product: here the unpacked weight goes another way
    return operators.packed_experts(_next_machine(), x, packed, ends)


def bitmap_experts(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    return _experts(x, (values, bitmap, starts), ends)


def sparse24_experts(x: Tensor, values: Tensor, indices: Tensor, ends: Tensor) -> Tensor:
    return _experts(x, (values, indices), ends)


def unpack_quantized(
    values: Tensor, scales: Tensor, codes: Tensor | None, starts: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    return quantized.unpack(_next_machine(), (values, scales, codes, starts), bits, dtype)


def quantized_linear(
    x: Tensor, values: Tensor, scales: Tensor, codes: Tensor | None = None, starts: Tensor | None = None,
    bias: Tensor | None = None, bits: int = 8,
) -> Tensor:  # fmt: skip
    return quantized.linear(_next_machine(), x, (values, scales, codes, starts), bits, bias)
