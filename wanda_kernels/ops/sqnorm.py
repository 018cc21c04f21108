"""Channel statistics: the sum of squares of each input channel."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import fake
from .._checks import check_sqnorm


def add_sqnorm_(sqnorm: Tensor, x: Tensor, token_mask: Tensor | None = None, ends: Tensor | None = None) -> None:
    """Add the sum over tokens of ``x ** 2`` to ``sqnorm``, in place. ``norm = sqnorm.sqrt()``.

    Equivalent, to rounding, to ``sqnorm += x.float().square().sum(dim=1)``. The order of additions is fixed:
    the same bits for any number of threads and any split of whole sequences into calls.

    With ``ends``, x is cut into segments of any lengths, such as the tokens of each expert: each gets the bits that
    it would get alone, as one sequence.

    Args:
        sqnorm: [C_in], or [sequences, C_in] for one sum per sequence; float32, contiguous. With ``ends``:
            [segments, C_in].
        x: [sequences, tokens, C_in], or flattened to [sequences * tokens, C_in] (the number of sequences then
            comes from ``sqnorm``); float32, bfloat16 or float16. Squared as it is, after its rounding. With ``ends``:
            [rows, C_in].
        token_mask: [sequences, tokens] (or flattened), bool, or None. False = the token does not count,
            whatever it holds. None with ``ends``.
        ends: [segments], int32, contiguous, on the device of ``x``, or None. Ascending from >= 0 to <= rows: segment s
            holds the rows ends[s - 1] to ends[s], the first one those from 0 on. Rows behind the last end do not count,
            an empty segment adds nothing. On CUDA what is in it is not checked, for that would wait for the device:
            no kernel reads outside of ``x``, but the sums are wrong.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came.

    Source: Wanda (arXiv 2306.11695), eq. 1: the square of ``||X_j||_2``.
    """
    torch.ops.wanda.add_sqnorm_(sqnorm, x, token_mask, ends)


fake("add_sqnorm_", check_sqnorm)
