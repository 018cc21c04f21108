"""What prunes one linear layer: the paper's methods, its baselines and its ablations.

``options`` says what a method can be told; ``apply`` prunes a layer; ``inputs`` holds what is known of a layer's
inputs; ``scores``, ``groups``, ``variant`` and ``sparsegpt`` are the parts; ``owl`` gives each block its own sparsity.
Wanda and magnitude run on the kernels; the rest is plain PyTorch around them.
"""

from .apply import Outcome, prune_layer_
from .inputs import LayerInputs
from .options import METHODS, MethodOptions
from .owl import Owl

__all__ = ["METHODS", "LayerInputs", "MethodOptions", "Outcome", "Owl", "prune_layer_"]
