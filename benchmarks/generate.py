"""Tokens per second of a random LLaMA with more than 1 GB of bf16 weights: dense, bitmap at 50 %, and 2:4 (quick: of
a small one)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Settings
from benchmarks.operators import backend_of
from benchmarks.records import Row
from benchmarks.scaling import SMALL
from wanda_kernels import compress, prune
from wanda_kernels.packed import dispatch
from wanda_kernels.speed import BATCHES, measure, weight_bytes

CONFIG: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 8192, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT, TOKENS = 32, 16
FORMATS = (("bitmap 50 %", None), ("2:4", "2:4"))


def build(settings: Settings) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    config = LlamaConfig(**(SMALL | {"num_hidden_layers": 2} if settings.quick else CONFIG))
    dense = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval().to(settings.device)
    if not settings.quick and weight_bytes(dense) < 10**9:
        raise RuntimeError(f"the model must have 1 GB of weights, it has {weight_bytes(dense)} bytes")
    models: dict[str, nn.Module] = {"dense": dense}
    for name, pattern in FORMATS:
        models[name] = copy.deepcopy(dense)
        prune(models[name], sparsity=None if pattern else 0.5, pattern=pattern, method="magnitude")
        compress(models[name])
    return models


class _Models:
    """Built at the first step, freed after the last."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models: dict[str, nn.Module] = {}

    def batch(self, size: int, is_last: bool) -> list[Row]:
        if not self.models:
            dispatch.clear()
            self.models = build(self.settings)
        tokens = 3 if self.settings.quick else TOKENS
        found = measure(self.models, [size], PROMPT, tokens, rounds=1 if self.settings.repeats <= 15 else 3)
        if is_last:
            self.models = {}
        return [row for entry in found for row in self._rows(entry)]

    def _rows(self, entry: dict[str, Any]) -> list[Row]:
        shared = {
            "suite": "end-to-end", "operator": "generate",
            "shape": "random LLaMA" if self.settings.quick else "random LLaMA, 1 GB", "tokens": entry["batch"],
            "dtype": "bfloat16", "backend": backend_of("bitmap_linear", self.settings.device),
            "implementation": entry["model"], "size": PROMPT, "bytes": entry["weight_bytes"],
        }  # fmt: skip
        first, decode = entry["first_token_s"], entry["batch"] / entry["decode_tokens_s"]
        return [
            {**shared, "part": "first token", "median_ms": first * 1e3, "peak_bytes": entry["peak_bytes"]},
            {**shared, "part": "decode", "median_ms": decode * 1e3, "gb_per_s": entry["weight_bytes"] / decode / 1e9,
             "ratio": 1 / entry["decode_ratio"], "ratio_to": "dense"},
        ]  # fmt: skip


def steps(settings: Settings) -> list[tuple[str, Callable[[], list[Row]]]]:
    models = _Models(settings)
    return [(f"generate, batch {size}", partial(models.batch, size, size == BATCHES[-1])) for size in BATCHES]
