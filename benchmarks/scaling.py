"""How cost grows as work grows, in steps of 2: rows and columns of a weight, tokens, samples, blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import operators
from benchmarks.harness import OURS, Case, Settings, measure, spread
from benchmarks.records import Row
from wanda_kernels import ops, prune, reference

SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip
LENGTH, SAMPLES, BLOCKS = 128, 4, 2  # of a whole run, where that is not what grows


def _doubling(first: int, last: int) -> list[int]:
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(2 * sizes[-1])
    return sizes


def steps(settings: Settings) -> list[tuple[str, Callable[[], list[Row]]]]:
    quick = settings.quick
    found: list[tuple[str, Callable[[], list[Row]]]] = []
    for rows in _doubling(64, 128 if quick else 4096):
        found.append(_measured(settings, _selection(settings, rows, 256 if quick else 4096, "rows", rows)))
    for cols in _doubling(256, 512 if quick else 16384):
        found.append(_measured(settings, _selection(settings, 64 if quick else 512, cols, "columns", cols)))
    for tokens in _doubling(64, 128 if quick else 4096):
        found.append(_measured(settings, _statistics(settings, tokens, 256 if quick else 4096)))
    for samples in _doubling(1, 2 if quick else 16):
        found.append((f"samples {samples}", partial(_run, settings, BLOCKS, samples, "samples", samples)))
    for blocks in _doubling(1, 2 if quick else 8):
        found.append((f"blocks {blocks}", partial(_run, settings, blocks, SAMPLES, "blocks", blocks)))
    return found


def _measured(settings: Settings, case: Case) -> tuple[str, Callable[[], list[Row]]]:
    return f"{case.part} {case.size}", partial(measure, case, settings)


def _selection(settings: Settings, rows: int, cols: int, part: str, size: int) -> Case:
    def run(inputs: tuple[Tensor, Tensor]) -> None:
        ops.prune_rows_(inputs[0], inputs[1], 0.5)

    check = operators.rows_are_equal(run, lambda weight, norm: reference.prune_rows_(weight, norm, 0.5))
    dtype = torch.bfloat16
    return Case(
        "scaling", "prune_rows_", f"{rows} x {cols}", dtype, operators.backend_of("prune_rows_", settings.device),
        partial(operators.weighted, rows, cols, dtype, settings), run, check, rows * cols * 4,
        threads=1 if settings.device.type == "cpu" else "", in_place=True, part=part, size=size,
    )  # fmt: skip


def _statistics(settings: Settings, tokens: int, cols: int) -> Case:
    case = next(operators.statistics_cases(settings, tokens, cols, torch.bfloat16))
    case.suite, case.peers, case.part, case.size = "scaling", {}, "tokens", tokens
    return case


def _run(settings: Settings, blocks: int, samples: int, part: str, size: int) -> list[Row]:
    """A whole pruning run of a small random LLaMA."""
    torch.manual_seed(0)
    length = 16 if settings.quick else LENGTH
    config = LlamaConfig(**SMALL, num_hidden_layers=blocks)
    ids = torch.randint(SMALL["vocab_size"], (samples, length)).to(settings.device)
    seconds = []
    for number in range(2 if settings.quick else 4):
        model = LlamaForCausalLM._from_config(config, dtype=torch.float32).eval().to(settings.device)
        start = time.perf_counter()
        report = prune(model, ids, sparsity=0.5, batch_size=1)
        if report.achieved_sparsity != 0.5:
            raise RuntimeError(f"a run of {blocks} blocks pruned {report.achieved_sparsity:.2%} of them, not half")
        if number > 0:
            seconds.append(time.perf_counter() - start)
    return [{
        "suite": "scaling", "operator": "prune", "shape": f"hidden {SMALL['hidden_size']}", "tokens": length,
        "dtype": "float32", "backend": operators.backend_of("prune_rows_", settings.device),
        "implementation": OURS, "part": part, "size": size, **spread(seconds), "check": "half of the weights are 0",
    }]  # fmt: skip
