"""The product inside a gated MLP, which adds up its channel statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import fake
from .._checks import check_act_mul_sqnorm


def silu_mul_sqnorm(gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``; the squares of the rounded products are added to ``sqnorm``, in place.

    Equivalent to ``y = silu(gate) * up`` and ``add_sqnorm_(sqnorm, y, token_mask)``, in one pass. On the CPU the
    activation comes from ATen, and ``y`` and ``sqnorm`` have the bits of those two calls; on CUDA they agree to
    rounding.

    Args:
        gate, up: [sequences, tokens, C_in], or flattened as in :func:`add_sqnorm_`, of one dtype: float32, bfloat16 or
            float16. Halves of one tensor (``chunk(2, dim=-1)``) are not copied.
        sqnorm: [C_in] or [sequences, C_in], float32, contiguous.
        token_mask: [sequences, tokens] (or flattened), bool, or None. False = the token does not count for
            ``sqnorm``; its product is computed all the same.

    Returns:
        [.., C_in] of the shape and dtype of ``gate``, contiguous.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came.

    Source: Wanda (arXiv 2306.11695), eq. 1, on the input of down_proj.
    """
    return torch.ops.wanda.silu_mul_sqnorm(gate, up, sqnorm, token_mask)


def gelu_tanh_mul_sqnorm(gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """``gelu(gate, approximate="tanh") * up``, otherwise as :func:`silu_mul_sqnorm`."""
    return torch.ops.wanda.gelu_tanh_mul_sqnorm(gate, up, sqnorm, token_mask)


for _op in ("silu_mul_sqnorm", "gelu_tanh_mul_sqnorm"):
    fake(_op, check_act_mul_sqnorm, lambda gate, *_: gate.new_empty(gate.shape))
