"""2:4 packing in plain PyTorch: torch's own conversions to and from its CUTLASS layout."""

from __future__ import annotations

from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from .._checks import check_norm, check_packable, check_packed
from .nm import nm_mask


def pack_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    check_packable("pack_24", weight)
    overfull = int((weight.reshape(-1, 4).ne(0).sum(dim=1) > 2).sum())
    if overfull:
        raise ValueError(
            f"wanda::pack_24: weight must be 2:4 sparse, {overfull} of its groups of four have more than two non-zeros"
        )
    return sparse_semi_structured_from_dense_cutlass(weight.contiguous())


def prune_pack_24(weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    check_packable("prune_pack_24", weight)
    check_norm("prune_pack_24", norm, weight)
    pruned = weight.masked_fill(nm_mask(weight, norm, 2, 4), 0)
    return sparse_semi_structured_from_dense_cutlass(pruned.contiguous())


def unpack_24(values: Tensor, metadata: Tensor) -> Tensor:
    check_packed("unpack_24", values, metadata)
    return sparse_semi_structured_to_dense_cutlass(values.contiguous(), metadata.contiguous())
