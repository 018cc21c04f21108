"""What the kernels share: how they see a tensor of tokens, and the sums of their chunks.

Every kernel cuts a sequence into chunks of a fixed number of tokens and leaves one row of float32 partial sums for
each; ``total_kernel`` adds a sequence's chunks in float64, in one order, and rounds once. No atomics, and no constant
depends on the device: the same bits on every GPU and for any split of whole sequences into calls. Where the device can
(compute capability 9), ``total_kernel`` is launched while the other one runs, and waits on the device for its end.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from .._checks import check_sqnorm

TOTAL_BLOCK = 16  # columns a program: whole sectors
TOTAL_ROWS = 128  # chunks at a time: as many as 2,048 tokens have, so that all are loaded at once


@triton.jit(do_not_specialize=["sequences", "chunks"])
def total_kernel(
    partial, sqnorm, sequences, chunks, cols,
    SHARED: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()  # for all that the other kernel has written
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = columns < cols
    first = tl.program_id(1)
    last = first + 1
    if SHARED:
        last = sequences
    target = sqnorm + first.to(tl.int64) * cols + columns
    value = tl.load(target, mask=valid, other=0.0)
    for sequence in range(first, last):
        total = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, chunks, ROWS):
            rows = begin + tl.arange(0, ROWS)
            at = (sequence * chunks + rows).to(tl.int64)[:, None] * cols + columns[None, :]
            part = tl.load(partial + at, mask=(rows < chunks)[:, None] & valid[None, :], other=0.0)
            total += tl.sum(part.to(tl.float64), axis=0)
        value += total.to(tl.float32)
    tl.store(target, value, mask=valid)


@triton.jit
def counted_tokens(token_mask, sequence, token, tokens):
    """Which of a sequence's tokens exist and count."""
    return tl.load(token_mask + sequence.to(tl.int64) * tokens + token, mask=token < tokens, other=0) != 0


class Tokens:
    """``x`` as [sequences, tokens, C_in] by strides, with unit inner stride; flattened tensors are not copied."""

    def __init__(self, x: Tensor, sequences: int, tokens: int) -> None:
        self.x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        self.token_stride = self.x.stride(-2)
        self.sequence_stride = self.x.stride(0) if x.dim() == 3 else tokens * self.token_stride

    @property
    def strides(self) -> tuple[int, int]:
        return self.sequence_stride, self.token_stride


class Partials:
    """The partial sums of one call: checks the arguments, allocates, and adds the totals to ``sqnorm``."""

    def __init__(self, op: str, sqnorm: Tensor, x: Tensor, token_mask: Tensor | None, chunk: int) -> None:
        self.sequences, self.tokens, self.cols = check_sqnorm(op, sqnorm, x, token_mask)
        self.is_empty = 0 in (self.sequences, self.tokens, self.cols)
        self.sqnorm = sqnorm
        self.chunks = triton.cdiv(self.tokens, chunk)
        self.partial = torch.empty(self.sequences * self.chunks, self.cols, dtype=torch.float32, device=sqnorm.device)
        self.is_masked = token_mask is not None
        self.overlaps = x.is_cuda and _can_overlap(x.device)
        # The kernels read bytes; a mask that is not there is never read.
        self.token_mask = self.partial if token_mask is None else token_mask.contiguous().view(torch.uint8)

    def add_totals(self) -> None:
        is_shared = self.sqnorm.dim() == 1
        grid = (triton.cdiv(self.cols, TOTAL_BLOCK), 1 if is_shared else self.sequences)
        total_kernel[grid](
            self.partial, self.sqnorm, self.sequences, self.chunks, self.cols,
            SHARED=is_shared, OVERLAP=self.overlaps, ROWS=TOTAL_ROWS, BLOCK=TOTAL_BLOCK, num_warps=4,
            **({"launch_pdl": True} if self.overlaps else {}),
        )  # fmt: skip


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
