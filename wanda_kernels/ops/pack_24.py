"""2:4 packing to the layout of torch's ``SparseSemiStructuredTensorCUTLASS``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import fake
from .._checks import check_packable, check_packed


def pack_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a 2:4 sparse weight: ``(values, metadata)``.

    Equivalent to ``torch.sparse._semi_structured_conversions.sparse_semi_structured_from_dense_cutlass``.

    Args:
        weight: [C_out, C_in], bfloat16 or float16, at most two non-zeros in every four consecutive columns;
            C_out a multiple of 32 and C_in of 64 (torch's limits).

    Returns:
        values: [C_out, C_in / 2], the dtype of ``weight``, the kept weights in order.
        metadata: [C_out, C_in / 16], int16: 4 bits per group, ``index0 | index1 << 2``, in torch's reordered
        layout.

    Raises:
        ValueError: a shape outside the limits, or a group with more than two non-zeros.
        TypeError: float32 and others (torch packs float32 as 1:2).
    """
    return torch.ops.wanda.pack_24(weight)


def prune_pack_24(weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Select 2:4 as :func:`prune_nm_` does and pack as :func:`pack_24` does, in one pass over memory.

    ``weight`` ([C_out, C_in], bfloat16 or float16) is not written; ``norm`` is [C_in], float32.
    """
    return torch.ops.wanda.prune_pack_24(weight, norm)


def unpack_24(values: Tensor, metadata: Tensor) -> Tensor:
    """The dense weight, [C_out, C_in], of :func:`pack_24`'s ``values`` and ``metadata``."""
    return torch.ops.wanda.unpack_24(values, metadata)


def _empty_packed(weight: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    return weight.new_empty(rows, cols // 2), weight.new_empty(rows, cols // 16, dtype=torch.int16)


fake("pack_24", check_packable, _empty_packed)
fake("prune_pack_24", check_packable, _empty_packed)
fake("unpack_24", check_packed, lambda values, _: values.new_empty(values.shape[0], values.shape[1] * 2))
