"""Peak memory and time of `prune --stream` against the run in memory, on a random LLaMA in bfloat16.

python -m benchmarks.streaming [--record] [--gb 6] [--methods magnitude,wanda] [--rounds 1] [--folder DIR]
python -m benchmarks.streaming --experts [--gb 8.5] ...     a random Mixtral of 32 experts, in blocks of 1 GB

The model is written shard by shard and is never whole in memory. Each run is a process of its own; its peak is the
kernel's high-water mark of resident memory. 8 x 512 tokens. The outputs are compared by a digest of each tensor, and
removed.
"""

from __future__ import annotations

import argparse
import hashlib
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
from transformers import LlamaConfig, MixtralConfig

from benchmarks.circumstances import ROOT, write_result
from wanda_kernels.cli.display import bar
from wanda_kernels.models.checkpoint import INDEX

WIDTH: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
    "vocab_size": 8192, "max_position_embeddings": 2048, "dtype": "bfloat16",
}  # fmt: skip
EXPERTS = WIDTH | {"intermediate_size": 2560, "num_local_experts": 32, "num_experts_per_tok": 2}
SAMPLES, LENGTH = 8, 512
TIME_BAR = 1.15
RUNS = ("memory", "stream")


def peak_bar(width: dict[str, Any], block_bytes: int) -> float:
    """Of a streamed run: 1.5 GB for the LLaMA; two blocks, the activations and 0.5 GB beyond the process itself for
    the Mixtral."""
    activations = SAMPLES * LENGTH * width["hidden_size"] * 2
    return 2 * block_bytes + activations + 0.5e9 if "num_local_experts" in width else 1.5e9


def block_shapes(layer: int, width: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """By the names that the hub's files have."""
    hidden, inner = width["hidden_size"], width["intermediate_size"]
    prefix = f"model.layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in ("q", "k", "v", "o")
    }
    norms: dict[str, tuple[int, ...]] = {
        f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")
    }
    if "num_local_experts" in width:
        moe = f"{prefix}.block_sparse_moe"
        shapes[f"{moe}.gate.weight"] = (width["num_local_experts"], hidden)
        for expert in range(width["num_local_experts"]):
            shapes |= {f"{moe}.experts.{expert}.{name}.weight": (inner, hidden) for name in ("w1", "w3")}
            shapes[f"{moe}.experts.{expert}.w2.weight"] = (hidden, inner)
        return shapes | norms
    shapes |= {f"{prefix}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
    return shapes | norms


def build(folder: Path, gigabytes: float, width: dict[str, Any]) -> tuple[int, int]:
    """Writes the model; returns its bytes, and those of a block."""
    outer: dict[str, tuple[int, ...]] = {
        name: (width["vocab_size"], width["hidden_size"]) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    outer["model.norm.weight"] = (width["hidden_size"],)
    block_bytes = 2 * sum(torch.Size(shape).numel() for shape in block_shapes(0, width).values())
    layers = max(2, round((gigabytes * 1e9 - 2 * 2 * outer_size(outer)) / block_bytes))
    config: Any = MixtralConfig if "num_local_experts" in width else LlamaConfig
    config(**width, num_hidden_layers=layers, tie_word_embeddings=False).save_pretrained(folder)
    shards = [outer]
    in_shard = max(1, round(400e6 / block_bytes))
    for first in range(0, layers, in_shard):
        inside = range(first, min(first + in_shard, layers))
        shards.append({name: shape for layer in inside for name, shape in block_shapes(layer, width).items()})
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
    return total, block_bytes


def outer_size(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def resident(field: str) -> int:
    """Of this process (Linux): VmRSS, or VmHWM, its high-water mark; bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def child(run: str, method: str, model: Path, out: Path) -> None:
    """One run in this process; prints its figures as JSON."""
    from wanda_kernels import prune
    from wanda_kernels.models import load_model, save_pretrained
    from wanda_kernels.streaming import stream_prune

    ids = torch.randint(0, WIDTH["vocab_size"], (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    before, begin = resident("VmRSS"), time.perf_counter()
    if run == "stream":
        report = stream_prune(model, out, ids, method=method, device="cpu")
    else:
        loaded = load_model(str(model), device="cpu")
        report = prune(loaded, ids, method=method)
        save_pretrained(out, loaded)
    seconds = time.perf_counter() - begin
    peak = resident("VmHWM")
    found = {"seconds": seconds, "peak_bytes": peak, "added_bytes": peak - before, "parts": report.seconds}
    print(json.dumps(found))


def measure(run: str, method: str, model: Path, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.streaming", "--child", run, method, str(model), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{run} {method} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1]) | {"digests": digests(out)}
    shutil.rmtree(out)
    return found


def digests(folder: Path) -> dict[str, str]:
    """Of each tensor in a folder's files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                content = file.get_tensor(name).contiguous().view(torch.uint8).numpy()
                found[name] = hashlib.sha256(content).hexdigest()
    return found


def draw_table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    for heading in (
        "method",
        "run",
        "seconds",
        "of memory's",
        "peak GB",
        "beyond the process GB",
        "tensors that differ",
    ):
        table.add_column(heading, justify="left" if heading in ("method", "run") else "right")
    for row in rows:
        table.add_row(
            row["method"], row["run"], f"{row['seconds']:.1f}", f"{row['ratio']:.2f}", f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['added_bytes'] / 1e9:.2f}", str(row["differing"]),
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results")
    parser.add_argument("--experts", action="store_true", help="a Mixtral instead of a LLaMA")
    parser.add_argument("--gb", type=float, help="of the model [default: 6, with --experts 8.4: 8 blocks]")
    parser.add_argument("--methods", default="magnitude,wanda")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the model and two outputs find room (default: temporary)")
    parser.add_argument("--child", nargs=4, metavar=("RUN", "METHOD", "MODEL", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run, method, model, out = options.child
        child(run, method, Path(model), Path(out))
        return
    width = EXPERTS if options.experts else WIDTH
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base = Path(folder)
        size, block_bytes = build(base / "model", options.gb or (8.4 if options.experts else 6.0), width)
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
                held = [one["digests"].items() for run in RUNS for one in found[run]]
                wrong = len(set().union(*held)) - len(held[0])
                seconds = {run: statistics.median(one["seconds"] for one in found[run]) for run in RUNS}
                rows += [
                    {
                        "method": method, "run": run, "seconds": seconds[run],
                        "ratio": seconds[run] / seconds["memory"],
                        "peak_bytes": max(one["peak_bytes"] for one in found[run]),
                        "added_bytes": max(one["added_bytes"] for one in found[run]),
                        "parts": found[run][-1]["parts"], "differing": wrong,
                    }
                    for run in RUNS
                ]  # fmt: skip
    if any(row["differing"] for row in rows):
        sys.exit("the outputs differ: no figures")
    screen = Console()
    name = "Mixtral" if options.experts else "LLaMA"
    screen.print(f"random {name}, {size / 1e9:.2f} GB in bfloat16, {SAMPLES} x {LENGTH} tokens")
    screen.print(draw_table(rows))
    for row in rows:
        if row["run"] == "stream":
            bar_bytes = peak_bar(width, block_bytes)
            measured = row["added_bytes" if options.experts else "peak_bytes"]
            most = None if options.experts else TIME_BAR  # experts' blocks are read for longer than they compute
            met = measured <= bar_bytes and (most is None or row["ratio"] <= most)
            bars = f"{bar_bytes / 1e9:.2f} GB" + ("" if most is None else f", {most} x")
            screen.print(f"{row['method']}: bars ({bars}) {'met' if met else 'not met'}", highlight=False)
    if options.record:
        result = {"config": width, "bytes": size, "samples": SAMPLES, "length": LENGTH, "rounds": options.rounds}
        write_result("streaming-experts" if options.experts else "streaming", result | {"rows": rows})


if __name__ == "__main__":
    main()
