"""activation(gate) * up and its column sums of squares in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu, silu

from .._checks import check_act_mul_sqnorm
from .sqnorm import add_sqnorm_


def silu_mul_sqnorm(gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None = None) -> Tensor:
    check_act_mul_sqnorm("silu_mul_sqnorm", gate, up, sqnorm, token_mask)
    y = silu(gate) * up
    add_sqnorm_(sqnorm, y, token_mask)
    return y


def gelu_tanh_mul_sqnorm(gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None = None) -> Tensor:
    check_act_mul_sqnorm("gelu_tanh_mul_sqnorm", gate, up, sqnorm, token_mask)
    y = gelu(gate, approximate="tanh") * up
    add_sqnorm_(sqnorm, y, token_mask)
    return y
