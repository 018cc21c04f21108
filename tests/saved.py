"""A tiny model with a word-level tokenizer, saved as a Hugging Face folder."""

from __future__ import annotations

import random
from pathlib import Path

import tiny

WORDS = [f"w{number}" for number in range(120)]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: i + 4 for i, word in enumerate(WORDS)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text(words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def save_model(folder: Path, family: str = "llama", **changes) -> Path:
    tiny.model(family, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
