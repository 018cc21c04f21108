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
from ..models.placement import Placement
from ..pruning.blocks import Block, matrices_of


def build(folder: Path, checkpoint: Checkpoint, dtype: str) -> tuple[Any, Placement]:
    """The model of ``folder``, parameters on the meta device, the buffers that a checkpoint does not hold real; and
    where its tensors lie in the files.

    Raises:
        ImportError: without accelerate.
        ValueError: where files and model do not hold the same tensors, or the way from one to the other is more than
            moving elements (quantised weights).
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
    owner = {"": model}
    for name, module in model.named_modules():
        parent = owner[name.rpartition(".")[0]]
        owner[name] = module if hasattr(module, "_init_weights") else parent
        if module._non_persistent_buffers_set:  # as from_pretrained: computed in float32, then rounded
            owner[name]._init_weights(module)
    _keep_in_float32(model, wanted)
    placement = Placement(model, checkpoint)
    _refuse_missing(model, placement)
    return model.eval(), placement


def _keep_in_float32(model: Any, wanted: torch.dtype) -> None:
    """What from_pretrained loads in float32 into a model of 16 bits: routers, their biases."""
    from transformers.core_model_loading import build_glob_alternation

    kept = model._get_dtype_plan(wanted)
    pattern = build_glob_alternation(list(kept))[0] if kept else None
    for name, tensor in model.state_dict(keep_vars=True).items():
        if pattern is not None and pattern.search(name):
            tensor.data = tensor.data.float()


def _dtype(config: Any, checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """What from_pretrained chooses by dtype="auto"."""
    own = config.dtype
    if own is None:
        kinds = (DTYPES.get(entry.dtype) for entry in checkpoint.entries.values())
        own = next((kind for kind in kinds if kind is not None and kind.is_floating_point), torch.float32)
    if dtype not in ("auto", str(own).removeprefix("torch.")):
        raise ValueError(f"streaming keeps the checkpoint's dtype, {str(own).removeprefix('torch.')}, got '{dtype}'")
    return own


def _refuse_missing(model: Any, placement: Placement) -> None:
    folder = placement.checkpoint.folder
    groups = shared_names(model)
    missing = [names[0] for names in groups if not any(name in placement.parts for name in names)]
    if missing:
        other = f"; it holds {listed(placement.left)}, which the model does not know" if placement.left else ""
        raise ValueError(f"{folder} has no tensor {listed(missing)}{other}")
    if left := unplaced(model, placement.checkpoint):
        raise ValueError(
            f"{folder} holds tensors that its config.json has no place for: {listed(left)}. Correct config.json, or "
            "take them out of the files"
        )
    for name, parts in placement.parts.items():
        own = tensor_of(model, name).dtype
        for part in parts:
            kind = placement.dtype(part.file)
            if kind != own and not (kind is not None and kind.is_floating_point and own.is_floating_point):
                raise _other_dtype(placement, name, part.file, own)


def refuse_other_dtypes(blocks: list[Block], placement: Placement) -> None:
    """Raises ValueError where what is pruned has another dtype in the files than in the model. What is not pruned,
    routers and their biases above all, may have: it is copied as it is."""
    for full, matrix in matrices_of(blocks).items():
        name, own = matrix.name_of(full), matrix.stored.dtype
        for part in placement.parts[name]:
            if placement.dtype(part.file) != own:
                raise _other_dtype(placement, name, part.file, own)


def _other_dtype(placement: Placement, name: str, file: str, own: torch.dtype) -> ValueError:
    entry = placement.checkpoint.entries[file]
    return ValueError(
        f"{file} is {entry.dtype} {list(entry.shape)} in the checkpoint and {own} in the model ({name}): it cannot be "
        "streamed"
    )


def shared_names(model: nn.Module) -> list[list[str]]:
    """The names of each tensor that a checkpoint holds: several where weights are tied."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def outside_of(model: Any, blocks: list[Block]) -> tuple[list[list[str]], list[list[str]]]:
    """The names of the tensors that lie in no block: (of all but the output embedding's own, of those)."""
    head = model.get_output_embeddings()
    in_head = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    in_head |= {name.removesuffix("weight") + "bias" for name in in_head}
    prefixes = tuple(f"{block.name}." for block in blocks)
    outside = [names for names in shared_names(model) if not any(name.startswith(prefixes) for name in names)]
    return [g for g in outside if not in_head.issuperset(g)], [g for g in outside if in_head.issuperset(g)]


def read(model: nn.Module, names: list[str], placement: Placement) -> Tensor:
    """The tensor of all these names, from the files, on the CPU."""
    found = next(name for name in names if name in placement.parts)
    tensor = torch.empty_like(tensor_of(model, found), device="cpu")
    placement.read(found, tensor)
    return tensor


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
