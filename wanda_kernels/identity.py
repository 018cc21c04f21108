"""What decides a run's result, as plain data that can be compared: of a run that is gone on with, and of processes that
share one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._version import __version__
from .models.checkpoint import bytes_of

CHUNK = 1 << 20
SHOWN = 3  # differences in an error
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def of_environment(device: torch.device) -> dict[str, str]:
    """Versions and what computes."""
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "wanda_kernels": __version__,
        "device": str(device.type),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "kernels": _backend.cpu_status if device.type == "cpu" else _backend.cuda_status,
    }


def of_tokens(input_ids: Tensor | None) -> dict[str, Any] | None:
    """Shape and hash of calibration sequences."""
    if input_ids is None:
        return None
    digest = hashlib.sha256(bytes_of(input_ids.cpu().contiguous())).hexdigest()
    return {"shape": list(input_ids.shape), "tokens": digest}


@torch.no_grad()
def of_weights(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Tensor -> dtype, shape and a checksum of all its elements, without those on the meta device, which have none."""
    return {
        name: f"{tensor.dtype} {list(tensor.shape)} {checksum(tensor)}"
        for name, tensor in tensors
        if not tensor.is_meta
    }


@torch.no_grad()
def checksum(tensor: Tensor) -> str:
    """Sums, modulo 2^64, of the elements' bits as integers, plain and times their place: at the speed of memory, on any
    device."""
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    places = torch.arange(1, min(CHUNK, max(1, bits.numel())) + 1, device=bits.device)
    plain = placed = 0
    for number, part in enumerate(bits.split(CHUNK)):
        wide = part.to(torch.int64)
        plain += int(wide.sum())
        placed += int((wide * places[: wide.numel()]).sum()) * (2 * number + 1)
    return f"{plain % 2**64:x}-{placed % 2**64:x}"


def of_file(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def in_words(found: list[str]) -> str:
    """The first few of what differs, and how many more there are."""
    return "; ".join(found[:SHOWN]) + (f", and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def differences(then: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where two trees of plain data differ: names, and both values."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [*then, *(key for key in now if key not in then)]
        return [d for key in keys for d in differences(then.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if then == now else [(name, then, now)]
