"""Wanda pruning of language models with compiled kernels.

``prune(model, input_ids)`` prunes a transformers model in place; ``wanda_kernels.ops`` holds the operators;
``wanda-kernels --help`` is the command line.
"""

from importlib.metadata import version

from . import ops
from .pruning import LayerReport, PruningReport, prune
from .text import perplexity

__version__ = version("wanda_kernels")
__all__ = ["LayerReport", "PruningReport", "__version__", "ops", "perplexity", "prune"]
