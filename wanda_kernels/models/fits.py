"""Whether a checkpoint's files and its config.json speak of the same model: looked at before anything is allocated.

A config.json that is wrong makes transformers build whatever it says: a million layers, or weights of terabytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .checkpoint import DTYPES, INDEX, SINGLE, Checkpoint, json_object
from .placement import targets

SHOWN = 4  # names in an error
SLACK = 2**24  # of 4 bytes, that a model may have beside its weights: positions, masks
# Numbers that transformers makes lists or modules of, before any shape is known.
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_labels")
_LABELS = 10**5
_NOT_NEGATIVE = ("sliding_window", "query_pre_attn_scalar")  # such a model loads, and cannot compute


def listed(names: Iterable[str]) -> str:
    """The first few of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_config(path: Path, checkpoint: Checkpoint | None) -> None:
    """Raises ValueError for a ``config.json`` that is none, or that counts more layers than its files hold tensors."""
    try:
        config = json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise OSError(f"{path} could not be read: {error.strerror or error}") from error
    quantised = config.get("quantization_config")
    if quantised is not None and not (
        isinstance(quantised, dict) and isinstance(quantised.get("quant_method", ""), str)
    ):
        raise ValueError(f"{path}: quantization_config must be an object with the name of its quant_method")
    if not isinstance(config.get("model_type", ""), str):
        raise ValueError(f"{path}: model_type must be a name")
    if config.get("transformers_weights") not in (None, SINGLE, INDEX):
        raise ValueError(f"{path} takes the weights from other files (transformers_weights): rename them instead")
    most = len(checkpoint.entries) if checkpoint is not None else _LABELS
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        for field in _NOT_NEGATIVE:
            value = section.get(field)
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{path}: {field} is {value}")
        if section.get("return_dict") is False:
            raise ValueError(f"{path}: return_dict is false, which the models of transformers do not compute with")
        for field in _COUNTS:
            value, limit = section.get(field), _LABELS if field == "num_labels" else most
            if isinstance(value, int | float) and value > limit:
                raise ValueError(f"{path}: {field} is {value}, the files hold {most} tensors")


def check_size(model: Any, checkpoint: Checkpoint, quantised: bool) -> None:
    """Raises ValueError where a model on the meta device is far larger than what the files hold."""
    elements = sum(tensor.numel() for tensor in model.parameters()) + sum(b.nbytes // 4 for b in model.buffers())
    held = 8 * checkpoint.size  # a quantised weight takes a bit at least
    if not quantised:
        held = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    if elements > 2 * held + SLACK:
        raise ValueError(
            f"model {checkpoint.folder} does not fit its config.json, which describes {elements} weights: its files "
            f"hold {checkpoint.size} bytes"
        )


def check_fits(model: Any, checkpoint: Checkpoint, packed: Iterable[str] | None = None) -> None:
    """Raises ValueError where a model cannot be what the files hold.

    Args:
        model: on the meta device.
        packed: its packed layers; None: nothing in it is quantised.
    """
    own, entries = model.state_dict(), checkpoint.entries
    placed = targets(model, checkpoint)
    check_size(model, checkpoint, packed is not None)
    for name, target in placed.items():
        there = target.name
        if there not in own:
            continue
        kind, tensor = DTYPES.get(entries[name].dtype), own[there]
        if kind is None or kind.is_floating_point != tensor.is_floating_point():
            raise ValueError(
                f"model {checkpoint.folder} does not fit its config.json: {name} is {entries[name].dtype} in its "
                f"files, {str(tensor.dtype).removeprefix('torch.')} in the model"
            )
        layer, _, leaf = there.rpartition(".")
        if packed is None or layer not in packed:
            continue
        shape = entries[name].shape
        if shape != tuple(tensor.shape) or (not kind.is_floating_point and kind != tensor.dtype):
            raise ValueError(
                f"packed layer {layer} does not fit its config.json: {leaf} is {entries[name].dtype} {list(shape)}, "
                f"it must be {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            )


def unplaced(model: Any, checkpoint: Checkpoint) -> list[str]:
    """The tensors of the files that the model has no place for, and that transformers would drop."""
    ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    ignored += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]  # of old checkpoints; made anew by transformers
    own = model.state_dict()
    return sorted(
        name
        for name, target in targets(model, checkpoint).items()
        if target.name not in own and not any(re.search(pattern, target.name) for pattern in ignored)
    )
