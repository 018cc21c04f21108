"""Loading models and tokenizers from a hub id, a folder or a GGUF file; saving them whole or not at all."""

from .load import load_model, load_tokenizer
from .save import save_pretrained

__all__ = ["load_model", "load_tokenizer", "save_pretrained"]
