"""Checkpoints larger than memory: pruned from folder to folder, block by block, with a state to resume from."""

from .run import stream_prune

__all__ = ["stream_prune"]
