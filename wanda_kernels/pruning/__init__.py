"""The driver: prune a transformers model block by block.

``driver`` checks the arguments and makes the report; ``run`` is the loop over the blocks; ``blocks`` finds them and
their linear layers, and refuses what would be pruned wrongly; ``recording`` keeps the arguments that each block is
called with; ``fusion`` finds what can add up statistics on the way; ``statistics`` accumulates each distinct input
once; ``selection`` maps Wanda and magnitude to an operator; ``methods`` holds the rest; ``shares`` is for ranks.
"""

from .driver import prune
from .methods import METHODS, Owl
from .progress import Progress
from .report import LayerReport, PruningReport
from .selection import Pattern, Target

__all__ = ["METHODS", "LayerReport", "Owl", "Pattern", "Progress", "PruningReport", "Target", "prune"]
