"""The CPU kernels against memcpy and against torch, side by side, single thread.

python -m benchmarks.cpu_kernels [--record] [--shapes 4096x4096] [--repeats 15]

Each kernel's result is checked against the PyTorch reference first; a red check gives no figure. Repetitions are
interleaved with memcpy of the same matrix; every repetition works on a fresh copy, which is not timed. The peers
(torch.sort + scatter, topk, kthvalue, numpy.partition, the official N:M loop) take minutes on the large shapes: they
and the kernel beside them run on the first 1,024 rows there. Memory that the process frees stays with it (mallopt), so
that packing, which returns new tensors, is timed and not the page faults of new memory (4 to 5 x memcpy with them).
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.circumstances import write_result
from wanda_kernels import _backend, ops, reference

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192))
CHECKED_ROWS = 64
PEER_ROWS = 1024
CACHE_BYTES = 256 << 20  # several times the last-level cache
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


@dataclass
class Row:
    """One measured kernel: milliseconds (median, p20, p80), and ratios to what ran beside it."""

    kernel: str
    dtype: str
    isa: str
    shape: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    gigabytes_per_second: float
    floor: str
    ratio_to_floor: float
    peers: dict[str, float]


@dataclass
class Kernel:
    """``run`` works on a fresh copy of the weight; ``check`` says whether its result is right."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    run: Callable[[Tensor, Tensor], Any]
    check: Callable[[Tensor, Tensor], bool]
    moved: Callable[[Tensor], float]  # bytes
    peers: dict[str, Callable[[Tensor, Tensor], Any]]
    floor: str = "memcpy"


def _sort_scatter(weight: Tensor, norm: Tensor) -> None:
    score = weight.abs() * norm  # float32, as in the official code
    order = torch.sort(score, dim=-1, stable=True)[1][:, : weight.shape[1] // 2]
    weight.scatter_(1, order, 0)


def _topk_scatter(weight: Tensor, norm: Tensor) -> None:
    score = weight.abs().float() * norm
    weight.scatter_(1, torch.topk(score, weight.shape[1] // 2, dim=-1, largest=False)[1], 0)


def _kthvalue(weight: Tensor, norm: Tensor) -> None:
    score = weight.abs().float() * norm
    weight.masked_fill_(score <= torch.kthvalue(score, weight.shape[1] // 2, dim=1, keepdim=True).values, 0)


def _partition(weight: Tensor, norm: Tensor) -> None:
    score = (weight.abs().float() * norm).numpy()
    k = weight.shape[1] // 2
    threshold = np.partition(score, k - 1, axis=1)[:, k - 1 : k]
    weight.masked_fill_(torch.from_numpy(score <= threshold), 0)


def _official_nm(n: int, m: int) -> Callable[[Tensor, Tensor], None]:
    def run(weight: Tensor, norm: Tensor) -> None:
        score = weight.abs() * norm
        mask = torch.zeros_like(score, dtype=torch.bool)
        for column in range(0, score.shape[1], m):
            lowest = torch.topk(score[:, column : column + m], m - n, dim=1, largest=False)[1]
            mask.scatter_(1, column + lowest, True)
        weight[mask] = 0

    return run


def _official_norm(x: Tensor, _norm: Tensor) -> Tensor:
    return torch.norm(x.t().float(), p=2, dim=1) ** 2


def _equal_after(run: Callable, expected: Callable) -> Callable[[Tensor, Tensor], bool]:
    def check(weight: Tensor, norm: Tensor) -> bool:
        left, right = weight.clone(), weight.clone()
        run(left, norm)
        expected(right, norm)
        return torch.equal(left, right)

    return check


def _nm(n: int, m: int) -> Kernel:
    def run(weight: Tensor, norm: Tensor) -> None:
        ops.prune_nm_(weight, norm, n, m)

    check = _equal_after(run, lambda w, norm: reference.prune_nm_(w, norm, n, m))
    peers = {"official loop": _official_nm(n, m)}
    return Kernel(f"{n}:{m}", (torch.bfloat16, torch.float32), run, check, lambda w: 2.0 * w.nbytes, peers)


def _sqnorm(x: Tensor, norm: Tensor) -> Tensor:
    sqnorm = torch.zeros_like(norm)
    ops.add_sqnorm_(sqnorm, x)
    return sqnorm


def _sqnorm_is_right(x: Tensor, norm: Tensor) -> bool:
    expected = torch.zeros_like(norm)
    reference.add_sqnorm_(expected, x)
    return torch.equal(_sqnorm(x, norm), expected)


def _packs_right(weight: Tensor, norm: Tensor) -> bool:
    pairs = zip(ops.prune_pack_24(weight, norm), reference.prune_pack_24(weight, norm), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _rows(weight: Tensor, norm: Tensor) -> None:
    ops.prune_rows_(weight, norm, 0.5)


BOTH = (torch.bfloat16, torch.float32)
KERNELS = (
    Kernel(
        "rows",
        BOTH,
        _rows,
        _equal_after(_rows, lambda w, norm: reference.prune_rows_(w, norm, 0.5)),
        lambda w: 2.0 * w.nbytes,
        {"sort + scatter": _sort_scatter, "topk": _topk_scatter, "kthvalue": _kthvalue, "np.partition": _partition},
    ),
    _nm(2, 4),
    _nm(4, 8),
    Kernel("2:4 + pack", (torch.bfloat16,), ops.prune_pack_24, _packs_right, lambda w: w.nbytes * 1.5625, {}),
    Kernel(
        "column sums",
        BOTH,
        _sqnorm,
        _sqnorm_is_right,
        lambda w: float(w.nbytes),
        {"official norm": _official_norm},
        floor="plain read",
    ),
)


def keep_freed_memory() -> None:
    """glibc hands large blocks back to the system at once, and every new one is paid for page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def memcpy(destination: Tensor, source: Tensor) -> None:
    ctypes.memmove(destination.data_ptr(), source.data_ptr(), source.nbytes)


def plain_read(weight: Tensor) -> None:
    """Reads every byte once: torch's vectorised sum, which one core does at the speed of its memory."""
    weight.view(torch.float32).sum()


def measure(kernel: Kernel, dtype: torch.dtype, isa: str, shape: tuple[int, int], repeats: int) -> Row:
    torch.manual_seed(0)
    source = torch.randn(shape).to(dtype)
    norm = torch.rand(shape[1]) + 0.2
    if not kernel.check(source[:CHECKED_ROWS], norm):
        raise RuntimeError(f"{kernel.name} {dtype} {isa} {shape}: the result is wrong, no figure is given")
    # Copies enough to push one another out of the cache; each is worked on long after it was written.
    copies = [source.clone() for _ in range(max(2, CACHE_BYTES // source.nbytes))]
    kernel.run(copies[0], norm)  # touches the memory of the results
    times: list[float] = []
    floors: list[float] = []
    for step in range(-len(copies), repeats):
        fresh, old = copies[step % len(copies)], copies[(step + 1) % len(copies)]
        copied = seconds_of(partial(memcpy, fresh, source))
        floor = (
            copied if kernel.floor == "memcpy" else seconds_of(partial(plain_read, copies[(step + 2) % len(copies)]))
        )
        time_taken = seconds_of(partial(kernel.run, old, norm))
        if step >= 0:
            floors.append(floor)
            times.append(time_taken)
    few = source[:PEER_ROWS]
    peers = {}
    if isa == "avx512":
        ours = statistics.median(seconds_of(partial(kernel.run, few.clone(), norm)) for _ in range(repeats))
        for name, peer in kernel.peers.items():
            peers[name] = statistics.median(seconds_of(partial(peer, few.clone(), norm)) for _ in range(3)) / ours
    p20, median, p80 = np.percentile(times, (20, 50, 80))
    return Row(
        kernel.name,
        str(dtype).removeprefix("torch."),
        isa,
        f"{shape[0]} x {shape[1]}",
        median * 1e3,
        p20 * 1e3,
        p80 * 1e3,
        kernel.moved(source) / median / 1e9,
        kernel.floor,
        statistics.median(time / floor for time, floor in zip(times, floors, strict=True)),
        peers,
    )


def draw(rows: list[Row]) -> Table:
    table = Table(title="CPU kernels, one thread: ratios to the floor measured between the repetitions")
    for heading in ("kernel", "dtype", "set", "shape", "ms", "p20-p80", "GB/s", "x floor"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        spread = f"{row.p20_ms:.2f}-{row.p80_ms:.2f}"
        ratio = f"{row.ratio_to_floor:.2f} {row.floor}"
        cells = (f"{row.median_ms:.2f}", spread, f"{row.gigabytes_per_second:.1f}", ratio)
        table.add_row(row.kernel, row.dtype, row.isa, row.shape, *cells)
    return table


def draw_peers(rows: list[Row]) -> Table:
    table = Table(title=f"times faster than, on the first {PEER_ROWS} rows")
    for heading in ("kernel", "dtype", "shape", "peers"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        if row.peers:
            peers = ", ".join(f"{name} {ratio:.0f}" for name, ratio in row.peers.items())
            table.add_row(row.kernel, row.dtype, row.shape, peers)
    return table


def parse_shape(text: str) -> tuple[int, int]:
    rows, cols = text.lower().split("x")
    return int(rows), int(cols)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=SHAPES, metavar="ROWSxCOLS")
    parser.add_argument("--kernels", nargs="+", choices=[k.name for k in KERNELS], default=[k.name for k in KERNELS])
    parser.add_argument("--sets", nargs="+", default=None, help="instruction sets [default: all but scalar]")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results")
    options = parser.parse_args()
    if _backend.extension is None:
        raise SystemExit(f"nothing to measure: {_backend.cpu_status}")
    torch.set_num_threads(1)
    keep_freed_memory()
    isas = options.sets or [isa for isa in reversed(_backend.extension.available_isas()) if isa != "scalar"]
    screen = Console()
    screen.width = max(screen.width, 110)  # not folded in a log
    rows = []
    for kernel in (k for k in KERNELS if k.name in options.kernels):
        for dtype in kernel.dtypes:
            for shape in options.shapes:
                for isa in isas:
                    _backend.extension.set_isa(isa)
                    with screen.status(f"{kernel.name} {dtype} {isa} {shape[0]} x {shape[1]}"):
                        rows.append(measure(kernel, dtype, isa, shape, options.repeats))
    screen.print(draw(rows))
    screen.print(draw_peers(rows))
    if options.record:
        write_result("cpu_kernels", {"threads": 1, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
