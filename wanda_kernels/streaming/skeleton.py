"""A model without its weights, and their coming and going."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._words import need
from ..models.checkpoint import DTYPES, Checkpoint
from ..models.fits import unplaced
from ..models.load import auto_class, listed, load_config


def build(folder: Path, checkpoint: Checkpoint, dtype: str) -> Any:
    """The model of ``folder``: parameters on the meta device, the buffers that a checkpoint does not hold real.

    Raises:
        ImportError: without accelerate.
        ValueError: where transformers would do more than copy tensors by their names (other names or shapes, another
            dtype, quantised weights).
    """
    need("accelerate", "stream", "streaming needs the accelerate package")
    from accelerate import init_empty_weights

    config = load_config(str(folder))
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} holds quantised or packed weights: they cannot be streamed")
    wanted = _dtype(config, checkpoint, dtype)
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, dtype=wanted)
    model.tie_weights()
    for module in model.modules():
        if module._non_persistent_buffers_set:  # as from_pretrained: computed in float32, then rounded
            model._init_weights(module)
    _refuse_conversions(model, checkpoint, wanted)
    return model.eval()


def _dtype(config: Any, checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """What from_pretrained chooses by dtype="auto"."""
    own = config.dtype
    if own is None:
        kinds = (DTYPES.get(entry.dtype) for entry in checkpoint.entries.values())
        own = next((kind for kind in kinds if kind is not None and kind.is_floating_point), torch.float32)
    if dtype not in ("auto", str(own).removeprefix("torch.")):
        raise ValueError(f"streaming keeps the checkpoint's dtype, {str(own).removeprefix('torch.')}, got '{dtype}'")
    return own


def _refuse_conversions(model: Any, checkpoint: Checkpoint, wanted: torch.dtype) -> None:
    missing: list[str] = []
    for names in shared_names(model):
        found = [name for name in names if name in checkpoint.entries]
        if not found:
            missing.append(names[0])
        for name in found:
            entry, own = checkpoint.entries[name], tensor_of(model, name)
            if entry.shape != tuple(own.shape) or DTYPES.get(entry.dtype) != own.dtype:
                raise ValueError(
                    f"{name} is {entry.dtype} {list(entry.shape)} in the checkpoint and {own.dtype} "
                    f"{list(own.shape)} in the model: it cannot be streamed"
                )
    if missing:
        known = {name for names in shared_names(model) for name in names}
        other = [name for name in checkpoint.entries if name not in known]
        hint = (
            f"; it holds {listed(other)}, which the model does not know. Where transformers renames them while "
            "loading, the model can be pruned in memory, without streaming"
        )
        raise ValueError(f"{checkpoint.folder} has no tensor {listed(missing)}{hint if other else ''}")
    if left := unplaced(model, checkpoint):
        raise ValueError(
            f"{checkpoint.folder} holds tensors that its config.json has no place for: {listed(left)}. Correct "
            "config.json, or take them out of the files"
        )
    if wanted != torch.float32 and any(
        getattr(model, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    ):
        raise ValueError(f"{type(model).__name__} keeps some modules in float32: it cannot be streamed in {wanted}")


def shared_names(model: nn.Module) -> list[list[str]]:
    """The names of each tensor that a checkpoint holds: several where weights are tied."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def tensor_of(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """``tensor`` in the place of the parameter or buffer ``name``."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def drop(model: nn.Module, name: str) -> None:
    """Back to the meta device."""
    put(model, name, torch.empty_like(tensor_of(model, name), device="meta"))
