"""Which way a packed product goes: timed at the first use of a shape, remembered, and written down where asked.

``WANDA_KERNELS_DISPATCH=FILE`` reads choices from a JSON file and times nothing that is in it: fixed choices give the
same bits in every run.

While a CUDA graph is captured nothing can be timed: a choice that is known, or in the file, is taken, or else the
untimed default (:func:`unasked`), which the graph keeps and this module does not remember. A loop runs its step once
before (docs/deploy.md).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

WAYS = ("packed", "unpack", "semi_structured")
DENSE_WAYS = ("own", "torch")  # of a layer that stays dense: dense.py
_ENVIRONMENT = "WANDA_KERNELS_DISPATCH"
_ROUNDS = 3
DIRECT_TOKENS = 16  # of every form and device, see direct_tokens

# (form, dtype, C_out, C_in, bits of tokens - 1, device, threads): cheap to make and to look up in a forward pass.
Key = tuple[str, torch.dtype, int, int, int, torch.device, int]

_choices: dict[str, str] = {}
_known: dict[Key, str] = {}  # the same choices, without making a name
_is_loaded = False

known = _known.get


def direct_tokens(form: str, device: torch.device) -> int:
    """Rows of x that the operators multiply with the packed weight as it is; they unpack it for more."""
    return 32 if device.type == "cpu" or form.startswith("2:4") else DIRECT_TOKENS


def unasked(form: str, device: torch.device, tokens: int) -> str:
    """The way where nothing can be timed."""
    return "packed" if tokens <= direct_tokens(form, device) else "unpack"


def name_of(key: Key) -> str:
    """``bitmap bfloat16 4096x11008 tokens 4 cpu 2``: tokens up to the next power of two, a CPU's threads."""
    form, dtype, rows, cols, bits, device, threads = key
    where = f"cpu {threads}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"{form} {str(dtype).removeprefix('torch.')} {rows}x{cols} tokens {1 << bits} {where}"


def choose(key: Key, ways: Sequence[str], product: Callable[[str], Tensor]) -> str:
    """The fastest of ``ways`` for a key that is not :func:`known`: as was chosen before, or timed now.

    Args:
        ways: ``packed``, ``unpack`` (and a dense product), perhaps ``semi_structured``; or ``DENSE_WAYS``.
        product: what is timed, by way.
    """
    form, bits, device = key[0], key[4], key[5]
    default = unasked(form, device, 1 << bits)
    if device.type == "cuda" and default != "packed":  # launch after launch would read the weight as often
        ways = [way for way in ways if way != "packed"]
    if len(ways) == 1:
        return _known.setdefault(key, default)
    name = name_of(key)
    chosen = choices().get(name)
    if chosen is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return default  # nothing can be timed now
        # Many tokens take long enough to be timed twice only.
        chosen = _choices[name] = _fastest(ways, product, device, _ROUNDS if default == "packed" else 2)
    if chosen not in ways:
        raise ValueError(f"dispatch ({_ENVIRONMENT}) has '{chosen}' for {name}, it must be {' or '.join(ways)}")
    return _known.setdefault(key, chosen)


def _fastest(ways: Sequence[str], product: Callable[[str], Tensor], device: torch.device, rounds: int) -> str:
    turns = [way for _ in range(rounds) for way in ways]
    times = _on_gpu(turns, product, device) if device.type == "cuda" else _on_cpu(turns, product)
    return min(zip(times, turns, strict=True))[1]


def _on_cpu(turns: Sequence[str], product: Callable[[str], Tensor]) -> list[float]:
    """Seconds of each turn."""
    times = []
    for way in turns:
        start = time.perf_counter()
        product(way)
        times.append(time.perf_counter() - start)
    return times


def _on_gpu(turns: Sequence[str], product: Callable[[str], Tensor], device: torch.device) -> list[float]:
    """Milliseconds of each turn on the device, without the host's part, with a weight that comes from memory as it does
    in a model: what L2 held is overwritten before each turn. Meanwhile the host gets ahead."""
    with torch.cuda.device(device):
        for way in dict.fromkeys(turns):
            product(way)  # loads kernels, and lets cuBLAS choose
        flush = torch.empty(
            2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device
        )
        spans = []
        for way in turns:
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            product(way)
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in spans]


def choices() -> dict[str, str]:
    """Shape -> choice, of this process and of the file that ``WANDA_KERNELS_DISPATCH`` names."""
    global _is_loaded
    if not _is_loaded:
        _is_loaded = True
        if path := os.environ.get(_ENVIRONMENT):
            load(path)
    return _choices


def load(path: str | Path) -> None:
    """Add the choices of a file; they are not timed again."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"dispatch file {path} ({_ENVIRONMENT}) could not be read: {error}") from error
    ways = (*WAYS, *DENSE_WAYS)
    wrong = [name for name, way in found.items() if way not in ways] if isinstance(found, dict) else ["it is no object"]
    if wrong:
        required = f"{', '.join(ways[:-1])} or {ways[-1]}"
        raise ValueError(f"dispatch file {path} ({_ENVIRONMENT}) must map shapes to {required}: {str(wrong[0])[:200]}")
    _choices.update(found)
    _known.clear()


def save(path: str | Path) -> None:
    """Write all choices so far."""
    Path(path).write_text(json.dumps(dict(sorted(choices().items())), indent=2) + "\n")


def clear() -> None:
    """Forget all choices."""
    _choices.clear()
    _known.clear()
