"""Tokens per second of a random LLaMA with more than 1 GB of bf16 weights: dense, bitmap at 50 %, and 2:4.

python -m benchmarks.generate [--record] [--batches 1,4,16] [--rounds 3]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.circumstances import write_result
from wanda_kernels import compress, prune
from wanda_kernels.cli.display import bar
from wanda_kernels.cli.speed import draw, verdicts
from wanda_kernels.packed import dispatch
from wanda_kernels.speed import measure, weight_bytes

CONFIG: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 8192, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT, TOKENS = 64, 24


def build() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = LlamaForCausalLM._from_config(LlamaConfig(**CONFIG), dtype=torch.bfloat16).eval()
    assert weight_bytes(dense) >= 10**9
    models: dict[str, nn.Module] = {"dense": dense}
    for name, pattern in (("bitmap 50 %", None), ("2:4", "2:4")):
        models[name] = copy.deepcopy(dense)
        prune(models[name], sparsity=None if pattern else 0.5, pattern=pattern, method="magnitude")
        compress(models[name])
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    models = build()
    with bar() as shown:
        task = shown.add_task("generating", total=len(batches) * (options.rounds + 2) * len(models))
        rows = measure(models, batches, PROMPT, TOKENS, options.rounds, lambda: shown.advance(task))
    screen = Console()
    screen.width = max(screen.width, 110)
    screen.print(draw(rows, PROMPT, TOKENS))
    for line in verdicts(rows, "dense"):
        screen.print(line)
    if options.record:
        result = {"config": CONFIG, "prompt": PROMPT, "tokens": TOKENS, "rounds": options.rounds, "rows": rows}
        write_result("generate", result | {"dispatch": dispatch.choices()})


if __name__ == "__main__":
    main()
