"""Tokens per second at batch 1 of a LLaMA-7B-shaped random model in bfloat16: dense, 2:4 and bitmap at 50 %, each token
one CUDA graph (``speed --static``), in turns.

python -m benchmarks.decode_7b [--device cuda] [--blocks 32] [--prompt 32] [--tokens 64] [--rounds 3] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from benchmarks.random_llama import LLAMA_7B, build
from benchmarks.scaling import SMALL
from wanda_kernels import compress, prune
from wanda_kernels.models.load import choose_device
from wanda_kernels.speed import measure

PACKED: dict[str, dict[str, Any]] = {"2:4": {"pattern": "2:4"}, "bitmap 50 %": {"sparsity": 0.5}}


def models(device: torch.device, blocks: int, quick: bool) -> dict[str, nn.Module]:
    """All three on the device: about 30 GB, and as much as the dense one once more while a copy is packed."""
    found = {"dense": build(LlamaConfig(**(SMALL if quick else LLAMA_7B), num_hidden_layers=blocks), device)}
    for name, target in PACKED.items():
        start = time.perf_counter()
        found[name] = copy.deepcopy(found["dense"])
        report = prune(
            found[name], method="magnitude", **target
        )  # needs no forward pass: what is kept is of no account
        if not 0.49 < report.achieved_sparsity < 0.51:  # equal magnitudes go together
            raise RuntimeError(f"{name} has {report.achieved_sparsity:.2%} zeros")
        compress(found[name])
        print(f"{name}: pruned and packed in {time.perf_counter() - start:.1f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small model")
    options = parser.parse_args()
    named = models(choose_device(options.device), options.blocks, options.quick)
    rows = measure(named, [1], options.prompt, options.tokens, options.rounds, ways=["static"])
    print("figures: " + json.dumps({"decode_7b": rows}), flush=True)
    for row in rows:
        differs = row["first_difference"]
        where = "equal generate's" if differs is None else f"differ from generate's from the {differs}. on (rounding)"
        print(f"{row['model']}: {options.tokens} tokens {where}")
    told = [f"{row['model']} {row['decode_tokens_s']:.1f} ({row['decode_ratio']:.2f} x)" for row in rows]
    print(f"summary: tokens/s at batch 1: {', '.join(told)}")


if __name__ == "__main__":
    main()
