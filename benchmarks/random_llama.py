"""A LLaMA-7B-shaped random model in bfloat16, made block by block on the device and pruned end to end: where the time
goes.

python -m benchmarks.random_llama [--device cuda] [--blocks 32] [--samples 128] [--length 2048] [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.scaling import SMALL
from wanda_kernels import prune
from wanda_kernels.models.load import choose_device

LLAMA_7B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


def build(config: LlamaConfig, device: torch.device) -> nn.Module:
    """Nothing of it is ever on another device, or there twice."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    torch.manual_seed(0)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    parts = [*model.model.layers, model.model.embed_tokens, model.model.norm, model.lm_head]
    for part in parts:
        part.to_empty(device=device)
        for parameter in part.parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)
    return model


def run(device: torch.device, blocks: int, samples: int, length: int, quick: bool) -> dict[str, Any]:
    """Seconds of building and, for each target, of the parts of a run."""
    config = LlamaConfig(**(SMALL if quick else LLAMA_7B), num_hidden_layers=blocks)
    ids = torch.randint(config.vocab_size, (samples, length), generator=torch.Generator().manual_seed(0)).to(device)
    result: dict[str, Any] = {"blocks": blocks, "samples": samples, "length": length, "runs": []}
    for target in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        start = time.perf_counter()
        model = build(config, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        built = time.perf_counter() - start
        start = time.perf_counter()
        report = prune(model, ids, **target)
        total = time.perf_counter() - start
        if not 0.499 < report.achieved_sparsity < 0.501:
            raise RuntimeError(f"{target} left {report.achieved_sparsity:.2%} zeros")
        entry = {"target": target, "build": built, "total": total, **report.seconds}
        result["runs"].append(entry)
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in entry.items() if isinstance(seconds, float))
        print(f"{target}: seconds: {parts}", flush=True)
        del model
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="a small model")
    options = parser.parse_args()
    result = run(choose_device(options.device), options.blocks, options.samples, options.length, options.quick)
    print("figures: " + json.dumps({"random_llama": result}), flush=True)
    share = [sum(run_.get(p, 0.0) for p in ("statistics", "selection")) / run_["total"] for run_ in result["runs"]]
    totals = "/".join(f"{run_['total']:.1f}" for run_ in result["runs"])
    print(f"summary: 50 %/2:4 {totals} s, statistics and selection {max(share):.1%} at most")


if __name__ == "__main__":
    main()
