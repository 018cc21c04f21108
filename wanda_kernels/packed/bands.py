"""A dense product with a packed weight that is never unpacked as a whole: a band of output rows at a time.

A band's buffer is freed before the next one is made, so that the allocator gives the same memory out again: it stays in
the cache, and no page of new memory is paid for. The products go straight into the columns of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import unpack_bitmap, unpack_sparse24

# Zen 3 (512 KB of L2), one thread, 2:4, 11008 x 4096, time as a multiple of the dense product's, by size of a band:
#                         128 KiB   512 KiB   1 MiB   2 MiB   4 MiB   the whole weight
# float32,   17 tokens       2.87      1.41    1.49    1.24    1.67               4.64
# float32,  256 tokens       3.36      1.26    1.22    1.10    1.05               1.62
# bfloat16,  17 tokens       1.53      1.33    1.39    1.37    1.34               1.78
# bfloat16, 256 tokens       1.06      1.05    1.02    1.03    1.02               1.06
# Small bands lose in the product, whose fixed costs come once a band; the whole weight loses in page faults.
BAND_BYTES = 2 << 20


def rows_of_band(cols: int, element_size: int) -> int:
    """Rows that fit ``BAND_BYTES``, at least one."""
    return max(1, BAND_BYTES // (cols * element_size))


def banded_linear(x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, band: int | None = None) -> Tensor:
    """``linear(x, unpacked, bias)``, without gradients.

    Args:
        x: [.., C_in], of the dtype of the packed values.
        packed: (values, bitmap, starts) or (values, indices), as the operators take them.
        bias: [C_out] or None.
        band: output rows at a time [default: what fits 2 MiB].

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
