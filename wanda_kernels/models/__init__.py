"""Loading models and tokenizers from a hub id, a folder or a GGUF file; saving them whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .load import load_model, load_tokenizer
from .save import save_pretrained

__all__ = ["evaluating", "load_model", "load_tokenizer", "save_pretrained"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, dropout is off; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
