"""Prunes SmolLM2-135M with Wanda and by magnitude, and prints one table: perplexity, sparsity, seconds.

python -m benchmarks.demo --out DIR saves both Wanda models there as Hugging Face folders, and the table as JSON.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import smollm2
from benchmarks.circumstances import write_result
from wanda_kernels import PruningReport, perplexity, prune
from wanda_kernels.cli.display import PruningDisplay, bar, quiet_libraries, working
from wanda_kernels.models import save_pretrained

SAMPLES, LENGTH = 16, 512
PARTS = ("forward", "statistics", "selection", "saving")
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("magnitude 50 %", {"method": "magnitude", "sparsity": 0.5}),
    ("Wanda 50 %", {"method": "wanda", "sparsity": 0.5}),
    ("magnitude 2:4", {"method": "magnitude", "pattern": "2:4"}),
    ("Wanda 2:4", {"method": "wanda", "pattern": "2:4"}),
)


def measure(model: nn.Module, windows: Tensor, label: str) -> float:
    with bar() as shown:
        task = shown.add_task(f"perplexity of {label}", total=len(windows))
        return perplexity(model, windows, LENGTH, 2, on_window=lambda done: shown.update(task, completed=done))


def prune_shown(model: nn.Module, calibration: Tensor, label: str, options: dict[str, Any]) -> PruningReport:
    with bar() as shown:
        shown.console.print(f"[bold]{label}[/bold]")
        return prune(model, calibration, progress=PruningDisplay(shown), **options)


def run(out: Path, screen: Console) -> dict[str, Any]:
    quiet_libraries()
    with working(f"loading {smollm2.NAME}"):
        start = time.perf_counter()
        dense, tokenizer = smollm2.load()
        load_seconds = time.perf_counter() - start
        calibration, evaluation = smollm2.calibration_and_evaluation(tokenizer, SAMPLES, LENGTH)
    rows: list[dict[str, Any]] = [
        {"model": "dense", "perplexity": measure(dense, evaluation, "dense"), "sparsity": 0.0, "seconds": {}}
    ]
    for label, options in RUNS:
        model = copy.deepcopy(dense)
        report = prune_shown(model, calibration, label, options)
        seconds = dict(report.seconds)
        if options["method"] == "wanda":
            folder = out / f"smollm2-wanda-{(report.pattern or '50').replace(':', '-')}"
            with working(f"saving to {folder}"):
                start = time.perf_counter()
                save_pretrained(folder, model, tokenizer, overwrite=True)
                seconds["saving"] = time.perf_counter() - start
            screen.print(f"saved {folder}", highlight=False)
        value = measure(model, evaluation, label)
        rows.append({"model": label, "perplexity": value, "sparsity": report.achieved_sparsity, "seconds": seconds})
    return {"samples": SAMPLES, "length": LENGTH, "load seconds": load_seconds, "rows": rows}


def draw(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{smollm2.NAME}, float32, {SAMPLES} x {LENGTH} tokens (loading {result['load seconds']:.1f} s)",
        title_justify="left",
    )
    for heading in ("model", "perplexity", "sparsity", *(f"{part} s" for part in PARTS)):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in result["rows"]:
        seconds = [f"{row['seconds'][part]:.2f}" if part in row["seconds"] else "" for part in PARTS]
        table.add_row(row["model"], f"{row['perplexity']:.2f}", f"{row['sparsity']:.2%}", *seconds)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for models and table")
    parser.add_argument("--record", action="store_true", help="also write the table to benchmarks/results")
    options = parser.parse_args()
    screen = Console()
    screen.width = max(screen.width, 110)  # not folded in a log
    result = run(options.out, screen)
    screen.print(draw(result))
    write_result("demo", result, options.out)
    if options.record:
        write_result("demo", result)


if __name__ == "__main__":
    main()
