"""The driver: prune a transformers model block by block (docs/design.md says how)."""

from ..methods import METHODS, Pattern
from ..methods.owl import Owl
from .driver import prune
from .report import LayerReport, Progress, PruningReport
from .spec import PruneSpec

__all__ = ["METHODS", "LayerReport", "Owl", "Pattern", "Progress", "PruneSpec", "PruningReport", "prune"]
