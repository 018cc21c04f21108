"""Column sums of squares, for inputs that no fused kernel produces, where the extension has no CUDA kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from .partials import Partials, Tokens, counted_tokens, on_device_of

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


def add_sqnorm_(sqnorm: Tensor, x: Tensor, token_mask: Tensor | None = None) -> None:
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
