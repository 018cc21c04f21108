"""Wanda pruning of language models with compiled kernels.

``prune(model, input_ids)`` prunes a transformers model in place, ``compress(model)`` packs it; ``wanda_kernels.ops``
holds the operators; ``wanda-kernels --help`` is the command line. Once this package is imported, transformers loads
packed models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._register import register
from ._version import __version__

if TYPE_CHECKING:
    from . import ops
    from .packed import compress, decompress
    from .pruning import LayerReport, Owl, Pattern, Progress, PruneSpec, PruningReport, prune
    from .reap import DropReport, drop_experts
    from .streaming import stream_prune
    from .text import load_calibration, perplexity

__all__ = [
    "DropReport", "LayerReport", "Owl", "Pattern", "Progress", "PruneSpec", "PruningReport", "__version__", "compress",
    "decompress", "drop_experts", "load_calibration", "ops", "perplexity", "prune", "stream_prune",
]  # fmt: skip

# Loaded at the first use: torch alone takes seconds, in which the command line could not even say that it was
# interrupted.
_HOMES = {
    **dict.fromkeys(("compress", "decompress"), ".packed"),
    **dict.fromkeys(("LayerReport", "Owl", "Pattern", "Progress", "PruneSpec", "PruningReport", "prune"), ".pruning"),
    **dict.fromkeys(("DropReport", "drop_experts"), ".reap"),
    **dict.fromkeys(("load_calibration", "perplexity"), ".text"),
    "stream_prune": ".streaming",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
