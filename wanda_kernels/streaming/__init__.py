"""Checkpoints larger than memory: pruned from folder to folder, block by block, with a state to resume from.

``run`` is the whole; ``checkpoint`` reads and writes safetensors by positions; ``skeleton`` is the model without
weights; ``blocks`` brings them and takes them away; ``activations`` go to files; ``workfolder`` and ``state`` are what
a later run goes on from.
"""

from .run import stream_prune

__all__ = ["stream_prune"]
