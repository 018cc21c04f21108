"""Where the seconds go, by part; on a CUDA device by events, so that measuring waits for nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up seconds by part. A part measured inside another counts for itself alone."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = []
        self.follow(device)

    def follow(self, device: torch.device | None) -> None:
        """What is measured from here on runs on ``device``: a model's blocks may lie on several."""
        self._device = device if device is not None and device.type == "cuda" else None

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        outer = self._open[-1] if self._open else None
        self._open.append(part)
        device = self._device
        start = self._now(device)
        try:
            yield
        finally:
            self._open.pop()
            end = self._now(device)
            if isinstance(start, float) and isinstance(end, float):
                self._add(part, outer, end - start)
            else:
                self._pending.append((part, outer, start, end))  # type: ignore[arg-type]

    @staticmethod
    def _now(device: torch.device | None) -> float | torch.cuda.Event:
        if device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))  # the current device may be another
        return event

    def _add(self, part: str, outer: str | None, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds
        if outer is not None:
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds

    def seconds(self) -> dict[str, float]:
        """Part -> seconds so far. Waits for the devices where parts ran there."""
        for part, outer, start, end in self._pending:
            end.synchronize()
            self._add(part, outer, start.elapsed_time(end) / 1000)
        self._pending.clear()
        return dict(self._seconds)
