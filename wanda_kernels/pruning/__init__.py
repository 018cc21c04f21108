"""The driver: prune a transformers model block by block.

``driver`` runs the loop; ``blocks`` finds the decoder blocks and their linear layers; ``recording`` keeps the
arguments that each block is called with; ``statistics`` accumulates each distinct input once; ``selection`` maps
Wanda and magnitude to an operator; ``methods`` holds the rest; ``report`` is what comes back.
"""

from .driver import prune
from .methods import METHODS, Owl
from .report import LayerReport, PruningReport
from .selection import Pattern, Target

__all__ = ["METHODS", "LayerReport", "Owl", "Pattern", "PruningReport", "Target", "prune"]
