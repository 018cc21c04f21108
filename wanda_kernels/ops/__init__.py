"""The operators: torch custom operators with a schema, a fake implementation and kernels per device.

==================  ==================================================================================
``prune_rows_``     zero the lowest-scored weights of each row, in place (``row_mask``: only the mask)
``prune_nm_``       keep n of every m consecutive weights, in place (``nm_mask``: only the mask)
``refine_rows_``    a better mask by swaps within rows, in place (``refine_nm_``: within groups of m)
``solve_rows_``     better kept weights on a fixed mask, in place
``calibrate_levels_``  better levels of 8 or 4 bits, in place
``pack_24``         2:4 weights to torch's CUTLASS layout (``prune_pack_24``: select and pack;
                    ``unpack_24``: back to dense)
``add_sqnorm_``     add each channel's sum of squares, the statistics behind ``norm``
                    (``rms_norm_sqnorm``, ``silu_mul_sqnorm``, ``gelu_tanh_mul_sqnorm``: on the way, by the
                    operation that makes the input)
``add_gram_``       add x^T x, what ``refine_rows_`` goes by
``bitmap_linear``   product with a packed weight (``sparse24_linear``; ``unpack_bitmap``,
                    ``unpack_sparse24``: back to dense)
``dense_linear``    product of a few tokens with a dense weight, on the CPU at the memory's speed
``bitmap_experts``  products of tokens with the packed weights of the experts that they go to
                    (``sparse24_experts``)
``quantized_linear``  both with values of 8 or 4 bits (``quantized_experts``, ``unpack_quantized``)
``quantize``        weights to levels of 8 or 4 bits and scales (``exact_levels``: those that they already consist of;
                    ``pack_kept_``: the bytes of a bitmap)
==================  ==================================================================================
"""

from .act_mul_sqnorm import gelu_tanh_mul_sqnorm, silu_mul_sqnorm
from .gram import add_gram_
from .levels import calibrate_levels_
from .nm import nm_mask, prune_nm_
from .pack_24 import pack_24, prune_pack_24, unpack_24
from .packed import (
    bitmap_experts,
    bitmap_linear,
    dense_linear,
    sparse24_experts,
    sparse24_linear,
    unpack_bitmap,
    unpack_sparse24,
)
from .quantize import exact_levels, pack_kept_, quantize
from .quantized import quantized_experts, quantized_linear, unpack_quantized
from .refine import refine_nm_, refine_rows_
from .rms_norm_sqnorm import rms_norm_sqnorm
from .rows import prune_rows_, row_mask
from .solve import solve_rows_
from .sqnorm import add_sqnorm_

__all__ = [
    "add_gram_", "add_sqnorm_", "bitmap_experts", "bitmap_linear", "calibrate_levels_", "dense_linear",
    "exact_levels", "gelu_tanh_mul_sqnorm", "nm_mask", "pack_24", "pack_kept_", "prune_nm_", "prune_pack_24",
    "prune_rows_", "quantize", "quantized_experts", "quantized_linear", "refine_nm_", "refine_rows_",
    "rms_norm_sqnorm", "row_mask", "silu_mul_sqnorm", "solve_rows_", "sparse24_experts", "sparse24_linear",
    "unpack_24", "unpack_bitmap", "unpack_quantized", "unpack_sparse24",
]  # fmt: skip
