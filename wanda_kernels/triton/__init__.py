"""Triton kernels for CUDA tensors: channel statistics, alone or added up by the operation that makes the input.

Imported by ``_backend.py`` where Triton is installed. Each launcher has the signature of its operator.
"""

from .act_mul_sqnorm import gelu_tanh_mul_sqnorm, silu_mul_sqnorm
from .norm_of_sequences import norm_of_sequences
from .packing import pack_bitmap, pack_sparse24
from .rms_norm_sqnorm import rms_norm_sqnorm
from .sparsegpt_block import sparsegpt_block
from .sqnorm import add_sqnorm_

__all__ = [
    "add_sqnorm_",
    "gelu_tanh_mul_sqnorm",
    "norm_of_sequences",
    "pack_bitmap",
    "pack_sparse24",
    "rms_norm_sqnorm",
    "silu_mul_sqnorm",
    "sparsegpt_block",
]
