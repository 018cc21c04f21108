"""Pruned models that are smaller and faster: packed checkpoints, and products with packed weights.

``compress(model)`` packs in place, ``decompress(model)`` unpacks; ``save_pretrained`` and, after
``import wanda_kernels``, ``from_pretrained`` carry packed models. The formats are in ``format.py``.
"""

from .experts import PackedExperts
from .format import FORMATS, pack_bitmap, pack_sparse24, validate_bitmap, validate_sparse24
from .linear import PackedLinear
from .model import PackedReport, Packing, compress, decompress, keep_prefill_copies

__all__ = [
    "FORMATS", "PackedExperts", "PackedLinear", "PackedReport", "Packing", "compress", "decompress",
    "keep_prefill_copies", "pack_bitmap", "pack_sparse24", "validate_bitmap", "validate_sparse24",
]  # fmt: skip
