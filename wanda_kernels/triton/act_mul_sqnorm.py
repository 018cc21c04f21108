"""activation(gate) * up, the input of a gated MLP's last product, and its column sums of squares on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from .._checks import check_act_mul_sqnorm
from .partials import Partials, Tokens, counted_tokens, on_device_of

CHUNK = 64  # tokens a program: 2,048 by 11,008 columns are 704, which a card holds at once
ROWS = 4  # tokens at a time: 64 registers a thread, eight programs a processor
BLOCK = 512  # columns a program


@triton.jit
def exp(x):
    """e^x to 2 units in the last place, 2^n * 2^f with |f| <= 1/2; tl.exp is off by |x| units."""
    x = tl.minimum(tl.maximum(x, -200.0), 200.0)  # 0 and inf in float32, without inf - inf on the way
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = tl.fma(n, -0.693359375, x)  # ln 2 in two parts: the first times n is exact
    rest = tl.fma(n, 2.12194440e-4, rest)
    half = tl.floor(n * 0.5)  # 2^n in two factors: n reaches past both ends of float32's exponents
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(half) * tl.exp2(n - half)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """SiLU, x / (1 + e^-x), or the tanh form of GELU: 1 + tanh(z) = 2 / (1 + e^-2z).

    ``FAST``: for 16-bit results, in half the instructions: e^-x is off by |x| units of float32, less than a hundredth
    of half a unit of the result.
    """
    slope = x
    if ACTIVATION == "gelu_tanh":
        slope = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    if FAST:
        return x / (1.0 + tl.exp2(slope * -1.4426950408889634))
    return x / (1.0 + exp(-slope))


@triton.jit(do_not_specialize=["tokens", "chunks"])
def act_mul_sqnorm_kernel(
    gate, up, y, partial, token_mask, tokens, chunks, cols,
    gate_sequence_stride, gate_token_stride, up_sequence_stride, up_token_stride,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, OVERLAP: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    blocks = tl.cdiv(cols, BLOCK)
    row = tl.program_id(0) // blocks  # of the partial sums: a chunk of a sequence
    sequence = (row // chunks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = columns < cols
    gate += sequence * gate_sequence_stride
    up += sequence * up_sequence_stride
    y += sequence * tokens * cols
    dtype: tl.constexpr = y.dtype.element_ty
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(0, CHUNK, ROWS):
        token = row % chunks * CHUNK + step + tl.arange(0, ROWS)
        inside = (token < tokens)[:, None] & valid[None, :]
        at = token.to(tl.int64)[:, None]
        a = tl.load(gate + at * gate_token_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(up + at * up_token_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        activated = (
            activate(a, ACTIVATION, dtype != tl.float32).to(dtype).to(tl.float32)
        )  # rounded, as between two modules
        product = (activated * b).to(dtype)
        tl.store(y + at * cols + columns[None, :], product, mask=inside)
        value = product.to(tl.float32)  # 0 where there is no token
        if MASKED:
            value = tl.where(counted_tokens(token_mask, sequence, token, tokens)[:, None], value, 0.0)
        sums += value * value
    tl.store(partial + row.to(tl.int64) * cols + columns, tl.sum(sums, axis=0), mask=valid)


def _launch(name: str, activation: str, gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None) -> Tensor:
    check_act_mul_sqnorm(name, gate, up, sqnorm, token_mask)
    sums = Partials(name, sqnorm, gate, token_mask, CHUNK)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if sums.is_empty:
        return y
    gates, ups = Tokens(gate, sums.sequences, sums.tokens), Tokens(up, sums.sequences, sums.tokens)
    with on_device_of(gate):
        act_mul_sqnorm_kernel[(triton.cdiv(sums.cols, BLOCK) * sums.sequences * sums.chunks,)](
            gates.x, ups.x, y, sums.partial, sums.token_mask, sums.tokens, sums.chunks, sums.cols,
            *gates.strides, *ups.strides,
            ACTIVATION=activation, MASKED=sums.is_masked, OVERLAP=sums.overlaps, CHUNK=CHUNK, ROWS=ROWS, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
        sums.add_totals()
    return y


def silu_mul_sqnorm(gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None = None) -> Tensor:
    return _launch("silu_mul_sqnorm", "silu", gate, up, sqnorm, token_mask)


def gelu_tanh_mul_sqnorm(gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None = None) -> Tensor:
    return _launch("gelu_tanh_mul_sqnorm", "gelu_tanh", gate, up, sqnorm, token_mask)
