"""Tokens per second of a random mixture of experts with 1 GB of bf16 weights, batch 1: packed, and dense with each way
in which transformers multiplies with experts, of which the fastest is the peer (quick: of a small one)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.generate import FORMATS, TOKENS
from benchmarks.harness import Settings
from benchmarks.operators import backend_of
from benchmarks.records import Row
from wanda_kernels import compress, prune
from wanda_kernels.packed import dispatch
from wanda_kernels.speed import measure, weight_bytes

CONFIG: dict[str, Any] = {
    "hidden_size": 1024, "moe_intermediate_size": 640, "num_experts": 32, "num_experts_per_tok": 4,
    "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 8, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
PROMPT = 8  # batched_mm copies the weights of each token's experts
DENSE = ("grouped_mm", "batched_mm", "eager")  # of transformers' experts_implementation


def build(settings: Settings) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**(CONFIG | (SMALL if settings.quick else {})))
    dense: Any = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval().to(settings.device)
    if not settings.quick and weight_bytes(dense) < 10**9:
        raise RuntimeError(f"the model must have 1 GB of weights, it has {weight_bytes(dense)} bytes")
    models: dict[str, nn.Module] = {}
    for name, pattern in FORMATS:
        models[name] = copy.deepcopy(dense)
        prune(models[name], sparsity=None if pattern else 0.5, pattern=pattern, method="magnitude")
        compress(models[name])
    for implementation in DENSE:
        own = copy.deepcopy(dense)
        own.set_experts_implementation(implementation)
        models[implementation] = own
    return models


def decode(settings: Settings) -> list[Row]:
    dispatch.clear()
    models = build(settings)
    tokens = 3 if settings.quick else TOKENS
    found = measure(models, [1], PROMPT, tokens, rounds=1 if settings.repeats <= 15 else 3)
    seconds = {entry["model"]: 1 / entry["decode_tokens_s"] for entry in found}
    peer = min(DENSE, key=lambda name: seconds[name])
    return [
        {
            "suite": "sparse", "operator": "PackedExperts decode",
            "shape": "random Qwen3-MoE" if settings.quick else "random Qwen3-MoE, 1 GB", "tokens": 1,
            "dtype": "bfloat16", "backend": backend_of("bitmap_experts", settings.device),
            "implementation": entry["model"], "size": PROMPT, "bytes": entry["weight_bytes"],
            "median_ms": seconds[entry["model"]] * 1e3, "ratio": seconds[entry["model"]] / seconds[peer],
            "ratio_to": peer,
        }
        for entry in found
    ]  # fmt: skip


def steps(settings: Settings) -> list[tuple[str, Callable[[], list[Row]]]]:
    return [("decode with packed experts, batch 1", partial(decode, settings))]
