"""Measures what a block and a sample cost on this CPU, and writes docs/scaling.md's tables.

python -m benchmarks.cost_model [--record] [--small]     measure; --small: tiny sizes, to see that it runs
python -m benchmarks.cost_model --write [--check]        the tables of docs/scaling.md, from result file and model
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import tables
from benchmarks.circumstances import RESULTS, ROOT, write_result
from benchmarks.streaming import RUNS
from wanda_kernels import prune
from wanda_kernels.cli.display import bar
from wanda_kernels.plan import H100, Rates, predict, shape_of

DOC = ROOT / "docs" / "scaling.md"
# (hidden, inner, blocks, samples, length): one thing at a time is doubled from the first; the last is held out.
CASES = [
    (1024, 2816, 4, 8, 512),
    (1024, 2816, 8, 8, 512),
    (1024, 2816, 4, 16, 512),
    (1024, 2816, 4, 4, 1024),
    (2048, 5632, 4, 8, 512),
    (1536, 4096, 6, 12, 512),
]
SMALL = [(64, 176, 2, 2, 32), (64, 176, 4, 2, 32), (128, 352, 2, 4, 32)]
LLAMA = {  # hidden, inner, blocks, heads, key-value heads, vocabulary, tied
    "LLaMA-2 7B": (4096, 11008, 32, 32, 32, 32000),
    "LLaMA-3 8B": (4096, 14336, 32, 32, 8, 128256),
    "LLaMA-2 13B": (5120, 13824, 40, 40, 40, 32000),
    "LLaMA-1 30B": (6656, 17920, 60, 52, 52, 32000),
    "LLaMA-1 65B": (8192, 22016, 80, 64, 64, 32000),
    "LLaMA-3 70B": (8192, 28672, 80, 64, 8, 128256),
    "LLaMA-3.1 405B": (16384, 53248, 126, 128, 8, 128256),
}
GPUS = (1, 2, 4, 8, 16, 32, 64)


def config_of(hidden: int, inner: int, blocks: int, heads: int, kv: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, dtype="bfloat16", max_position_embeddings=8192,
    )  # fmt: skip


def measure(cases: list[tuple[int, int, int, int, int]], rounds: int) -> list[dict[str, Any]]:
    rows = []
    with bar() as shown:
        task = shown.add_task("pruning", total=len(cases) * rounds)
        for hidden, inner, blocks, samples, length in cases:
            config = config_of(hidden, inner, blocks, hidden // 64, hidden // 64, 1024)
            found = []
            for _ in range(rounds):
                torch.manual_seed(0)
                model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
                begin = time.perf_counter()
                report = prune(model, torch.randint(0, 1024, (samples, length)))
                found.append(report.seconds | {"total": time.perf_counter() - begin})
                shown.advance(task)
            best = min(found, key=lambda seconds: seconds["total"])
            shape = shape_of(config)
            case = {"hidden": hidden, "inner": inner, "blocks": blocks, "samples": samples, "length": length}
            rows.append(case | {"seconds": best, "block_weights": shape.block_weights})
    return rows


def rates_of(rows: list[dict[str, Any]]) -> Rates:
    """From all cases but the last."""
    work, forward, pruned, selection = 0.0, 0.0, 0.0, 0.0
    for row in rows[:-1]:
        unit = predict_row(row, Rates(1.0, 1.0, 1.0, 1e30, 1e30, True, "units"))
        work += unit["forward"]
        pruned += unit["selection"]
        forward += row["seconds"]["forward"]
        selection += row["seconds"]["selection"]
    return Rates(work / forward, work / forward, pruned / selection, 1e30, 1e30, True, "measured here")


def predict_row(row: dict[str, Any], rates: Rates) -> dict[str, float]:
    heads = row["hidden"] // 64
    shape = shape_of(config_of(row["hidden"], row["inner"], row["blocks"], heads, heads, 1024))
    return predict(shape, rates, 1, row["samples"], row["length"], 2, 1024).seconds


def measured_table(result: dict[str, Any]) -> str:
    rates = rates_of(result["rows"])
    rows = []
    for number, row in enumerate(result["rows"]):
        seconds, predicted = row["seconds"], predict_row(row, rates)
        said = predicted["forward"] + predicted["selection"]
        took = seconds["forward"] + seconds["selection"]
        name = f"{row['hidden']} / {row['inner']}, {row['blocks']} blocks, {row['samples']} x {row['length']}"
        held = " (held out)" if number == len(result["rows"]) - 1 else ""
        forward_ms = 1e3 * seconds["forward"] / row["blocks"] / row["samples"]
        selection_ms = 1e3 * seconds["selection"] / row["blocks"]
        figures = [f"{forward_ms:.1f}", f"{selection_ms:.1f}", f"{took:.2f}", f"{said:.2f}", f"{said / took:.2f}"]
        rows.append([name + held, *figures])
    headings = [
        "hidden / inner, blocks, samples",
        "forward ms a block and sample",
        "selection ms a block",
        "s",
        "model s",
        "ratio",
    ]
    return (
        f"{tables.table(headings, rows)}\n\nRates: {rates.flops / 1e9:.1f} GFLOP/s forward, "
        f"{rates.selection / 1e9:.2f} GB/s selection. "
    )


def streamed_table(result: dict[str, Any]) -> str:
    rows = []
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        memory, stream = (next(r for r in result["rows"] if (r["method"], r["run"]) == (method, run)) for run in RUNS)
        figures = [f"{memory['seconds']:.0f}", f"{stream['seconds']:.0f}", f"{stream['ratio']:.2f}"]
        figures += [f"{row['peak_bytes'] / 1e9:.2f}" for row in (memory, stream)]
        rows.append([method, *figures, str(stream["differing"])])
    headings = ["method", "s in memory", "s streamed", "ratio", "peak GB in memory", "peak GB streamed"]
    about = f"{result['bytes'] / 1e9:.1f} GB of weights, {result['samples']} x {result['length']} tokens. "
    return f"{tables.table([*headings, 'tensors that differ'], rows)}\n\n{about}"


def recorded(name: str, table: Callable[[dict[str, Any]], str]) -> str:
    """The table of every machine that has a record of that name."""
    parts = []
    for path in sorted(RESULTS.glob(f"*/{name}.json")):
        result = json.loads(path.read_text())
        about = {"device_type": "cpu", "driver": "", **result["circumstances"]}
        parts.append(table(result) + tables.source(f"benchmarks/results/{path.parent.name}/{path.name}", about))
    return "\n\n".join(parts) or tables.NOT_MEASURED


def predicted_table() -> str:
    rows = []
    for name, sizes in LLAMA.items():
        shape = shape_of(config_of(*sizes))
        found = {gpus: predict(shape, H100, gpus) for gpus in GPUS}
        one = found[1]
        cells = [
            f"{shape.model_bytes / 1e9:.0f}",
            f"{one.bytes_in_memory / 1e9:.0f}",
            f"{one.bytes_streamed / 1e9:.0f}",
        ]
        cells += [f"{one.host_bytes_streamed / 1e9:.1f}", *(f"{found[gpus].total / 60:.1f}" for gpus in GPUS)]
        rows.append([name, *cells])
    headings = ["model", "GB", "GB in memory", "GB streamed", "host GB streamed"]
    return tables.table([*headings, *(f"min, {gpus} GPU" for gpus in GPUS)], rows)


def render(text: str) -> str:
    bodies = {
        "measured": recorded("cost_model", measured_table),
        "streamed": recorded("streaming", streamed_table),
        "streamed experts": recorded("streaming-experts", streamed_table),
    }
    for name, body in (bodies | {"predicted": predicted_table()}).items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{DOC.name} has no markers for {name}")
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write docs/scaling.md's tables")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where they are out of date")
    options = parser.parse_args()
    if options.write or options.check:
        before = DOC.read_text()
        after = render(before)
        if options.check and before != after:
            sys.exit(f"{DOC.name} is out of date: run python -m benchmarks.cost_model --write")
        if not options.check:
            DOC.write_text(after)
        return
    rows = measure(SMALL if options.small else CASES, options.rounds)
    rates = rates_of(rows)
    table = Table("case", "forward s", "selection s", "model forward s", "model selection s")
    for row in rows:
        said = predict_row(row, rates)
        seconds = row["seconds"]
        case = " ".join(str(row[key]) for key in ("hidden", "inner", "blocks", "samples", "length"))
        table.add_row(
            case, *(f"{x:.3f}" for x in (seconds["forward"], seconds["selection"], said["forward"], said["selection"]))
        )
    Console().print(table)
    if options.record:
        write_result("cost_model", {"rows": rows, "rates": dataclasses.asdict(rates)})


if __name__ == "__main__":
    main()
