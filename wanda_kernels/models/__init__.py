"""Loading models and tokenizers from a hub id, a folder or a GGUF file; saving them whole or not at all."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .load import load_model, load_tokenizer
from .save import save_pretrained

__all__ = ["evaluating", "load_model", "load_tokenizer", "save_pretrained"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, dropout is off, and what was compiled in place (``module.compile()``) runs as it is written, so that
    other forwards can stand in for modules inside it; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with ExitStack() as inside:
            if any(module._compiled_call_impl is not None for module in model.modules()):
                inside.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        for module, training in modes:
            module.training = training
