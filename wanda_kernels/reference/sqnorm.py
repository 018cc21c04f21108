"""Column sums of squares in plain PyTorch (Wanda, section 3, eq. 1: the square of ||X_j||_2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_sqnorm

# Tokens that are summed in float32 before they are added to the float64 total of their sequence.
CHUNK = 4096


def add_sqnorm_(sqnorm: Tensor, x: Tensor, token_mask: Tensor | None = None) -> None:
    sequences, tokens, cols = check_sqnorm("add_sqnorm_", sqnorm, x, token_mask)
    squares = x.reshape(sequences, tokens, cols).float().square()
    if token_mask is not None:
        squares = squares.masked_fill(~token_mask.reshape(sequences, tokens, 1), 0)
    total = torch.zeros(sequences, cols, dtype=torch.float64, device=x.device)
    for chunk in squares.split(CHUNK, dim=1):
        partial = torch.zeros(sequences, cols, device=x.device)
        for token in chunk.unbind(dim=1):
            partial += token
        total += partial
    if sqnorm.dim() == 2:
        sqnorm += total.float()
    else:
        for one in total.float():
            sqnorm += one
