"""Where tensors lie, and how much memory a piece of work needs at its peak, beyond what is there before it."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

_CLEAR, _STATUS, _MAPS, _PAGES = (Path("/proc/self") / name for name in ("clear_refs", "status", "maps", "pagemap"))
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


def in_files(weights: Iterable[Tensor]) -> list[Tensor]:
    """Those that lie in a mapped file, as safetensors loads them: the first write to each page of it is a fault."""
    files = _mapped_files()
    cpu = (weight for weight in weights if weight.device.type == "cpu" and weight.is_contiguous())
    return [weight for weight in cpu if any(begin <= weight.data_ptr() < end for begin, end in files)]


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of a large tensor of the CPU in pages of 2 MiB, where Linux gives them to who asks (its ``madvise``, the
    default, or ``always``). Others are returned as they are, as on other systems.

    A decode step reads every weight once, from memory, and looks up each page's address. A bitmap of 11008 x 4096 at
    50 %, Zen 4, one and two threads: bfloat16 1.07 and 1.07 x as fast, int8 1.16 and 1.08 x, int4 1.09 and 1.16 x.
    """
    advice, size = getattr(mmap, "MADV_HUGEPAGE", None), 2 << 20
    if advice is None or type(tensor) not in (Tensor, Parameter) or tensor.device.type != "cpu":
        return tensor
    if tensor.nbytes < 2 * size:  # else there is a whole page in it, wherever it begins
        return tensor
    copy = torch.empty_like(tensor)
    first, last = -(-copy.data_ptr() // size) * size, (copy.data_ptr() + copy.nbytes) // size * size
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)  # before it is written
    return copy.copy_(tensor)


def take_from_files(weights: Iterable[Tensor]) -> None:
    """``weights`` of :func:`in_files` get memory of their own, one after the other.

    The pages of the file are given back, so that each weight is resident once. Where some were written since, they
    stay: somebody else may hold a tensor there.
    """
    page = mmap.PAGESIZE
    for weight in weights:
        first = -(-weight.data_ptr() // page) * page
        last = (weight.data_ptr() + weight.numel() * weight.element_size()) // page * page
        weight.data = weight.data.clone()
        if first < last and _are_as_in_file(first // page, (last - first) // page):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _are_as_in_file(first: int, count: int) -> bool:
    """Whether none of so many pages of a private mapping is the process's own; False where it cannot be told."""
    entry = 8  # bytes, of proc(5)'s pagemap: bit 63 says present, bit 61 of a file
    try:
        with _PAGES.open("rb") as file:
            file.seek(first * entry)
            flags = np.frombuffer(file.read(count * entry), dtype=np.uint64)
    except OSError:
        return False
    is_own = (flags >> np.uint64(63)) & ~(flags >> np.uint64(61)) & np.uint64(1)
    return len(flags) == count and not is_own.any()


def _mapped_files() -> list[tuple[int, int]]:
    """The addresses of private mappings of safetensors files; none where the system does not tell."""
    try:
        lines = _MAPS.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, flags, *_ = line.split(maxsplit=2)
        if line.endswith(".safetensors") and flags.endswith("p"):
            begin, end = addresses.split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


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
