"""Finds what can be pruned: the decoder blocks of a model, and the linear layers inside each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._checks import FLOATS

PACKED = "wanda_packed"  # quant_method of packed checkpoints (wanda_kernels/packed)


@dataclass(frozen=True)
class Block:
    """One decoder block: its name in the model, the module, and its linear layers by their name inside it."""

    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]


def find_blocks(model: nn.Module, meta: bool = False) -> list[Block]:
    """The decoder blocks in order. ``meta``: their weights may be without data, to be filled in later.

    Raises:
        ValueError: for a model that would be pruned wrongly: encoder-decoder models, blocks with weights that are
            not in ``nn.Linear`` (fused expert tensors, convolutions), weights shared between layers, dtypes that
            the kernels do not know, weights that are not on one device.
    """
    config = getattr(model, "config", None)
    if getattr(getattr(config, "quantization_config", None), "quant_method", None) == PACKED:
        raise ValueError("the model is packed: unpack it first (wanda_kernels.decompress, or wanda-kernels decompress)")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder model: only decoders can be pruned")
    prefix, stack = _find_stack(model)
    blocks = []
    for index, module in enumerate(stack):
        linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
        blocks.append(Block(f"{prefix}.{index}", module, linears))
    for block in blocks:
        _refuse_other_weights(block)
    _refuse_shared_weights(model, blocks)
    if not meta:
        _refuse_devices(blocks, mapped=getattr(model, "hf_device_map", None) is not None)
    return blocks


def _find_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one outermost list of modules that all hold linear layers, looked for in the text decoder."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder: nn.Module = model if get_decoder is None else get_decoder()
    names = {id(module): name for name, module in model.named_modules()}
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in decoder.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        if all(any(isinstance(child, nn.Linear) for child in element.modules()) for element in module):
            found.append((name, module))
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of blocks with linear layers"
            f"{': ' + ', '.join(name for name, _ in found) if found else ''}; a decoder with exactly one is required"
        )
    name, stack = found[0]
    return names[id(stack)] or name, stack


def _refuse_other_weights(block: Block) -> None:
    """A block whose matrices are not all in nn.Linear would be pruned in part without a word: refuse it."""
    in_linears = {id(linear.weight) for linear in block.linears.values()}
    others = [
        (name, parameter)
        for name, parameter in block.module.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in in_linears
    ]
    for name, parameter in sorted(others, key=lambda other: -other[1].dim()):  # experts before their router
        kind = "a fused expert tensor" if "expert" in name else "not the weight of an nn.Linear"
        raise ValueError(f"{block.name}.{name} {list(parameter.shape)} is {kind}: it cannot be pruned")
    for name, linear in block.linears.items():
        if linear.weight.dtype not in FLOATS or linear.weight.dim() != 2:
            raise ValueError(
                f"{block.name}.{name}.weight must be float32, bfloat16 or float16, got {linear.weight.dtype} "
                f"{list(linear.weight.shape)} (quantised weights have to be dequantised first)"
            )


def _refuse_shared_weights(model: nn.Module, blocks: list[Block]) -> None:
    owners: dict[int, str] = {
        id(parameter): name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not any(name.startswith(f"{block.name}.") for block in blocks)
    }
    for block in blocks:
        for name, linear in block.linears.items():
            full = f"{block.name}.{name}.weight"
            owner = owners.setdefault(id(linear.weight), full)
            if owner != full:
                raise ValueError(f"{full} is shared with {owner}: shared weights cannot be pruned")


def _refuse_devices(blocks: list[Block], mapped: bool) -> None:
    """``mapped``: accelerate moves activations from device to device."""
    devices = {linear.weight.device for block in blocks for linear in block.linears.values()}
    names = ", ".join(sorted(str(device) for device in devices))
    if torch.device("meta") in devices and mapped:
        raise ValueError(f"the device map leaves weights on a disk (they are on: {names}): stream the model instead")
    if torch.device("meta") in devices or (len(devices) > 1 and not mapped):
        raise ValueError(f"the model's weights must be on one device that holds data, they are on: {names}")


def refuse_non_finite(blocks: list[Block]) -> None:
    """Raises ValueError naming the first linear layer whose weight holds NaN or inf. One read of each weight."""
    for block in blocks:
        for name, linear in block.linears.items():
            low, high = torch.aminmax(linear.weight.detach())  # NaN wins in both
            if linear.weight.numel() and not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise ValueError(f"{block.name}.{name}.weight holds NaN or inf: refusing to prune it")


def count_zeros(weight: Tensor) -> int:
    """How many elements are 0. ``count_nonzero`` of the weight itself branches at each element: where half of them are
    0 it took five times as long (32 ms for 11.5 million bfloat16, where their selection takes 1)."""
    return int(torch.count_nonzero(weight == 0))
