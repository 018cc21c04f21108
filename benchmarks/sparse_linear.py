"""Products with packed weights against dense ones, on the CPU, at LLaMA's shapes, in turns in one run.

    python -m benchmarks.sparse_linear [--record] [--models 7B,65B] [--threads 1,2] [--repeats 15]

Peers: torch's bf16 linear, and the best dense matrix-vector product that we can write (dense_gemv.cpp; batch 1).
Weights rotate through more memory than the caches hold. The packed product's result is checked first.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.circumstances import write_result
from wanda_kernels import _backend, ops
from wanda_kernels.cli.display import bar
from wanda_kernels.packed import pack_bitmap, pack_sparse24

SHAPES = {
    "7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "65B": ((8192, 8192), (22016, 8192), (8192, 22016)),
}
BATCHES = (1, 4, 16)
ROTATE_BYTES = 128 << 20


def build_dense_gemv() -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """The peer, or None where this machine cannot build or run it."""
    if not _backend.extension or not _backend.extension.cpu_features().get("avx512bf16") or not shutil.which("g++"):
        return None
    source = Path(__file__).parent / "dense_gemv.cpp"
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "dense_gemv.so"
        command = ["g++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(str(library)).dense_gemv

    def run(weight: Tensor, x: Tensor, y: Tensor) -> None:
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x, y))
        sizes = (ctypes.c_int64(weight.shape[0]), ctypes.c_int64(weight.shape[1]))
        function(*pointers, *sizes, torch.get_num_threads())

    return run


def measure(shape: tuple[int, int], batch: int, repeats: int, gemv: Any) -> dict[str, float]:
    """Median seconds of each peer."""
    rows, cols = shape
    copies = max(2, -(-ROTATE_BYTES // (rows * cols * 2)))
    generator = torch.Generator().manual_seed(0)
    weights = []
    for _ in range(copies):
        weight = torch.randn(rows, cols, generator=generator).to(torch.bfloat16)
        ops.prune_nm_(weight, torch.ones(cols), 2, 4)
        weights.append((weight, pack_bitmap(weight), pack_sparse24(weight)))
    x = torch.randn(batch, cols, generator=generator).to(torch.bfloat16)
    y = torch.empty(rows)
    candidates: dict[str, Callable[[Any], Any]] = {
        "torch": lambda w: torch.nn.functional.linear(x, w[0]),
        "bitmap": lambda w: ops.bitmap_linear(x, *w[1]),
        "2:4": lambda w: ops.sparse24_linear(x, *w[2]),
    }
    exact = x.float() @ weights[0][0].float().T
    for name in ("bitmap", "2:4"):
        error = (candidates[name](weights[0]).float() - exact).abs().max() / exact.abs().max()
        assert error < 1e-2, f"{name} is wrong: relative error {error}"
    if gemv is not None and batch == 1:
        candidates["dense gemv"] = lambda w: gemv(w[0], x, y)
        gemv(weights[0][0], x, y)
        assert torch.allclose(y, exact[0], rtol=1e-2, atol=1e-1), "the dense peer is wrong"
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(repeats + 1):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate(weights[number % copies])
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def draw(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="bf16, 50 % (2:4), ms; x: times faster than torch / than the dense gemv", title_justify="left")
    for heading in ("shape", "threads", "batch", "torch", "dense gemv", "bitmap", "x", "2:4", "x"):
        table.add_column(heading, justify="right")
    for row in rows:
        seconds = row["seconds"]
        gemv = seconds.get("dense gemv")
        cells = [f"{seconds['torch'] * 1e3:.2f}", f"{gemv * 1e3:.2f}" if gemv else "-"]
        for name in ("bitmap", "2:4"):
            ratio = f"{seconds['torch'] / seconds[name]:.2f}" + (f" / {gemv / seconds[name]:.2f}" if gemv else "")
            cells += [f"{seconds[name] * 1e3:.2f}", ratio]
        table.add_row(" x ".join(map(str, row["shape"])), str(row["threads"]), str(row["batch"]), *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results")
    parser.add_argument("--models", default="7B", help="of 7B, 65B")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    gemv = build_dense_gemv()
    shapes = [shape for model in options.models.split(",") for shape in SHAPES[model]]
    threads = [int(count) for count in options.threads.split(",")]
    rows = []
    with bar() as shown:
        task = shown.add_task("products", total=len(shapes) * len(threads) * len(BATCHES))
        for shape in shapes:
            for count in threads:
                torch.set_num_threads(count)
                for batch in BATCHES:
                    seconds = measure(shape, batch, options.repeats, gemv)
                    rows.append({"shape": list(shape), "threads": count, "batch": batch, "seconds": seconds})
                    shown.advance(task)
    screen = Console()
    screen.width = max(screen.width, 110)
    screen.print(draw(rows))
    if options.record:
        write_result("sparse_linear", {"dtype": "bfloat16", "repeats": options.repeats, "rows": rows})


if __name__ == "__main__":
    main()
