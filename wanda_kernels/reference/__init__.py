"""The operators in plain PyTorch: short, obvious, and the truth that every backend is compared with."""

from .nm import nm_mask, prune_nm_
from .pack_24 import pack_24, prune_pack_24, unpack_24
from .rows import prune_rows_, row_mask
from .sqnorm import add_sqnorm_

__all__ = [
    "add_sqnorm_",
    "nm_mask",
    "pack_24",
    "prune_nm_",
    "prune_pack_24",
    "prune_rows_",
    "row_mask",
    "unpack_24",
]
