"""The norms of all sequences, averaged in sample order: the float32 steps of ``reference.norm_of_sequences``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .partials import on_device_of

BLOCK = 32  # columns a program, one a lane: the mean of a column is one chain, so there is nothing else to share out
AHEAD = 16  # sequences that are loaded before the first of them is used


@triton.jit(do_not_specialize=["sequences"])
def mean_kernel(sqnorm, mean, sequences, cols, AHEAD: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = columns < cols
    average = tl.zeros([BLOCK], tl.float32)
    seen = tl.zeros([BLOCK], tl.float32)
    for first in range(0, sequences, AHEAD):
        for i in tl.static_range(AHEAD):
            inside = valid & (first + i < sequences)
            at = tl.full([BLOCK], first + i, tl.int64) * cols + columns
            norm = tl.sqrt_rn(tl.load(sqnorm + at, mask=inside, other=0.0))
            count = seen + 1.0
            # Every step rounded for itself: the launch turns off fused multiply-add.
            next_average = average * tl.div_rn(seen, count) + tl.div_rn(norm * norm, count)
            average = tl.where(inside, next_average, average)
            seen = count
    tl.store(mean + columns, average, mask=valid)


def norm_of_sequences(sqnorm: Tensor) -> Tensor:
    sequences, cols = sqnorm.shape
    mean = torch.empty(cols, dtype=torch.float32, device=sqnorm.device)
    with on_device_of(sqnorm):
        mean_kernel[(triton.cdiv(cols, BLOCK),)](
            sqnorm.contiguous(), mean, sequences, cols, AHEAD=AHEAD, BLOCK=BLOCK, num_warps=1, enable_fp_fusion=False
        )
    return mean.sqrt()
