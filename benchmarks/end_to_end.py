"""The whole pruning run against a plain reimplementation of the official loop, in turns, masks compared.

python -m benchmarks.end_to_end [--record] [--repeats 2]: SmolLM2-135M, float32, 16 x 512 tokens, 50 % and 2:4.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import smollm2
from benchmarks.circumstances import write_result
from benchmarks.official import OfficialRun
from wanda_kernels import prune
from wanda_kernels.cli.display import bar, quiet_libraries
from wanda_kernels.pruning import Pattern
from wanda_kernels.pruning.blocks import find_blocks

PARTS = ("forward", "statistics", "selection")


def parse_pattern(pattern: str | None) -> tuple[int, int] | None:
    if pattern is None:
        return None
    parsed = Pattern.parse(pattern)
    return parsed.n, parsed.m


# Options of prune() for each of our runs, by the flag that gives them. Fused statistics count as part of the forward
# passes: only --no-fuse shows what all of them cost.
OURS: dict[str, dict[str, Any]] = {
    "--propagate pruned": {},
    "--no-fuse": {"fuse_statistics": False},
    "--propagate dense": {"propagate": "dense"},
}


def run_ours(model: nn.Module, calibration: Tensor, pattern: str | None, options: dict[str, Any]) -> dict[str, float]:
    start = time.perf_counter()
    report = prune(model, calibration, sparsity=None if pattern else 0.5, pattern=pattern, **options)
    return {"total": time.perf_counter() - start} | report.seconds


def run_official(model: nn.Module, calibration: Tensor, pattern: str | None) -> dict[str, float]:
    official = OfficialRun()
    start = time.perf_counter()
    official.prune(model, calibration, 0.5, parse_pattern(pattern))
    return {"total": time.perf_counter() - start} | official.seconds


def differing_bits(left: nn.Module, right: nn.Module) -> int:
    """Weights that are zero in one model and not in the other."""
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return sum(int(((a == 0) != (b == 0)).sum()) for a, b in pairs)


def compare(dense: nn.Module, calibration: Tensor, pattern: str | None, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ("official", *OURS)}
    differing = 0
    with bar() as shown:
        task = shown.add_task(f"{pattern or '50 %'}", total=(2 + len(OURS)) * repeats)
        for _ in range(repeats):
            official = copy.deepcopy(dense)
            seconds["official"].append(run_official(official, calibration, pattern))
            shown.advance(task)
            if pattern is not None:  # once more, with equal scores decided as documented
                official = copy.deepcopy(dense)
                OfficialRun(stable=True).prune(official, calibration, 0.5, parse_pattern(pattern))
            shown.advance(task)
            for name, options in OURS.items():
                ours = copy.deepcopy(dense)
                seconds[name].append(run_ours(ours, calibration, pattern, options))
                if "propagate" not in options:
                    differing = max(differing, differing_bits(official, ours))
                shown.advance(task)
    medians = {
        name: {part: statistics.median(run[part] for run in runs) for part in ("total", *PARTS)}
        for name, runs in seconds.items()
    }
    return {"target": pattern or "50 %", "mask bits that differ": differing, "seconds": medians}


def draw(results: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{smollm2.NAME}, float32, 16 x 512 tokens, medians", title_justify="left")
    for heading in ("target", "run", "total s", *(f"{part} s" for part in PARTS), "stat. + sel.", "x official"):
        table.add_column(heading, justify="left" if heading in ("target", "run") else "right")
    for result in results:
        official = result["seconds"]["official"]["total"]
        for name, parts in result["seconds"].items():
            share = (parts["statistics"] + parts["selection"]) / parts["total"]
            label = "official loop" if name == "official" else f"wanda_kernels, {name}"
            cells = [f"{parts[part]:.2f}" for part in ("total", *PARTS)]
            table.add_row(result["target"], label, *cells, f"{share:.1%}", f"{official / parts['total']:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results")
    options = parser.parse_args()
    quiet_libraries()
    dense, tokenizer = smollm2.load(options.dtype)
    calibration, _ = smollm2.calibration_and_evaluation(tokenizer)
    results = [compare(dense, calibration, pattern, options.repeats) for pattern in (None, "2:4")]
    screen = Console()
    screen.width = max(screen.width, 110)  # not folded in a log
    screen.print(draw(results))
    weights = sum(linear.weight.numel() for block in find_blocks(dense) for linear in block.linears.values())
    for result in results:
        screen.print(f"{result['target']}: {result['mask bits that differ']} of {weights:,} mask bits differ")
    if options.record:
        name = "end_to_end" if options.dtype == "float32" else f"end_to_end_{options.dtype}"
        write_result(name, {"dtype": options.dtype, "repeats": options.repeats, "results": results})


if __name__ == "__main__":
    main()
