"""Packs weights for packed/format.py on CUDA: one launch a weight, and no temporary larger than a row's count."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .partials import on_device_of

PAIRS = 256  # bytes of codes a program, two groups of four columns each
BLOCK = 1024  # columns of a row at a time


@triton.jit
def _pick(w0, w1, w2, w3):
    """Two columns of four, ascending: those that are kept, else the first; their values; how many are kept."""
    k0, k1, k2, k3 = (w0 != 0).to(tl.int32), (w1 != 0).to(tl.int32), (w2 != 0).to(tl.int32), (w3 != 0).to(tl.int32)
    kept = k0 + k1 + k2 + k3
    last = tl.where(k3 > 0, 3, tl.where(k2 > 0, 2, 1))
    first = tl.where(kept < 2, 0, tl.where(k0 > 0, 0, tl.where(k1 > 0, 1, 2)))
    low = tl.where(first == 0, w0, tl.where(first == 1, w1, w2))
    high = tl.where(last == 3, w3, tl.where(last == 2, w2, w1))
    return first | last << 2, low, high, kept


@triton.jit
def pack_sparse24_kernel(weight, values, indices, overfull, pairs, PAIRS: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < pairs
    at = weight + pair * 8
    w0, w1 = tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0)
    w2, w3 = tl.load(at + 2, mask=inside, other=0), tl.load(at + 3, mask=inside, other=0)
    w4, w5 = tl.load(at + 4, mask=inside, other=0), tl.load(at + 5, mask=inside, other=0)
    w6, w7 = tl.load(at + 6, mask=inside, other=0), tl.load(at + 7, mask=inside, other=0)
    code, a, b, kept = _pick(w0, w1, w2, w3)
    other_code, c, d, other_kept = _pick(w4, w5, w6, w7)
    tl.store(indices + pair, (code | other_code << 4).to(tl.uint8), mask=inside)
    to = values + pair * 4
    tl.store(to, a, mask=inside)
    tl.store(to + 1, b, mask=inside)
    tl.store(to + 2, c, mask=inside)
    tl.store(to + 3, d, mask=inside)
    tl.atomic_max(overfull, tl.max(tl.maximum(kept, other_kept), axis=0))


@triton.jit
def pack_bitmap_kernel(weight, values, bitmap, starts, cols, BLOCK: tl.constexpr):
    """A row a program."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + row).to(tl.int64)
    for first in range(0, cols, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < cols
        element = tl.load(weight + row * cols + column, mask=inside, other=0)
        kept = (element != 0).to(tl.int32)
        tl.store(values + begin + tl.cumsum(kept, axis=0) - kept, element, mask=kept > 0)
        begin += tl.sum(kept, axis=0)
        bits = tl.reshape(kept, [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]
        byte = first // 8 + tl.arange(0, BLOCK // 8)
        tl.store(bitmap + row * (cols // 8) + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte < cols // 8)


def pack_sparse24(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """(values, indices, how many columns of a group are kept at most) of a contiguous integer [C_out, C_in]."""
    rows, cols = weight.shape
    values = weight.new_empty(rows, cols // 2)
    indices = torch.empty(rows, cols // 8, dtype=torch.uint8, device=weight.device)
    overfull = torch.zeros(1, dtype=torch.int32, device=weight.device)
    pairs = rows * cols // 8
    with on_device_of(weight):
        pack_sparse24_kernel[(triton.cdiv(pairs, PAIRS),)](weight, values, indices, overfull, pairs, PAIRS=PAIRS)
    return values, indices, int(overfull)


def pack_bitmap(weight: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """The bitmap of a contiguous integer [C_out, C_in]; its row r's values go to ``values[starts[r] :]``."""
    rows, cols = weight.shape
    bitmap = torch.empty(rows, cols // 8, dtype=torch.uint8, device=weight.device)
    with on_device_of(weight):
        pack_bitmap_kernel[(rows,)](weight, values, bitmap, starts, cols, BLOCK=BLOCK)
    return bitmap
