"""Peak memory and time of `prune --stream` against the run in memory, on a random LLaMA in bfloat16.

python -m benchmarks.streaming [--record] [--gb 6] [--methods magnitude,wanda] [--rounds 1] [--folder DIR]

The model is written shard by shard and is never whole in memory. Each run is a process of its own; its peak is the
kernel's high-water mark of resident memory. 8 x 512 tokens. The outputs are compared tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.circumstances import ROOT, write_result
from wanda_kernels.cli.display import bar
from wanda_kernels.models.checkpoint import INDEX

WIDTH: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
    "vocab_size": 8192, "max_position_embeddings": 2048, "dtype": "bfloat16",
}  # fmt: skip
SHARD_BLOCKS = 4
SAMPLES, LENGTH = 8, 512
PEAK_BAR, TIME_BAR = 1.5e9, 1.15
RUNS = ("memory", "stream")


def block_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = WIDTH["hidden_size"], WIDTH["intermediate_size"]
    prefix = f"model.layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in ("q", "k", "v", "o")
    }
    shapes |= {f"{prefix}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
    return shapes | {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}


def build(folder: Path, gigabytes: float) -> int:
    """Writes the model; returns its bytes."""
    outer: dict[str, tuple[int, ...]] = {
        name: (WIDTH["vocab_size"], WIDTH["hidden_size"]) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    outer["model.norm.weight"] = (WIDTH["hidden_size"],)
    block_bytes = 2 * sum(torch.Size(shape).numel() for shape in block_shapes(0).values())
    layers = max(2, round((gigabytes * 1e9 - 2 * 2 * outer_size(outer)) / block_bytes))
    LlamaConfig(**WIDTH, num_hidden_layers=layers, tie_word_embeddings=False).save_pretrained(folder)
    shards = [outer]
    for first in range(0, layers, SHARD_BLOCKS):
        inside = range(first, min(first + SHARD_BLOCKS, layers))
        shards.append({name: shape for layer in inside for name, shape in block_shapes(layer).items()})
    draw = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    with bar() as shown:
        for number, shapes in enumerate(shown.track(shards, description="building the model"), 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {
                key: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1
                else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)
                for key, shape in shapes.items()
            }  # fmt: skip
            save_file(tensors, folder / name, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    return total


def outer_size(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def peak_bytes() -> int:
    """High-water mark of this process's resident memory (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def child(run: str, method: str, model: Path, out: Path) -> None:
    """One run in this process; prints its figures as JSON."""
    from wanda_kernels import prune
    from wanda_kernels.models import load_model, save_pretrained
    from wanda_kernels.streaming import stream_prune

    ids = torch.randint(0, WIDTH["vocab_size"], (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    if run == "stream":
        report = stream_prune(model, out, ids, method=method, device="cpu")
    else:
        loaded = load_model(str(model), device="cpu")
        report = prune(loaded, ids, method=method)
        save_pretrained(out, loaded)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), "parts": report.seconds}))


def measure(run: str, method: str, model: Path, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.streaming", "--child", run, method, str(model), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{run} {method} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def differing(left: Path, right: Path) -> int:
    """Tensors that are not equal, or not in both."""
    places = []
    for folder in (left, right):
        index = folder / INDEX
        if index.exists():
            places.append(json.loads(index.read_text())["weight_map"])
        else:
            with safe_open(folder / "model.safetensors", "pt") as file:
                places.append(dict.fromkeys(file.keys(), "model.safetensors"))
    names = places[0].keys() | places[1].keys()
    return sum(
        name not in places[0]
        or name not in places[1]
        or not torch.equal(_tensor(left, places[0], name), _tensor(right, places[1], name))
        for name in names
    )


def _tensor(folder: Path, places: dict[str, str], name: str) -> torch.Tensor:
    with safe_open(folder / places[name], "pt") as file:
        return file.get_tensor(name)


def draw_table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    for heading in ("method", "run", "seconds", "of memory's", "peak GB", "tensors that differ"):
        table.add_column(heading, justify="left" if heading in ("method", "run") else "right")
    for row in rows:
        table.add_row(
            row["method"], row["run"], f"{row['seconds']:.1f}", f"{row['ratio']:.2f}", f"{row['peak_bytes'] / 1e9:.2f}",
            str(row["differing"]),
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results")
    parser.add_argument("--gb", type=float, default=6.0)
    parser.add_argument("--methods", default="magnitude,wanda")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the model and two outputs find room (default: temporary)")
    parser.add_argument("--child", nargs=4, metavar=("RUN", "METHOD", "MODEL", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run, method, model, out = options.child
        child(run, method, Path(model), Path(out))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base = Path(folder)
        size = build(base / "model", options.gb)
        rows = []
        methods = options.methods.split(",")
        with bar() as shown:
            task = shown.add_task("pruning", total=len(methods) * options.rounds * len(RUNS))
            for method in methods:
                found: dict[str, list[dict[str, Any]]] = {run: [] for run in RUNS}
                for _ in range(options.rounds):
                    for run in RUNS:  # in turns
                        found[run].append(measure(run, method, base / "model", base / run))
                        shown.advance(task)
                wrong = differing(base / "memory", base / "stream")
                seconds = {run: statistics.median(one["seconds"] for one in found[run]) for run in RUNS}
                rows += [
                    {
                        "method": method, "run": run, "seconds": seconds[run],
                        "ratio": seconds[run] / seconds["memory"],
                        "peak_bytes": max(one["peak_bytes"] for one in found[run]),
                        "parts": found[run][-1]["parts"], "differing": wrong,
                    }
                    for run in RUNS
                ]  # fmt: skip
    if any(row["differing"] for row in rows):
        sys.exit("the outputs differ: no figures")
    screen = Console()
    screen.print(f"random LLaMA, {size / 1e9:.2f} GB in bfloat16, {SAMPLES} x {LENGTH} tokens")
    screen.print(draw_table(rows))
    for row in rows:
        if row["run"] == "stream":
            met = row["peak_bytes"] <= PEAK_BAR and row["ratio"] <= TIME_BAR
            screen.print(f"{row['method']}: bars (1.5 GB, 1.15 x) {'met' if met else 'not met'}", highlight=False)
    if options.record:
        result = {"config": WIDTH, "bytes": size, "samples": SAMPLES, "length": LENGTH, "rounds": options.rounds}
        write_result("streaming", result | {"rows": rows})


if __name__ == "__main__":
    main()
