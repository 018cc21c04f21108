"""Packed sparse weights in plain PyTorch: unpacking, and the product with the unpacked weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .._checks import check_bitmap, check_packed_linear, check_sparse24


def unpack_bitmap(values: Tensor, bitmap: Tensor, starts: Tensor) -> Tensor:
    check_bitmap("unpack_bitmap", values, bitmap, starts)
    kept = (bitmap[:, :, None] >> torch.arange(8, device=bitmap.device)) & 1
    kept = kept.bool().flatten(1)
    weight = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    first = int(starts[0])  # not 0 where a band of rows is given
    weight[kept] = values[first : first + int(kept.sum())]
    return weight


def unpack_sparse24(values: Tensor, indices: Tensor) -> Tensor:
    check_sparse24("unpack_sparse24", values, indices)
    inside = (indices[:, :, None] >> torch.arange(0, 8, 2, device=indices.device)) & 3  # column in its group of four
    groups = inside.view(indices.shape[0], -1, 2).long()
    bits = values.view(torch.int32 if values.element_size() == 4 else torch.int16)  # moved as integers: NaN stays
    weight = torch.zeros(*groups.shape[:2], 4, dtype=bits.dtype, device=values.device)
    return weight.scatter_(2, groups, bits.view(groups.shape)).flatten(1).view(values.dtype)


def bitmap_linear(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    check_bitmap("bitmap_linear", values, bitmap, starts)
    check_packed_linear("bitmap_linear", x, values, bitmap, bias)
    return linear(x, unpack_bitmap(values, bitmap, starts), bias)


def sparse24_linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    check_sparse24("sparse24_linear", values, indices)
    check_packed_linear("sparse24_linear", x, values, indices, bias)
    return linear(x, unpack_sparse24(values, indices), bias)
