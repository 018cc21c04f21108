"""What decides a run's result, as plain data that can be compared: of a run that is gone on with, and of processes that
share one."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _backend
from ._version import __version__
from .models.checkpoint import SAMPLE, bytes_of

CHUNK = 1 << 20


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
def of_weights(model: nn.Module) -> dict[str, str]:
    """Tensor -> dtype, shape and a hash of its first, middle and last bytes: enough to tell one training run's weights
    from another's without reading the model."""
    found = {}
    for name, tensor in model.state_dict().items():
        flat = tensor.reshape(-1)
        count = max(1, SAMPLE // tensor.element_size())
        digest = hashlib.sha256()
        for begin in (0, max(0, flat.numel() // 2 - count // 2), max(0, flat.numel() - count)):
            digest.update(bytes_of(flat[begin : begin + count].cpu().contiguous()))
        found[name] = f"{tensor.dtype} {list(tensor.shape)} {digest.hexdigest()[:16]}"
    return found


def of_file(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()[:32]


def differences(then: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where two trees of plain data differ: names, and both values."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [*then, *(key for key in now if key not in then)]
        return [d for key in keys for d in differences(then.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if then == now else [(name, then, now)]
