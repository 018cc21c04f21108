"""The operators in plain PyTorch: short, obvious, and the truth that every backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from .. import _checks
from .gram import add_gram_, refine_nm_, refine_rows_, solve_rows_
from .levels import calibrate_levels_
from .quantize import exact_levels, pack_kept_, quantize
from .quantized import quantized_experts, quantized_linear, unpack_quantized

__all__ = [
    "add_gram_", "add_sqnorm_", "bitmap_experts", "bitmap_linear", "calibrate_levels_", "dense_linear",
    "exact_levels", "gelu_tanh_mul_sqnorm", "nm_mask", "pack_24", "pack_kept_", "prune_nm_", "prune_pack_24",
    "prune_rows_", "quantize", "quantized_experts", "quantized_linear", "refine_nm_", "refine_rows_",
    "rms_norm_sqnorm", "row_mask", "silu_mul_sqnorm", "solve_rows_", "sparse24_experts", "sparse24_linear",
    "unpack_24", "unpack_bitmap", "unpack_quantized", "unpack_sparse24",
]  # fmt: skip


# Row selection (Wanda, arXiv 2306.11695, section 3, eq. 1, compared per output row).


# A weight is a matrix [C_out, C_in] with its norm [C_in], or a stack of them, [E, C_out, C_in] with [E, C_in].


def scores(weight: Tensor, norm: Tensor) -> Tensor:
    """``|W| * norm`` in float32: one multiplication, rounded to nearest."""
    return weight.abs().float() * norm.unsqueeze(-2)


def write_score_sums(score: Tensor, mask: Tensor, score_sums: Tensor) -> None:
    """Per row: sum of the squared scores that are pruned, and of all."""
    squares = score.square()
    score_sums[..., 0] = squares.masked_fill(~mask, 0).sum(dim=-1)
    score_sums[..., 1] = squares.sum(dim=-1)


def _prune_(weight: Tensor, norm: Tensor, mask: Tensor, score_sums: Tensor | None) -> None:
    if score_sums is not None:
        write_score_sums(scores(weight, norm), mask, score_sums)
    weight.masked_fill_(mask, 0)


def row_mask(weight: Tensor, norm: Tensor, sparsity: float) -> Tensor:
    _checks.check_rows("row_mask", weight, norm, sparsity)
    score = scores(weight, norm)
    k = int(weight.shape[-1] * sparsity)
    pruned = torch.sort(score, dim=-1, stable=True).indices[..., :k]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, pruned, True)


def prune_rows_(weight: Tensor, norm: Tensor, sparsity: float, score_sums: Tensor | None = None) -> None:
    _checks.check_rows("prune_rows_", weight, norm, sparsity, score_sums)
    _prune_(weight, norm, row_mask(weight, norm, sparsity), score_sums)


# N:M selection (section 3.1: N of every M consecutive inputs are kept).


def nm_mask(weight: Tensor, norm: Tensor, n: int, m: int) -> Tensor:
    _checks.check_nm("nm_mask", weight, norm, n, m)
    groups = scores(weight, norm).reshape(*weight.shape[:-1], weight.shape[-1] // m, m)
    pruned = torch.sort(groups, dim=-1, stable=True).indices[..., : m - n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, pruned, True).view(weight.shape)


def prune_nm_(weight: Tensor, norm: Tensor, n: int, m: int, score_sums: Tensor | None = None) -> None:
    _checks.check_nm("prune_nm_", weight, norm, n, m, score_sums)
    _prune_(weight, norm, nm_mask(weight, norm, n, m), score_sums)


# 2:4 packing: torch's own conversions to and from its CUTLASS layout.


def pack_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    _checks.check_packable("pack_24", weight)
    overfull = int((weight.reshape(-1, 4).ne(0).sum(dim=1) > 2).sum())
    if overfull:
        raise ValueError(
            f"wanda::pack_24: weight must be 2:4 sparse, {overfull} of its groups of four have more than two non-zeros"
        )
    return sparse_semi_structured_from_dense_cutlass(weight.contiguous())


def prune_pack_24(weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    _checks.check_packable("prune_pack_24", weight, norm)
    pruned = weight.masked_fill(nm_mask(weight, norm, 2, 4), 0)
    return sparse_semi_structured_from_dense_cutlass(pruned.contiguous())


def unpack_24(values: Tensor, metadata: Tensor) -> Tensor:
    _checks.check_packed("unpack_24", values, metadata)
    return sparse_semi_structured_to_dense_cutlass(values.contiguous(), metadata.contiguous())


# Packed sparse weights: unpacking, and the product with the unpacked weight, or with a dense one.


def unpack_bitmap(values: Tensor, bitmap: Tensor, starts: Tensor) -> Tensor:
    _checks.check_bitmap("unpack_bitmap", values, bitmap, starts)
    kept = (bitmap[:, :, None] >> torch.arange(8, device=bitmap.device)) & 1
    kept = kept.bool().flatten(1)
    weight = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    first = int(starts[0])  # not 0 where a band of rows is given
    weight[kept] = values[first : first + int(kept.sum())]
    return weight


def unpack_sparse24(values: Tensor, indices: Tensor) -> Tensor:
    _checks.check_sparse24("unpack_sparse24", values, indices)
    inside = (indices[:, :, None] >> torch.arange(0, 8, 2, device=indices.device)) & 3  # column in its group of four
    groups = inside.view(indices.shape[0], -1, 2).long()
    bits = values.view(torch.int32 if values.element_size() == 4 else torch.int16)  # moved as integers: NaN stays
    weight = torch.zeros(*groups.shape[:2], 4, dtype=bits.dtype, device=values.device)
    return weight.scatter_(2, groups, bits.view(groups.shape)).flatten(1).view(values.dtype)


def bitmap_linear(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    _checks.check_bitmap_linear("bitmap_linear", x, values, bitmap, starts, bias)
    return linear(x, unpack_bitmap(values, bitmap, starts), bias)


def sparse24_linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    _checks.check_sparse24_linear("sparse24_linear", x, values, indices, bias)
    return linear(x, unpack_sparse24(values, indices), bias)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _checks.check_dense_linear("dense_linear", x, weight, bias)
    return linear(x, weight, bias)


# Products of rows sorted by expert, each with its own expert's weight of a stack [E * C_out, C_in].


def bitmap_experts(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    _checks.check_bitmap_experts("bitmap_experts", x, values, bitmap, starts, ends)
    return _experts("bitmap_experts", x, unpack_bitmap(values, bitmap, starts), ends)


def sparse24_experts(x: Tensor, values: Tensor, indices: Tensor, ends: Tensor) -> Tensor:
    _checks.check_sparse24_experts("sparse24_experts", x, values, indices, ends)
    return _experts("sparse24_experts", x, unpack_sparse24(values, indices), ends)


def _experts(op: str, x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    weights = stack.view(len(ends), -1, stack.shape[1])
    y = x.new_zeros(x.shape[0], weights.shape[1])
    begin = 0
    for weight, end in zip(weights, _checks.check_ends(op, ends, x.shape[0]), strict=True):
        y[begin:end] = linear(x[begin:end], weight)
        begin = end
    return y


# Column sums of squares (section 3, eq. 1: the square of ||X_j||_2).


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


def add_sqnorm_(sqnorm: Tensor, x: Tensor, token_mask: Tensor | None = None, ends: Tensor | None = None) -> None:
    sequences, tokens, cols = _checks.check_sqnorm("add_sqnorm_", sqnorm, x, token_mask, ends)
    if ends is not None:
        begin = 0
        for row, end in zip(sqnorm, _checks.check_ends("add_sqnorm_", ends, tokens), strict=True):
            if end > begin:
                row += _sum_of_squares(x[begin:end])
            begin = end
        return
    x = x.reshape(sequences, tokens, cols)
    counted = None if token_mask is None else token_mask.reshape(sequences, tokens)
    for sequence in range(sequences):
        one = x[sequence] if counted is None else x[sequence][counted[sequence]]
        row = sqnorm[sequence] if sqnorm.dim() == 2 else sqnorm
        row += _sum_of_squares(one)


def norm_of_sequences(sqnorm: Tensor) -> Tensor:
    """[sequences, C_in] -> [C_in]: root of the running mean, with the steps of ``WrappedGPT.add_batch``."""
    mean = torch.zeros(sqnorm.shape[1], dtype=torch.float32, device=sqnorm.device)
    for seen, one in enumerate(sqnorm):
        mean *= seen / (seen + 1)
        # by float64: torch's vectorised float32 sqrt is off by one bit in a tenth of the cases, torch.norm's is not
        mean += one.double().sqrt().float() ** 2 / (seen + 1)
    return mean.sqrt()


# RMSNorm and the column sums of squares of its output.


def rms_norm_sqnorm(
    x: Tensor, weight: Tensor, eps: float, sqnorm: Tensor, token_mask: Tensor | None = None, unit_offset: bool = False
) -> Tensor:
    _checks.check_rms_norm_sqnorm("rms_norm_sqnorm", x, weight, eps, sqnorm, token_mask)
    values = x.float()
    scaled = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    y = (scaled * (1.0 + weight.float())).to(x.dtype) if unit_offset else weight * scaled.to(x.dtype)
    add_sqnorm_(sqnorm, y, token_mask)
    return y


# activation(gate) * up and its column sums of squares.


def silu_mul_sqnorm(gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None = None) -> Tensor:
    _checks.check_act_mul_sqnorm("silu_mul_sqnorm", gate, up, sqnorm, token_mask)
    y = silu(gate) * up
    add_sqnorm_(sqnorm, y, token_mask)
    return y


def gelu_tanh_mul_sqnorm(gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None = None) -> Tensor:
    _checks.check_act_mul_sqnorm("gelu_tanh_mul_sqnorm", gate, up, sqnorm, token_mask)
    y = gelu(gate, approximate="tanh") * up
    add_sqnorm_(sqnorm, y, token_mask)
    return y
