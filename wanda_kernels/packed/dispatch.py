"""Which way a packed product goes: timed at the first use of a shape, remembered, and written down where asked.

``WANDA_KERNELS_DISPATCH=FILE`` reads choices from a JSON file and times nothing that is in it: fixed choices give the
same bits in every run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

WAYS = ("packed", "unpack", "semi_structured")
_ENVIRONMENT = "WANDA_KERNELS_DISPATCH"
_ROUNDS = 3

Key = tuple[str, torch.dtype, int, int, int, torch.device]

_choices: dict[str, str] = {}
_is_loaded = False


def direct_tokens(form: str, device: torch.device) -> int:
    """Rows of x that the operators multiply with the packed weight as it is; they unpack it for more."""
    return 32 if device.type == "cpu" or form.startswith("2:4") else 16


def name_of(key: Key) -> str:
    """``bitmap bfloat16 4096x11008 tokens 4 cpu 2``: tokens up to the next power of two, a CPU's threads."""
    form, dtype, rows, cols, tokens, device = key
    bucket = 1 << max(tokens - 1, 0).bit_length()
    where = f"cpu {torch.get_num_threads()}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"{form} {str(dtype).removeprefix('torch.')} {rows}x{cols} tokens {bucket} {where}"


def run(key: Key, candidates: Mapping[str, Callable[[], Tensor]]) -> Tensor:
    """The result of the candidate that is fastest for the key: ``packed``, or ``unpack`` and a dense product."""
    form, tokens, device = key[0], key[4], key[5]
    is_direct = tokens <= direct_tokens(form, device)
    unasked = "packed" if is_direct else "unpack"
    if tokens == 0 or torch.compiler.is_compiling():
        return candidates[unasked]()
    if device.type == "cuda" and not is_direct:  # launch after launch would read the weight as often
        candidates = {way: call for way, call in candidates.items() if way != "packed"}
    if len(candidates) == 1:
        return candidates[unasked]()
    name = name_of(key)
    chosen = choices().get(name)
    if chosen is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return candidates[unasked]()  # nothing can be timed now
        # Many tokens take long enough to be timed twice only.
        chosen = _choices[name] = _fastest(candidates, device, _ROUNDS if is_direct else 2)
    if chosen not in candidates:
        raise ValueError(f"dispatch ({_ENVIRONMENT}) has '{chosen}' for {name}, it must be {' or '.join(candidates)}")
    return candidates[chosen]()


def _fastest(candidates: Mapping[str, Callable[[], Tensor]], device: torch.device, rounds: int) -> str:
    seconds = dict.fromkeys(candidates, float("inf"))
    for _ in range(rounds):
        for name, candidate in candidates.items():
            _wait(device)
            start = time.perf_counter()
            candidate()
            _wait(device)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return min(seconds, key=lambda name: seconds[name])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    wrong = [name for name, way in found.items() if way not in WAYS] if isinstance(found, dict) else ["it is no object"]
    if wrong:
        ways = f"{', '.join(WAYS[:-1])} or {WAYS[-1]}"
        raise ValueError(f"dispatch file {path} ({_ENVIRONMENT}) must map shapes to {ways}: {str(wrong[0])[:200]}")
    _choices.update(found)


def save(path: str | Path) -> None:
    """Write all choices so far."""
    Path(path).write_text(json.dumps(dict(sorted(choices().items())), indent=2) + "\n")


def clear() -> None:
    """Forget all choices."""
    _choices.clear()
