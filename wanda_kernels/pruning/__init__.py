"""The driver: prune a transformers model block by block.

``spec`` says what a run does; ``driver`` checks the model and the data; ``loop`` goes over the blocks that a ``source``
gives; ``blocks`` finds them and their matrices, and refuses what would be pruned wrongly; ``recording`` keeps the
arguments that each block is called with; ``fusion`` finds what can add up statistics on the way; ``statistics``
accumulates each distinct input once.
"""

from ..methods import METHODS, Pattern
from ..methods.owl import Owl
from .driver import prune
from .report import LayerReport, Progress, PruningReport
from .spec import PruneSpec

__all__ = ["METHODS", "LayerReport", "Owl", "Pattern", "Progress", "PruneSpec", "PruningReport", "prune"]
