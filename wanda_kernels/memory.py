"""How much memory a piece of work needs at its peak, beyond what is there before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): the peak resident set begins again at what is resident now


def added_peak(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that ``work`` has at its peak beyond those before it.

    CUDA: what torch allocates. CPU: the process's resident set (VmHWM of Linux, to about a megabyte), after memory that
    was freed before has been given back to the system (glibc's malloc_trim). What a library keeps between calls does
    not count; what other threads of the process touch meanwhile does.

    Returns:
        None where it cannot be told: another system than Linux, or one that does not let a process reset its peak.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    give_back_freed()
    before_or_none = _reset_peak()
    work()
    peak = _status("VmHWM")
    return None if before_or_none is None or peak is None else max(peak - before_or_none, 0)


def give_back_freed() -> None:
    """Freed memory that glibc keeps goes back to the system; nothing happens with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> int | None:
    """What is resident now, or None where the peak cannot be reset."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith(f"{field}:")]
    return int(found[0][1]) * 1024 if found else None
