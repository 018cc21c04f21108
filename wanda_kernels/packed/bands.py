"""A dense product with a packed weight that is never unpacked as a whole: a band of output rows at a time.

A band's buffer is freed before the next one is made, so that the allocator gives the same memory out again: it stays in
the cache, and no page of new memory is paid for. The products go straight into the columns of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import unpack_bitmap, unpack_sparse24

# 11008 x 4096, time as a multiple of the dense product's, by the size of a band. Small bands lose in the product, whose
# fixed costs come once a band and thread; large ones in page faults, since the allocator gives them back.
#                                          1 MiB   2 MiB   4 MiB   8 MiB   16 MiB   48 MiB
# Zen 4, bfloat16, 1 thread,   64 tokens    1.14    1.10    1.07    1.08     1.16
# Zen 4, bfloat16, 2 threads,  64 tokens    1.30    1.18    1.13    1.10     1.11
# Zen 4, bfloat16, 2 threads, 256 tokens                    1.07    1.07     1.08     1.55
# Zen 3, float32,  1 thread,  256 tokens    1.22    1.10    1.05
BAND_BYTES = 4 << 20  # of a thread
MOST_BYTES = 16 << 20  # of all: the allocator keeps no larger ones


def rows_of_band(cols: int, element_size: int) -> int:
    """Rows that fit ``BAND_BYTES`` for each thread, at least one."""
    size = min(BAND_BYTES * torch.get_num_threads(), MOST_BYTES)
    return max(1, size // (cols * element_size))


def banded_linear(x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, band: int | None = None) -> Tensor:
    """``linear(x, unpacked, bias)``, without gradients.

    Args:
        x: [.., C_in], of the dtype of the packed values.
        packed: (values, bitmap, starts) or (values, indices), as the operators take them.
        bias: [C_out] or None.
        band: output rows at a time [default: what fits 4 MiB a thread].

    Returns:
        [.., C_out]. To rounding: a BLAS may add in another order for another number of rows.
    """
    values, codes = packed[:2]
    rows, cols = codes.shape[0], codes.shape[1] * 8
    tokens = x.reshape(-1, cols)
    y = x.new_empty((tokens.shape[0], rows))
    band = band or rows_of_band(cols, values.element_size())
    with torch.no_grad():
        for first in range(0, rows, band):
            last = min(first + band, rows)
            if len(packed) == 3:
                weight = unpack_bitmap(values, codes[first:last], packed[2][first : last + 1])
            else:
                weight = unpack_sparse24(values[first:last], codes[first:last])
            if bias is None:
                torch.mm(tokens, weight.t(), out=y[:, first:last])
            else:
                torch.addmm(bias[first:last], tokens, weight.t(), out=y[:, first:last])
            del weight  # before the next one is made
    return y.view(*x.shape[:-1], rows)
