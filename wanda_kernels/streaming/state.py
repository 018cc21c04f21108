"""What a run's state says beside the blocks that are done: what it began with, and its plans."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._version import __version__
from ..models.checkpoint import Checkpoint, bytes_of

SHOWN = 3  # differences in an error


def identity(
    options: dict[str, Any], input_ids: Tensor | None, checkpoint: Checkpoint, device: torch.device
) -> dict[str, Any]:
    """All that decides a run's result."""
    config = (checkpoint.folder / "config.json").read_bytes()
    data: dict[str, Any] = {"option": options, "calibration": None}
    if input_ids is not None:
        digest = hashlib.sha256(bytes_of(input_ids.cpu().contiguous())).hexdigest()
        data["calibration"] = {"shape": list(input_ids.shape), "tokens": digest}
    data["model"] = {"config.json": hashlib.sha256(config).hexdigest(), "tensor": checkpoint.fingerprints()}
    data["environment"] = {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "wanda_kernels": __version__,
        "device": str(device.type),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "kernels": _backend.cpu_status if device.type == "cpu" else _backend.cuda_status,
    }
    return data


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two trees of plain data, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [*then, *(key for key in now if key not in then)]
        return [d for key in keys for d in differences(then.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if then == now else [f"{name} was {then}, now it is {now}"]


def refuse_other_run(then: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Raises ValueError where a state is another run's, and says in what it differs."""
    found = differences(then, now)
    if found:
        more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(
            f"the unfinished run to {out} was another one: {'; '.join(found[:SHOWN])}{more}. Give what it began with, "
            "or --overwrite without --resume to start anew"
        )
