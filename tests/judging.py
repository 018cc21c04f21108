"""An independent reading of a model folder, and whether a loaded model holds exactly what it says."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
import torch
from strategies import same_bits
from torch import Tensor

from wanda_kernels.packed.weight import PackedWeight

KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PADDING = 32
# Tensors of old checkpoints that transformers makes itself now, and drops (_adjust_missing_and_unexpected_keys).
MADE_ANEW = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")


class Damaged(Exception):
    """The files contradict the format, or each other."""


class Broken(AssertionError):
    """The promise is broken."""


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if any(dict(pairs)[name] != value for name, value in pairs):
        raise Damaged("a name is there twice, with other values")
    return dict(pairs)


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    data = path.read_bytes()
    if len(data) < 8 or 8 + (length := struct.unpack("<Q", data[:8])[0]) > len(data):
        raise Damaged(f"{path.name}: no header")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise Damaged(f"{path.name}: {error}") from error
    header.pop("__metadata__", None)
    data = data[8 + length :]
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        shape = entry["shape"]
        if entry["dtype"] not in KINDS:
            raise Damaged(f"{name} is {entry['dtype']}")
        kind = KINDS[entry["dtype"]]
        if begin != end or stop - begin != int(np.prod(shape, dtype=object)) * kind.itemsize or stop > len(data):
            raise Damaged(f"{name} lies in the wrong place")
        raw = torch.from_numpy(np.frombuffer(data[begin:stop], np.uint8).copy())
        tensors[name] = raw.view(kind).view(shape) if raw.numel() else torch.empty(shape, dtype=kind)
        end = stop
    if end != len(data):
        raise Damaged(f"{path.name} has more bytes than its header says")
    return tensors


def read_folder(folder: Path, lenient: bool = False) -> dict[str, Tensor]:
    """All tensors that count: of ``model.safetensors``, or of the shards that the index names.

    Args:
        lenient: transformers' own loading asks the index for the files alone, not for what is in which.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_file(single)
    places = json.loads(index.read_text(), object_pairs_hook=_no_duplicates)["weight_map"]
    found: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        for tensor, value in read_file(folder / name).items():
            if tensor in found:
                raise Damaged(f"{tensor} is in two shards")
            found[tensor] = value
    if not set(places) <= set(found) and not lenient:
        raise Damaged("the index names tensors that the shards do not hold")
    return found


def unpack(held: dict[str, Tensor], layer: str, cols: int) -> Tensor:
    """A packed layer's dense weight, from the files alone; written from the formats' description."""
    values = held[f"{layer}.weight"]
    bits = {4: np.int32, 2: np.int16, 8: np.int64}[values.element_size()]
    flat = values.contiguous().view(torch.int8).numpy().view(bits)
    if f"{layer}.weight_bitmap" in held:
        bitmap = held[f"{layer}.weight_bitmap"].numpy()
        mask = np.unpackbits(bitmap, axis=1, bitorder="little").astype(bool)
        starts = held[f"{layer}.weight_starts"].numpy()
        if not np.array_equal(np.concatenate([[0], mask.sum(1).cumsum()]), starts):
            raise Damaged(f"{layer}: its starts do not fit its bitmap")
        if values.shape != (starts[-1] + PADDING,):
            raise Damaged(f"{layer}: it keeps {starts[-1]}, {values.shape} are there")
        dense = np.zeros(mask.shape, bits)
        dense[mask] = flat[: starts[-1]]
    else:
        codes = held[f"{layer}.weight_indices"].numpy()
        rows = codes.shape[0]
        dense = np.zeros((rows, codes.shape[1] * 2, 4), bits)
        groups = np.stack([codes & 15, codes >> 4], axis=2).reshape(rows, -1)
        first, second = groups & 3, groups >> 2
        if not (first < second).all():
            raise Damaged(f"{layer}: its indices do not ascend")
        flat = flat.reshape(rows, -1, 2)
        row, group = np.indices(groups.shape)
        dense[row, group, first], dense[row, group, second] = flat[..., 0], flat[..., 1]
        dense = dense.reshape(rows, -1)
    if dense.shape[1] != cols:
        raise Damaged(f"{layer} has {dense.shape[1]} columns, not {cols}")
    return torch.from_numpy(dense.view(np.int8)).view(values.dtype).view(dense.shape)


def check_same(model: torch.nn.Module, folder: Path, drops: bool = False) -> list[str]:
    """The tensors of the files that the model has not, where it may (``drops``).

    Raises:
        Broken: the model holds anything else than the files.
    """
    try:
        held = read_folder(folder, lenient=drops)
        prefix = f"{model.base_model_prefix}."
        state = model.state_dict()
        renamed = {}
        for name, tensor in held.items():
            target = name if name in state else prefix + name if prefix + name in state else name.removeprefix(prefix)
            if target in renamed and not drops:
                raise Broken(f"two tensors of the files are {target}")
            renamed[target] = tensor
        _check_tensors(model, state, renamed)
        _check_packed(model, renamed)
    except Damaged as error:
        raise Broken(f"damaged, and loaded: {error}") from error
    left = [name for name in renamed if name not in state and not MADE_ANEW.search(name)]
    if left and not drops:
        raise Broken(f"dropped without a word: {left}")
    return left


def _check_tensors(model: torch.nn.Module, state: dict[str, Tensor], held: dict[str, Tensor]) -> None:
    owners = {tensor.data_ptr(): name for name, tensor in state.items() if name in held and tensor.numel()}
    for name, tensor in state.items():
        if name not in held:
            if tensor.data_ptr() not in owners:
                raise Broken(f"{name} is in none of the files: where is it from?")
            continue
        file = held[name]
        if tensor.shape != file.shape:
            raise Broken(f"{name} is {list(file.shape)} in the file, {list(tensor.shape)} in the model")
        if tensor.is_floating_point() != file.is_floating_point() or not (
            tensor.is_floating_point() or tensor.dtype == file.dtype
        ):
            raise Broken(f"{name} is {file.dtype} in the file, {tensor.dtype} in the model")
        if not same_bits(tensor.double().float(), file.to(tensor.dtype).double().float()):
            raise Broken(f"{name} has other values than the file")


def _check_packed(model: torch.nn.Module, held: dict[str, Tensor]) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, PackedWeight):
            dense = unpack(held, name, layer.in_features)
            if not same_bits(layer.unpacked(), dense.to(layer.weight.dtype)):
                raise Broken(f"{name} unpacks to another weight than the file holds")
