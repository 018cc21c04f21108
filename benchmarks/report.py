"""Writes the README's tables from the result files, between markers; --check fails where they disagree.

python -m benchmarks.report [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.circumstances import RESULTS, ROOT
from benchmarks.end_to_end import OURS

README = ROOT / "README.md"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    rule = ["---" if number == 0 else "---:" for number in range(len(headings))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [headings, rule, *rows])


def _source(name: str, result: dict[str, Any]) -> str:
    found = result["circumstances"]
    return (
        f"`benchmarks/results/cpu/{name}.json`: {found['device']}, {found['cores']} cores, {found['kernels']}, "
        f"torch {found['torch']}, transformers {found['transformers']}, Python {found['python']}, {found['date']}."
    )


def demo(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        seconds = row["seconds"]
        parts = [f"{seconds[p]:.2f}" if p in seconds else "" for p in ("forward", "statistics", "selection", "saving")]
        rows.append([row["model"], f"{row['perplexity']:.2f}", f"{row['sparsity']:.2%}", *parts])
    headings = ["model", "perplexity", "sparsity", "forward s", "statistics s", "selection s", "saving s"]
    return _table(headings, rows)


def end_to_end(result: dict[str, Any]) -> str:
    rows = []
    for target in result["results"]:
        official = target["seconds"]["official"]
        for name in OURS:
            ours = target["seconds"][name]
            share = (ours["statistics"] + ours["selection"]) / ours["total"]
            differ = f"{target['mask bits that differ']}" if name != "--propagate dense" else "other statistics"
            cells = [f"{ours['total']:.1f}", f"{ours['forward']:.1f}", f"{share:.1%}"]
            cells += [f"{official['total']:.1f}", f"{official['forward']:.1f}"]
            rows.append(
                [
                    f"{target['target']}, `{name}`",
                    *cells,
                    f"{official['total'] / ours['total']:.2f} x",
                    differ,
                ]
            )
    headings = [
        "",
        "seconds",
        "forward s",
        "stat. + sel.",
        "official s",
        "forward s",
        "faster",
        "mask bits that differ",
    ]
    return _table(headings, rows)


def cpu_kernels(result: dict[str, Any]) -> str:
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["isa"] == "avx512":
            grouped.setdefault((row["kernel"], row["dtype"]), []).append(row)
    shapes = [row["shape"] for row in next(iter(grouped.values()))]
    rows = []
    for (kernel, dtype), measured in grouped.items():
        peers: dict[str, list[float]] = {}
        for row in measured:
            for name, ratio in row["peers"].items():
                peers.setdefault(name, []).append(ratio)
        faster = ", ".join(f"{name} {min(ratios):.0f}-{max(ratios):.0f}" for name, ratios in peers.items())
        ratios = [f"{row['ratio_to_floor']:.2f}" for row in measured]
        rows.append([f"{kernel}, {dtype}", *ratios, measured[0]["floor"], faster])
    return _table(["kernel", *shapes, "times that of", "times faster than"], rows)


def sparse_linear(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        seconds = row["seconds"]
        gemv = seconds.get("dense gemv")
        cells = [f"{row['threads']}", f"{row['batch']}", f"{seconds['torch'] * 1e3:.2f}"]
        for name in ("bitmap", "2:4"):
            cells += [f"{seconds[name] * 1e3:.2f}", f"{seconds['torch'] / seconds[name]:.2f} x"]
            cells.append(f"{gemv / seconds[name]:.2f} x" if gemv else "")
        rows.append([" x ".join(map(str, row["shape"])), *cells])
    headings = ["weight", "threads", "batch", "torch ms"]
    for name in ("bitmap", "2:4"):
        headings += [f"{name} ms", "faster than torch", "than our dense GEMV"]
    return _table(headings, rows)


def generate(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        cells = [f"{row['batch']}", f"{row['weight_bytes'] / 2**20:.0f}", f"{row['first_token_s']:.2f}"]
        cells += [f"{row['prefill_tokens_s']:.0f}", f"{row['decode_tokens_s']:.1f}", f"{row['decode_ratio']:.2f} x"]
        rows.append([row["model"], *cells])
    headings = ["model", "batch", "weights MiB", "first token s", "prefill tokens/s", "decode tokens/s", "of dense"]
    return _table(headings, rows)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "end_to_end": end_to_end,
    "generate": generate,
    "sparse_linear": sparse_linear,
    "cpu_kernels": cpu_kernels,
}


def render(text: str, results: Path = RESULTS / "cpu") -> str:
    """``text`` with each section between its markers replaced by what its result file says."""
    for name, section in SECTIONS.items():
        path = results / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            body = f"{section(result)}\n\n{_source(name, result)}"
        else:
            body = "not measured"
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{README.name} has no markers for {name}")
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the README is out of date")
    options = parser.parse_args()
    before = README.read_text()
    after = render(before)
    if options.check and before != after:
        sys.exit("README.md does not say what the result files say: run python -m benchmarks.report")
    if not options.check:
        README.write_text(after)


if __name__ == "__main__":
    main()
