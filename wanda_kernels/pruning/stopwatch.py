"""Where the seconds go, by part; on a CUDA device by events, so that measuring waits for nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up seconds by part. A part measured inside another counts for itself alone."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._events = device is not None and device.type == "cuda"
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        outer = self._open[-1] if self._open else None
        self._open.append(part)
        start = self._now()
        try:
            yield
        finally:
            self._open.pop()
            end = self._now()
            if isinstance(start, float) and isinstance(end, float):
                self._add(part, outer, end - start)
            else:
                self._pending.append((part, outer, start, end))  # type: ignore[arg-type]

    def _now(self) -> float | torch.cuda.Event:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, part: str, outer: str | None, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds
        if outer is not None:
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds

    def seconds(self) -> dict[str, float]:
        """Part -> seconds so far. Waits for the device where parts ran there."""
        if self._pending:
            torch.cuda.synchronize()
            for part, outer, start, end in self._pending:
                self._add(part, outer, start.elapsed_time(end) / 1000)
            self._pending.clear()
        return dict(self._seconds)
