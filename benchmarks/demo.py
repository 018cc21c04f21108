"""Prunes SmolLM2-135M with Wanda and by magnitude, and prints one table: perplexity on other help texts than it was
calibrated on and on Python's source, sparsity, seconds.

python -m benchmarks.demo --out DIR saves both Wanda models there as Hugging Face folders, and the table as JSON.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import smollm2
from benchmarks.circumstances import write_result
from wanda_kernels import PruneSpec
from wanda_kernels.cli.display import note
from wanda_kernels.cli.session import Session

SAMPLES, LENGTH = 16, 512
PARTS = ("forward", "statistics", "selection", "saving")
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("magnitude 50 %", {"method": "magnitude", "sparsity": 0.5}),
    ("Wanda 50 %", {"method": "wanda", "sparsity": 0.5}),
    ("magnitude 2:4", {"method": "magnitude", "pattern": "2:4"}),
    ("Wanda 2:4", {"method": "wanda", "pattern": "2:4"}),
)


def run(out: Path, screen: Console) -> dict[str, Any]:
    dense = Session(str(smollm2.model_file()), "float32", "cpu")
    dense.begin()
    start = time.perf_counter()
    _ = dense.model  # loads it
    load_seconds = time.perf_counter() - start
    calibration, *texts = smollm2.windows(dense.tokenizer, SAMPLES, LENGTH)
    rows: list[dict[str, Any]] = [{"model": "dense", **_on(texts, dense), "sparsity": 0.0, "seconds": {}}]
    for label, arguments in RUNS:
        note(label)
        session = dense.copy()
        spec = PruneSpec(**arguments)
        report = session.prune(calibration, spec)
        seconds = dict(report.seconds)
        if spec.needs:
            folder = out / f"smollm2-wanda-{(report.pattern or '50').replace(':', '-')}"
            start = time.perf_counter()
            session.save(folder, overwrite=True)
            seconds["saving"] = time.perf_counter() - start
            screen.print(f"saved {folder}", highlight=False)
        figures = _on(texts, session)
        rows.append({"model": label, **figures, "sparsity": report.achieved_sparsity, "seconds": seconds})
    return {"samples": SAMPLES, "length": LENGTH, "load seconds": load_seconds, "rows": rows}


def _on(texts: list[Tensor], session: Session) -> dict[str, float]:
    """Perplexity on each text."""
    names = ("perplexity", "on source")
    return {name: session.perplexity(text, batch_size=2) for name, text in zip(names, texts, strict=True)}


def draw(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{smollm2.NAME}, float32, {SAMPLES} x {LENGTH} tokens (loading {result['load seconds']:.1f} s)",
        title_justify="left",
    )
    for heading in ("model", "perplexity", "on source", "sparsity", *(f"{part} s" for part in PARTS)):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in result["rows"]:
        seconds = [f"{row['seconds'][part]:.2f}" if part in row["seconds"] else "" for part in PARTS]
        figures = [f"{row[name]:.2f}" for name in ("perplexity", "on source")]
        table.add_row(row["model"], *figures, f"{row['sparsity']:.2%}", *seconds)
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
