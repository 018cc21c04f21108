"""RMSNorm and the column sums of squares of its output in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_rms_norm_sqnorm
from .sqnorm import add_sqnorm_


def rms_norm_sqnorm(
    x: Tensor, weight: Tensor, eps: float, sqnorm: Tensor, token_mask: Tensor | None = None, unit_offset: bool = False
) -> Tensor:
    check_rms_norm_sqnorm("rms_norm_sqnorm", x, weight, sqnorm, token_mask)
    values = x.float()
    scaled = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    y = (scaled * (1.0 + weight.float())).to(x.dtype) if unit_offset else weight * scaled.to(x.dtype)
    add_sqnorm_(sqnorm, y, token_mask)
    return y
