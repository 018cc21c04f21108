"""Measures one case: its result is checked first, then all candidates run in turns on data that is not in the cache.

A red check raises, and no time is given. Inputs rotate through more memory than the last cache holds; what a candidate
has changed is put back after it was timed, a whole rotation before it is used again. A copy runs in every repetition.
"""

from __future__ import annotations

import copy
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.records import Row

OURS = "wanda_kernels"
Inputs = Any  # whatever a case's `make` returns
PROGRAM_TURNS = 5  # of seconds each
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


class WrongResultError(RuntimeError):
    """A candidate does not compute what it should: it gets no figure."""


@dataclass
class Settings:
    """How much is measured.

    Attributes:
        repeats: of each candidate at most; at least 3, unless quick.
        seconds: that one candidate of one case may take.
        cache_bytes: memory that inputs rotate through.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    repeats: int = 15
    seconds: float = 1.0
    cache_bytes: int = 256 << 20  # several times the last-level cache
    quick: bool = False


@dataclass
class Case:
    """One operator on one shape.

    Attributes:
        operator, shape, tokens, dtype, backend, threads: name the row.
        make: inputs on the device.
        run: ours; ``peers``: what it is compared with. Each takes the inputs.
        check: takes the inputs (its own copy) and says what it has found, or raises :class:`WrongResultError`.
        bytes: that must be moved.
        in_place: the first tensor of the inputs is changed and has to be put back.
        programs: peers that are programs of their own: each runs, and says how many seconds it took for one product.
    """

    suite: str
    operator: str
    shape: str
    dtype: torch.dtype
    backend: str
    make: Callable[[], Inputs]
    run: Callable[[Inputs], Any]
    check: Callable[[Inputs], str]
    bytes: int
    peers: dict[str, Callable[[Inputs], Any]] = field(default_factory=dict)
    tokens: int | str = ""
    threads: int | str = ""
    in_place: bool = False
    part: str = ""
    size: int | str = ""
    programs: dict[str, Callable[[], float]] = field(default_factory=dict)

    def __str__(self) -> str:
        tokens = f" x {self.tokens}" if self.tokens else ""
        return f"{self.operator} {str(self.dtype).removeprefix('torch.')} {self.shape}{tokens}"


def clone(inputs: Inputs) -> Inputs:
    """Tensors and modules are copied, alone or in tuples."""
    if isinstance(inputs, Tensor):
        return inputs.clone()
    if isinstance(inputs, tuple):
        return tuple(clone(part) for part in inputs)
    return copy.deepcopy(inputs) if isinstance(inputs, nn.Module) else inputs


def size_of(inputs: Inputs) -> int:
    if isinstance(inputs, Tensor):
        return inputs.nbytes
    parts = inputs.state_dict().values() if isinstance(inputs, nn.Module) else inputs
    return sum(size_of(part) for part in parts)


def keep_freed_memory() -> None:
    """glibc hands large blocks back to the system at once, and every new one is paid for page by page: operators that
    return new tensors would be timed with that (4 to 5 x memcpy for packing)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """On a GPU between two events, with the queue filled before: launches are not waited for."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(500_000)  # a quarter of a millisecond
    start_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1000


class _Copy:
    """Copies of the case's size, from and to memory that is not in the cache."""

    def __init__(self, case: Case, settings: Settings) -> None:
        self.bytes = min(max(case.bytes // 2, 1 << 12), 128 << 20)
        count = max(2, -(-settings.cache_bytes // self.bytes)) if not settings.quick else 2
        count = min(count, 1024)
        self._pool = [torch.ones(self.bytes, dtype=torch.uint8, device=settings.device) for _ in range(count)]
        self._device, self._step = settings.device, 0
        self._one_thread = settings.device.type == "cpu" and case.threads == 1

    def seconds(self) -> float:
        source, target = (self._pool[(self._step + i) % len(self._pool)] for i in range(2))
        self._step += 2
        if self._one_thread:  # torch's copy_ of one thread is slower than the C library's
            return seconds_of(lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), self.bytes), self._device)
        return seconds_of(lambda: target.copy_(source), self._device)


def measure(case: Case, settings: Settings) -> list[Row]:
    """A row for ours, and one for each peer."""
    if case.threads:
        torch.set_num_threads(int(case.threads))
    torch.manual_seed(0)
    source = case.make()
    found = case.check(clone(source))
    copies = max(2, -(-settings.cache_bytes // max(size_of(source), 1))) if not settings.quick else 2
    sets = [clone(source) for _ in range(min(copies, 1024))]
    candidates = {OURS: case.run, **case.peers}
    step = 0

    def once(run: Callable[[Inputs], Any]) -> float:
        nonlocal step
        inputs = sets[step % len(sets)]
        step += 1
        seconds = seconds_of(lambda: run(inputs), settings.device)
        if case.in_place:
            inputs[0].copy_(source[0])
        return seconds

    repeats = {}
    for name, run in candidates.items():
        warm = once(run)
        affordable = int(settings.seconds / max(warm, 1e-9))
        repeats[name] = settings.repeats if settings.quick else max(3, min(settings.repeats, affordable))
    copying = _Copy(case, settings)
    copying.seconds()
    copied: list[float] = []
    names = [*candidates, *case.programs]
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats[OURS]):
        copied.append(copying.seconds())
        for name, run in candidates.items():
            if number < repeats[name]:
                times[name].append(once(run))
        if number < PROGRAM_TURNS:
            for name, program in case.programs.items():
                times[name].append(program())
    return [_row(case, name, times, copied, copying.bytes, found) for name in names]


def _row(case: Case, name: str, times: dict[str, list[float]], copied: list[float], copy_bytes: int, found: str) -> Row:
    own = times[name]
    row: Row = {
        "suite": case.suite, "operator": case.operator, "shape": case.shape, "tokens": case.tokens,
        "dtype": str(case.dtype).removeprefix("torch."), "backend": case.backend, "threads": case.threads,
        "implementation": name, "part": case.part, "size": case.size, **spread(own), "bytes": case.bytes,
    }  # fmt: skip
    median = row["median_ms"] / 1e3
    per_byte = [2 * copy_bytes / seconds for seconds in copied]
    row["gb_per_s"] = case.bytes / median / 1e9
    row["copy_gb_per_s"] = statistics.median(per_byte) / 1e9
    row["copy_ratio"] = statistics.median(
        seconds / case.bytes * speed for seconds, speed in zip(own, per_byte, strict=False)
    )
    if name == OURS:
        row["check"] = found
    else:
        ours = zip(own, times[OURS], strict=False)
        row["ratio"], row["ratio_to"] = statistics.median(peer / mine for peer, mine in ours), OURS
    return row


def spread(seconds: Sequence[float]) -> Row:
    """Median, p20 and p80 in milliseconds, and of how many."""
    p20, median, p80 = (float(value) * 1e3 for value in np.percentile(seconds, (20, 50, 80)))
    return {"repeats": len(seconds), "median_ms": median, "p20_ms": p20, "p80_ms": p80}
