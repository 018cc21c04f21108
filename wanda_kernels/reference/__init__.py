"""The operators in plain PyTorch: short, obvious, and the truth that every backend is compared with."""

from .act_mul_sqnorm import gelu_tanh_mul_sqnorm, silu_mul_sqnorm
from .nm import nm_mask, prune_nm_
from .pack_24 import pack_24, prune_pack_24, unpack_24
from .packed import bitmap_linear, sparse24_linear, unpack_bitmap, unpack_sparse24
from .rms_norm_sqnorm import rms_norm_sqnorm
from .rows import prune_rows_, row_mask
from .sqnorm import add_sqnorm_

__all__ = [
    "add_sqnorm_",
    "bitmap_linear",
    "gelu_tanh_mul_sqnorm",
    "nm_mask",
    "pack_24",
    "prune_nm_",
    "prune_pack_24",
    "prune_rows_",
    "rms_norm_sqnorm",
    "row_mask",
    "silu_mul_sqnorm",
    "sparse24_linear",
    "unpack_24",
    "unpack_bitmap",
    "unpack_sparse24",
]
