"""Column sums of squares in plain PyTorch (Wanda, section 3, eq. 1: the square of ||X_j||_2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_sqnorm

# Tokens that are summed in float32 before they are added to the float64 total of their sequence.
CHUNK = 4096


def _sum_of_squares(tokens: Tensor) -> Tensor:
    """[tokens, C_in] -> [C_in], float32: one token after the other, in chunks that are added in float64."""
    total = torch.zeros(tokens.shape[1], dtype=torch.float64, device=tokens.device)
    for chunk in tokens.float().square().split(CHUNK):
        partial = torch.zeros(tokens.shape[1], dtype=torch.float32, device=tokens.device)
        for squares in chunk:
            partial += squares
        total += partial
    return total.float()


def add_sqnorm_(sqnorm: Tensor, x: Tensor, token_mask: Tensor | None = None) -> None:
    sequences, tokens, cols = check_sqnorm("add_sqnorm_", sqnorm, x, token_mask)
    x = x.reshape(sequences, tokens, cols)
    counted = None if token_mask is None else token_mask.reshape(sequences, tokens)
    for sequence in range(sequences):
        one = x[sequence] if counted is None else x[sequence][counted[sequence]]
        row = sqnorm[sequence] if sqnorm.dim() == 2 else sqnorm
        row += _sum_of_squares(one)
