"""RMSNorm that adds up its output's channel statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import fake
from .._checks import check_rms_norm_sqnorm


def rms_norm_sqnorm(
    x: Tensor, weight: Tensor, eps: float, sqnorm: Tensor, token_mask: Tensor | None = None, unit_offset: bool = False
) -> Tensor:
    """RMSNorm as transformers computes it; the squares of its rounded output are added to ``sqnorm``, in place.

    Equivalent to ``y = rms_norm(x, weight, eps)`` and ``add_sqnorm_(sqnorm, y, token_mask)``, in one pass. On the CPU
    the variance comes from ATen, and ``y`` and ``sqnorm`` have the bits of those two calls; on CUDA they agree to
    rounding.

    Args:
        x: [sequences, tokens, C_in], or flattened as in :func:`add_sqnorm_`; float32, bfloat16 or float16.
        weight: [C_in], of the dtype of ``x``.
        eps: added to the mean of squares.
        sqnorm: [C_in] or [sequences, C_in], float32, contiguous.
        token_mask: [sequences, tokens] (or flattened), bool, or None. False = the token does not count for
            ``sqnorm``; its output is computed all the same.
        unit_offset: Gemma's form: ``(x * scale * (1 + weight))`` in float32, rounded once. LLaMA's rounds ``x * scale``
            first.

    Returns:
        [.., C_in] of the shape and dtype of ``x``, contiguous.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came.

    Source: Wanda (arXiv 2306.11695), eq. 1, on the inputs of q/k/v and gate/up.
    """
    return torch.ops.wanda.rms_norm_sqnorm(x, weight, eps, sqnorm, token_mask, unit_offset)


fake("rms_norm_sqnorm", check_rms_norm_sqnorm, lambda x, *_: x.new_empty(x.shape))
