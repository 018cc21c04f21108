"""Column sums of squares, for inputs that no fused kernel produces, where the extension has no CUDA kernels.

Segments, whose ends only the device knows, are cut into chunks from where each begins. Segment s has its chunks at row
begin // CHUNK + s of the partial sums and behind it, which leaves room enough for any lengths: rows // CHUNK + segments
in all. So the launch needs no count from the device; rows that no chunk is at are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from .._checks import check_sqnorm
from .partials import TOTAL_BLOCK, TOTAL_ROWS, Partials, Tokens, counted_tokens, on_device_of

CHUNK = 128  # tokens a program
ROWS = 8  # tokens at a time
BLOCK = 512  # columns a program: a warp and a row at a time, 16 bytes a lane


@triton.jit(do_not_specialize=["tokens", "chunks"])
def sqnorm_kernel(
    x, partial, token_mask, tokens, chunks, cols, sequence_stride, token_stride,
    MASKED: tl.constexpr, OVERLAP: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    blocks = tl.cdiv(cols, BLOCK)
    row = tl.program_id(0) // blocks  # of the partial sums: a chunk of a sequence
    sequence = row // chunks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = columns < cols
    base = x + sequence.to(tl.int64) * sequence_stride
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(0, CHUNK, ROWS):
        token = row % chunks * CHUNK + step + tl.arange(0, ROWS)
        counts = token < tokens
        if MASKED:
            counts = counted_tokens(token_mask, sequence, token, tokens)
        at = token.to(tl.int64)[:, None] * token_stride + columns[None, :]
        value = tl.load(base + at, mask=counts[:, None] & valid[None, :], other=0.0).to(tl.float32)
        sums += value * value
    tl.store(partial + row.to(tl.int64) * cols + columns, tl.sum(sums, axis=0), mask=valid)


@triton.jit
def segment_sqnorm_kernel(
    x, partial, segment_of, ends, cols, token_stride,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(cols, BLOCK)
    row = tl.program_id(0) // blocks  # of the partial sums: a chunk of a segment
    segment = tl.load(segment_of + row)
    begin = tl.load(ends + segment)  # of the segment: behind the end of the one before
    end = tl.load(ends + segment + 1)
    first = begin + (row - begin // CHUNK - segment) * CHUNK
    if first >= end:
        return
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = columns < cols
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(0, CHUNK, ROWS):
        token = first + step + tl.arange(0, ROWS)
        at = token.to(tl.int64)[:, None] * token_stride + columns[None, :]
        value = tl.load(x + at, mask=(token < end)[:, None] & valid[None, :], other=0.0).to(tl.float32)
        sums += value * value
    tl.store(partial + row.to(tl.int64) * cols + columns, tl.sum(sums, axis=0), mask=valid)


@triton.jit
def segment_total_kernel(
    partial, sqnorm, ends, cols, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = columns < cols
    segment = tl.program_id(1)
    begin = tl.load(ends + segment)
    chunks = tl.cdiv(tl.load(ends + segment + 1) - begin, CHUNK)
    if chunks == 0:
        return
    first = begin // CHUNK + segment
    # Read before the loop, whose sums the warps wait for: several threads hold a column, and one writes it.
    target = sqnorm + segment.to(tl.int64) * cols + columns
    value = tl.load(target, mask=valid, other=0.0)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, chunks, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = (first + rows).to(tl.int64)[:, None] * cols + columns[None, :]
        part = tl.load(partial + at, mask=(rows < chunks)[:, None] & valid[None, :], other=0.0)
        total += tl.sum(part.to(tl.float64), axis=0)
    tl.store(target, value + total.to(tl.float32), mask=valid)


def _add_segments(sqnorm: Tensor, x: Tensor, ends: Tensor) -> None:
    (rows, cols), segments = x.shape, ends.shape[0]
    if 0 in (segments, rows, cols):
        return
    x = Tokens(x, 1, rows).x
    # Clamped and made to ascend, as nothing waits for the device to look at them; with the first one's begin.
    bounds = torch.cat([ends.new_zeros(1), ends.clamp(0, rows).cummax(0).values])
    numbers = torch.arange(rows // CHUNK + segments, dtype=torch.int32, device=x.device)
    first_chunks = bounds[:-1] // CHUNK + numbers[:segments]
    segment_of = torch.searchsorted(first_chunks, numbers, right=True, out_int32=True) - 1
    partial = torch.empty(numbers.shape[0], cols, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        segment_sqnorm_kernel[(triton.cdiv(cols, BLOCK) * numbers.shape[0],)](
            x, partial, segment_of, bounds, cols, x.stride(0), CHUNK=CHUNK, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        segment_total_kernel[(triton.cdiv(cols, TOTAL_BLOCK), segments)](
            partial, sqnorm, bounds, cols, CHUNK=CHUNK, ROWS=TOTAL_ROWS, BLOCK=TOTAL_BLOCK, num_warps=4,
        )  # fmt: skip


def add_sqnorm_(sqnorm: Tensor, x: Tensor, token_mask: Tensor | None = None, ends: Tensor | None = None) -> None:
    if ends is not None:
        check_sqnorm("add_sqnorm_", sqnorm, x, token_mask, ends)
        _add_segments(sqnorm, x, ends)
        return
    sums = Partials("add_sqnorm_", sqnorm, x, token_mask, CHUNK)
    if sums.is_empty:
        return
    inputs = Tokens(x, sums.sequences, sums.tokens)
    with on_device_of(x):
        sqnorm_kernel[(triton.cdiv(sums.cols, BLOCK) * sums.sequences * sums.chunks,)](
            inputs.x, sums.partial, sums.token_mask, sums.tokens, sums.chunks, sums.cols, *inputs.strides,
            MASKED=sums.is_masked, OVERLAP=sums.overlaps, CHUNK=CHUNK, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        sums.add_totals()
