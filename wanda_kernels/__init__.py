"""Wanda pruning of language models with compiled kernels.

``prune(model, input_ids)`` prunes a transformers model in place, ``compress(model)`` packs it; ``wanda_kernels.ops``
holds the operators; ``wanda-kernels --help`` is the command line. Once this package is imported, transformers loads
packed models.
"""

from . import ops
from ._version import __version__
from .packed import compress, decompress
from .pruning import LayerReport, Owl, PruningReport, prune
from .text import perplexity

__all__ = ["LayerReport", "Owl", "PruningReport", "__version__", "compress", "decompress", "ops", "perplexity", "prune"]
