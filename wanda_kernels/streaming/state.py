"""What a streamed run began with, which what goes on with it must be the same as; and its report on the layers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..identity import differences, in_words, of_environment, of_tokens
from ..models.checkpoint import Checkpoint
from ..pruning.report import LayerReport
from ..pruning.source import Done


def identity(
    spec: dict[str, Any], input_ids: Tensor | None, checkpoint: Checkpoint, device: torch.device
) -> dict[str, Any]:
    """All that decides a run's result."""
    config = (checkpoint.folder / "config.json").read_bytes()
    return {
        "option": spec,
        "calibration": of_tokens(input_ids),
        "model": {"config.json": hashlib.sha256(config).hexdigest(), "tensor": checkpoint.fingerprints()},
        "environment": of_environment(device),
    }


def refuse_other_run(then: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Raises ValueError where a state is another run's, and says in what it differs."""
    found = [f"{name} was {before}, now it is {after}" for name, before, after in differences(then, now)]
    if found:
        raise ValueError(
            f"the unfinished run to {out} was another one: {in_words(found)}. Give what it began with, "
            "or overwrite=True without resume=True to start anew"
        )


NUMBERS = ("sparsity", "seconds", "estimated_error")
OPTIONAL_NUMBERS = ("exact_error", "threshold", "damping")
NOT_FINITE = ("nan", "inf", "-inf")  # as strict JSON has them


def done_of(state: dict[str, Any]) -> Done:
    """What a run has done. Raises ValueError, KeyError or TypeError where the report on it is none: found out now, not
    where it is printed after all the work."""
    shares = state["sparsities"]
    if shares is not None and not all(type(share) in (int, float) and 0 <= share < 1 for share in shares):
        raise ValueError(f"its sparsities are {str(shares)[:100]}")
    return Done(state["done"], [_layer(data) for data in state["layers"]], shares)


def _layer(data: dict[str, Any]) -> LayerReport:
    numbers = {name: data[name] for name in NUMBERS}
    numbers |= {name: data[name] for name in OPTIONAL_NUMBERS if data[name] is not None}
    numbers |= {name: float(number) for name, number in numbers.items() if number in NOT_FINITE}
    words = [data[name] for name in ("input_of", "statistics") if data[name] is not None]
    if any(type(n) not in (int, float) for n in numbers.values()) or any(type(word) is not str for word in words):
        raise ValueError(f"its report on {data['name']} is {str(data)[:200]}")
    return LayerReport(**data | numbers | {"shape": tuple(data["shape"])})
