"""RMSNorm as transformers computes it, and the column sums of squares of what it returns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from .._checks import check_rms_norm_sqnorm
from .partials import Partials, Tokens, counted_tokens, on_device_of

CHUNK = 16  # tokens a program: 2,048 tokens make 128 programs, about as many as a card has processors
AHEAD = 2  # steps whose rows are on their way to shared memory while those of one are worked on
AHEAD_BYTES = 65536  # that they may take: every card since compute capability 8 has them
WIDEST = 16384  # columns of a row that a program holds in registers
WIDE_BLOCK = 1024  # columns at a time beyond


@triton.jit
def scale_and_weigh(value, scale, weight, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """x * scale * weight, rounded where transformers rounds: LLaMA before the weight and after, Gemma at the end."""
    if UNIT_OFFSET:
        return (value * scale * (1.0 + weight)).to(dtype)
    return ((value * scale).to(dtype).to(tl.float32) * weight).to(dtype)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def rms_norm_sqnorm_kernel(
    x, weight, y, partial, token_mask, tokens, chunks, cols, sequence_stride, token_stride, eps,
    UNIT_OFFSET: tl.constexpr, MASKED: tl.constexpr, OVERLAP: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of tokens, whole rows of at most BLOCK columns in registers."""
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0)  # of the partial sums
    sequence = (row // chunks).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    valid = columns < cols
    x += sequence * sequence_stride
    y += sequence * tokens * cols
    dtype: tl.constexpr = y.dtype.element_ty
    weights = tl.load(weight + columns, mask=valid, other=0.0)
    sums = tl.zeros([BLOCK], tl.float32)
    for step in tl.range(0, CHUNK, ROWS, num_stages=STAGES):
        token = row % chunks * CHUNK + step + tl.arange(0, ROWS)
        inside = (token < tokens)[:, None] & valid[None, :]
        at = token.to(tl.int64)[:, None]
        value = tl.load(x + at * token_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / cols + eps)
        scale = tl.where(token < tokens, scale, 0.0)  # without a token 1 / 0, where eps is 0
        out = scale_and_weigh(value, scale[:, None], weights.to(tl.float32)[None, :], dtype, UNIT_OFFSET)
        tl.store(y + at * cols + columns[None, :], out, mask=inside)
        rounded = out.to(tl.float32)
        if MASKED:
            rounded = tl.where(counted_tokens(token_mask, sequence, token, tokens)[:, None], rounded, 0.0)
        sums += tl.sum(rounded * rounded, axis=0)
    tl.store(partial + row.to(tl.int64) * cols + columns, sums, mask=valid)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def rms_norm_sqnorm_wide_kernel(
    x, weight, y, partial, token_mask, tokens, chunks, cols, sequence_stride, token_stride, eps,
    UNIT_OFFSET: tl.constexpr, MASKED: tl.constexpr, OVERLAP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of tokens in two passes over its columns; the second reads x from cache."""
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0)  # of the partial sums
    sequence = (row // chunks).to(tl.int64)
    x += sequence * sequence_stride
    y += sequence * tokens * cols
    dtype: tl.constexpr = y.dtype.element_ty
    token = row % chunks * CHUNK + tl.arange(0, CHUNK)
    inside = (token < tokens)[:, None]
    at = token.to(tl.int64)[:, None]
    squares = tl.zeros([CHUNK], tl.float32)
    for begin in range(0, cols, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        mask = inside & (columns < cols)[None, :]
        value = tl.load(x + at * token_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(value * value, axis=1)
    scale = tl.rsqrt(squares / cols + eps)[:, None]
    counts = inside
    if MASKED:
        counts = counted_tokens(token_mask, sequence, token, tokens)[:, None]
    for begin in range(0, cols, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        valid = columns < cols
        mask = inside & valid[None, :]
        value = tl.load(x + at * token_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        weights = tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32)
        out = scale_and_weigh(value, scale, weights[None, :], dtype, UNIT_OFFSET)
        tl.store(y + at * cols + columns[None, :], out, mask=mask)
        rounded = out.to(tl.float32)
        sums = tl.sum(tl.where(counts, rounded * rounded, 0.0), axis=0)
        tl.store(partial + row.to(tl.int64) * cols + columns, sums, mask=valid)


def block_shape(block: int, bytes_of_value: int) -> dict[str, int]:
    """Tokens at a time, stages and warps for rows of at most ``block`` columns: 16 bytes of a bf16 row a lane, and
    8,192 elements at a time, so that 64 registers a thread let a processor hold two programs."""
    rows = max(min(4, 8192 // block), 1)
    is_ahead = AHEAD * rows * block * bytes_of_value <= AHEAD_BYTES
    warps = min(max(block // 256, 1), 16)
    return {"BLOCK": block, "ROWS": rows, "STAGES": 1 + AHEAD * is_ahead, "num_warps": warps}


def rms_norm_sqnorm(
    x: Tensor, weight: Tensor, eps: float, sqnorm: Tensor, token_mask: Tensor | None = None, unit_offset: bool = False
) -> Tensor:
    check_rms_norm_sqnorm("rms_norm_sqnorm", x, weight, eps, sqnorm, token_mask)
    sums = Partials("rms_norm_sqnorm", sqnorm, x, token_mask, CHUNK)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if sums.is_empty:
        return y
    inputs = Tokens(x, sums.sequences, sums.tokens)
    arguments = (
        inputs.x, weight.contiguous(), y, sums.partial, sums.token_mask, sums.tokens, sums.chunks, sums.cols,
        *inputs.strides, eps,
    )  # fmt: skip
    options = {"UNIT_OFFSET": unit_offset, "MASKED": sums.is_masked, "OVERLAP": sums.overlaps, "CHUNK": CHUNK}
    grid = (sums.sequences * sums.chunks,)
    with on_device_of(x):
        if sums.cols <= WIDEST:
            block = triton.next_power_of_2(sums.cols)
            rms_norm_sqnorm_kernel[grid](*arguments, **options, **block_shape(block, x.element_size()))
        else:
            rms_norm_sqnorm_wide_kernel[grid](*arguments, **options, BLOCK=WIDE_BLOCK, num_warps=16)
        sums.add_totals()
    return y
