"""Finds what can be pruned: the decoder blocks of a model, and the linear layers inside each.

The one place that decides what may be pruned (:func:`find_blocks`) and what may be replaced by a packed layer
(:func:`why_not_plain`). What would be pruned in part, or in a place that the model does not compute with, is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._checks import FLOATS
from .._words import percent
from .matrices import Block, Matrix, matrices_in

_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torchao.quantization", "bitsandbytes.")
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
# Subclasses of nn.Linear that compute what it computes -> whether with a bias, too.
_COMPUTE_AS_LINEAR = {
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
    "wanda_kernels.packed.dense.DenseLinear": True,
}
MOST_DENSE = 0.15  # of a block's weights, that may lie beside its matrices
_OTHER_SENSES = ("vision", "visual", "image", "audio", "speech", "video")  # whose towers are not the text's
_COMPILED = "_orig_mod"  # where torch.compile keeps the module; its class takes a second to import
PACKED = "wanda_packed"  # quant_method of packed checkpoints (wanda_kernels/packed)


def matrices_of(blocks: Iterable[Block]) -> dict[str, Matrix]:
    """All matrices of ``blocks`` by their full names."""
    return {f"{block.name}.{name}": matrix for block in blocks for name, matrix in block.matrices.items()}


def find_blocks(model: nn.Module, meta: bool = False) -> list[Block]:
    """The decoder blocks in order. ``meta``: their weights may be without data, to be filled in later.

    What is pruned are linear layers and fused experts. Other weights stay dense where they are small (routers,
    convolutions, states): each block lists them.

    Raises:
        ValueError: for a model that would be pruned wrongly: encoder-decoder models, blocks with large weights that
            are neither in linear layers nor in experts of a known form, quantised layers, adapters, weights that are
            computed from others (parametrisations, weight norm), weights shared between layers, dtypes that the
            kernels do not know, weights that are not on one device, blocks that are wrapped one by one.
    """
    model = unwrapped(model)
    if isinstance(model, _WRAPPERS):
        raise ValueError(f"{type(model).__name__} wraps the model: give the model inside it (its module)")
    _refuse_adapters(model)
    config = getattr(model, "config", None)
    if getattr(getattr(config, "quantization_config", None), "quant_method", None) == PACKED:
        raise ValueError("the model is packed: unpack it first (wanda_kernels.decompress, or wanda-kernels decompress)")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder model: only decoders can be pruned")
    prefix, stack = _find_stack(model)
    blocks = []
    for index, module in enumerate(stack):
        for name, part in module.named_modules():
            _refuse_computed_weights(f"{prefix}.{index}.{name}".rstrip("."), part)
        block = Block(f"{prefix}.{index}", module, *matrices_in(module))
        block.dense.update(_other_weights(block))
        _refuse_unknown_weights(block)
        blocks.append(block)
    _refuse_shared_weights(model, blocks)
    if not meta:
        _refuse_overlaps(model, blocks)
        _refuse_devices(blocks, mapped=getattr(model, "hf_device_map", None) is not None)
    return blocks


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile(model)``: the names of its layers are those of its files. Raises TypeError for
    what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a model of transformers, got a {type(model).__name__}")
    while _COMPILED in model._modules:
        model = model.get_submodule(_COMPILED)
    return model


def _refuse_adapters(model: nn.Module) -> None:
    """LoRA factors are linear layers too, and merged or unmerged is the user's choice to make."""
    wrapper = getattr(model, "peft_config", None) is not None or getattr(model, "_hf_peft_config_loaded", False)
    layer = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if wrapper or layer is not None:
        raise ValueError(
            f"{type(model).__name__} holds adapters{f' ({layer})' if layer else ''}: merge them first (peft: "
            "merge_and_unload), or take them off (unload)"
        )


def _refuse_computed_weights(name: str, module: nn.Module) -> None:
    """A weight that is made anew at each forward pass loses its zeros without a word."""
    if is_parametrized(module):
        raise ValueError(f"{name} is parametrised: its weight is computed; remove_parametrizations makes it plain")
    if isinstance(module, nn.Linear) and "weight" not in module._parameters:
        raise ValueError(
            f"{name} has no weight of its own but computes it (weight norm, torch.nn.utils.prune): make it plain first "
            "(remove_weight_norm, prune.remove)"
        )
    if _COMPILED in module._modules or isinstance(module, _WRAPPERS):
        raise ValueError(
            f"{name} is wrapped ({type(module).__name__}), which changes the names in the saved files: give the "
            "module inside it"
        )
    quantised = type(module).__module__.startswith(_QUANTISED)
    weight = module._parameters.get("weight")
    saved = {key: buffer for key, buffer in module._buffers.items() if key not in module._non_persistent_buffers_set}
    codes = [  # what is not saved holds no weights: masks, positions; nor does a table beside a weight
        key
        for key, buffer in saved.items()
        if weight is None
        and buffer is not None
        and buffer.dim() >= 2
        and not (buffer.is_floating_point() or buffer.dtype == torch.bool)
    ]
    if quantised or codes:
        raise ValueError(
            f"{name} ({type(module).__name__}) holds quantised weights{f' ({codes[0]})' if codes else ''}: they have "
            "to be dequantised first"
        )


def what_it_computes(linear: nn.Module) -> str | None:
    """Why a layer, or a module of experts, may compute something else than its class says; None where it does not."""
    with_bias = _COMPUTE_AS_LINEAR.get(f"{type(linear).__module__}.{type(linear).__qualname__}")
    known = with_bias is not None and (with_bias or linear.bias is None)
    if isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward and not known:
        return f"it is a {type(linear).__name__}, which may compute something else than nn.Linear"
    if "forward" in vars(linear) and not hasattr(linear, "_hf_hook"):  # accelerate's moves tensors between devices
        return "it has a forward of its own"
    return None


def why_not_plain(linear: nn.Linear) -> str | None:
    """Why a layer must not be replaced by one that computes ``x @ weight.T + bias`` and no more; None if it may."""
    other = what_it_computes(linear)
    if other is not None:
        return other
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    if any(hooks) or "forward" in vars(linear):
        return "it has hooks, which would be lost"
    more = [
        *(name for name in linear._parameters if name not in ("weight", "bias")),
        *linear._buffers,
        *linear._modules,
    ]
    return f"it holds {more[0]} beside its weight" if more else None


def _refuse_overlaps(model: nn.Module, blocks: list[Block]) -> None:
    """Two weights in the same memory would be pruned twice, or another one with them."""
    named = {id(tensor): (name, tensor) for name, tensor in model.named_parameters() if not tensor.is_meta}
    mine = {id(matrix.stored) for matrix in matrices_of(blocks).values()}
    spans = []
    for name, tensor in named.values():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.data_ptr()
        if tensor.numel():
            spans.append((begin, begin + (last + 1) * tensor.element_size(), name, id(tensor) in mine))
        if id(tensor) in mine and last + 1 < tensor.numel():
            raise ValueError(f"{name} has several elements in one place (an expanded tensor): it cannot be pruned")
    spans.sort()
    for (_, end, name, is_mine), (begin, _, other, other_is_mine) in itertools.pairwise(spans):
        if begin < end and (is_mine or other_is_mine):
            raise ValueError(f"{name} and {other} lie in the same memory: shared weights cannot be pruned")


def _find_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one outermost list of modules that all hold linear layers, looked for in the text decoder."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder: nn.Module = model if get_decoder is None else get_decoder()
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):  # another part of that name
        decoder = model
    names = {id(module): name for name, module in model.named_modules()}
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in decoder.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer}.") for outer, _ in found) or any(sense in name for sense in _OTHER_SENSES):
            continue
        if all(not isinstance(element, nn.Linear) and matrices_in(element)[0] for element in module):
            found.append((name, module))
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of blocks with linear layers"
            f"{': ' + ', '.join(name for name, _ in found) if found else ''}; a decoder with exactly one is required"
        )
    name, stack = found[0]
    return names[id(stack)] or name, stack


def _other_weights(block: Block) -> dict[str, Tensor]:
    """What a block holds in two dimensions or more beside its matrices, and the biases of its experts."""
    mine = {id(matrix.stored) for matrix in block.matrices.values()}
    return {
        name: parameter
        for name, parameter in block.module.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in mine and not name.endswith("bias")
    }


def _refuse_unknown_weights(block: Block) -> None:
    """Large weights that are not pruned would make a sparsity that nobody asked for."""
    shares = {name: block.share(parameter) for name, parameter in block.dense.items()}
    experts = [name for name, parameter in block.dense.items() if "expert" in name and parameter.dim() > 2]
    if experts or sum(shares.values()) > MOST_DENSE:
        name = experts[0] if experts else max(shares, key=lambda name: shares[name])
        kind = "a fused expert tensor of a form that is not known" if experts else "in no linear layer"
        raise ValueError(
            f"{block.name}.{name} {list(block.dense[name].shape)} is {kind}: it cannot be pruned, and would leave "
            f"{percent(shares[name], 1)} of its block's weights dense (with what else is none, "
            f"{percent(sum(shares.values()), 1)})"
        )
    for name, matrix in matrices_of([block]).items():
        if matrix.stored.dtype not in FLOATS or matrix.stored.dim() != (2 if matrix.experts is None else 3):
            raise ValueError(
                f"{matrix.name_of(name)} must be float32, bfloat16 or float16, got {matrix.stored.dtype} "
                f"{list(matrix.stored.shape)} (quantised weights have to be dequantised first)"
            )


def _refuse_shared_weights(model: nn.Module, blocks: list[Block]) -> None:
    owners: dict[int, str] = {
        id(parameter): name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not any(name.startswith(f"{block.name}.") for block in blocks)
    }
    for name, matrix in matrices_of(blocks).items():
        full = matrix.name_of(name)
        owner = owners.setdefault(id(matrix.stored), full)
        if owner != full:
            raise ValueError(f"{full} is shared with {owner}: shared weights cannot be pruned")


def _refuse_devices(blocks: list[Block], mapped: bool) -> None:
    """``mapped``: accelerate moves activations from device to device."""
    devices = {matrix.stored.device for matrix in matrices_of(blocks).values()}
    names = ", ".join(sorted(str(device) for device in devices))
    if torch.device("meta") in devices and mapped:
        raise ValueError(f"the device map leaves weights on a disk (they are on: {names}): stream the model instead")
    if torch.device("meta") in devices or (len(devices) > 1 and not mapped):
        raise ValueError(f"the model's weights must be on one device that holds data, they are on: {names}")


def refuse_non_finite(blocks: list[Block]) -> None:
    """Raises ValueError naming the first linear layer whose weight holds NaN or inf. One read of each weight."""
    for name, matrix in matrices_of(blocks).items():
        low, high = torch.aminmax(matrix.stored.detach())  # NaN wins in both
        if matrix.stored.numel() and not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError(f"{matrix.name_of(name)} holds NaN or inf: refusing to prune it")


def count_zeros(weight: Tensor) -> int:
    """How many elements of a matrix are 0, of either sign.

    On a CPU numpy counts integers that are not 0 and the sign bits that stand alone: 13.8 million bfloat16 take it 3.4
    ms, ``count_nonzero`` of the weight 40, of ``weight == 0`` 8.7, and their selection 0.9.
    """
    if weight.device.type != "cpu":
        return int(torch.count_nonzero(weight == 0))
    if not weight.is_contiguous():  # another order counts the same
        weight = weight.transpose(-1, -2)
    bits = weight.detach().contiguous().view(torch.int16 if weight.element_size() == 2 else torch.int32).numpy()
    sign = np.iinfo(bits.dtype).min
    other = sum(np.count_nonzero(part) - np.count_nonzero(part == sign) for part in np.array_split(bits, 64))
    return int(bits.size - other)
