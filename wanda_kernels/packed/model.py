"""Packs the linear layers of a model's blocks in place, and unpacks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..pruning.blocks import find_blocks
from .format import PADDING, choose_format
from .linear import PackedLinear


@dataclass
class PackedReport:
    """What :func:`compress` did.

    Attributes:
        formats: layer -> its format, or ``dense`` where it would not have shrunk.
        dense_bytes, packed_bytes: of the weights of all those layers, before and after.
    """

    formats: dict[str, str]
    dense_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        counts = {form: list(self.formats.values()).count(form) for form in ("2:4", "bitmap", "dense")}
        layers = ", ".join(f"{count} {form}" for form, count in counts.items() if count)
        share = self.packed_bytes / max(self.dense_bytes, 1)
        return f"{layers}: {self.packed_bytes / 2**20:.1f} of {self.dense_bytes / 2**20:.1f} MiB ({share:.3f})"


def compress(model: nn.Module, format: str = "auto") -> PackedReport:
    """Replace the linear layers of a transformers decoder's blocks by :class:`PackedLinear`, in place.

    Args:
        model: pruned; float32, bfloat16 or float16.
        format: ``bitmap`` (any sparsity), ``2:4``, or ``auto``: 2:4 where a weight is, else a bitmap.

    A layer that would not shrink stays dense. ``model.save_pretrained`` then writes a packed checkpoint, which
    ``from_pretrained`` loads after ``import wanda_kernels``.

    Raises:
        ValueError: an unknown format, a model that is packed already, or one without layers that shrink.
    """
    if packed_layers(model):
        raise ValueError("the model is packed already")
    report = PackedReport({}, 0, 0)
    for block in find_blocks(model):
        for name, linear in block.linears.items():
            full = f"{block.name}.{name}"
            form = choose_format(linear.weight.data, format)
            report.formats[full] = form or "dense"
            size = linear.weight.numel() * linear.weight.element_size()
            report.dense_bytes += size
            if form is None:
                report.packed_bytes += size
                continue
            packed = PackedLinear.from_linear(linear, form).train(linear.training)
            report.packed_bytes += sum(tensor.numel() * tensor.element_size() for tensor in packed.packed())
            model.set_submodule(full, packed)
    layers = packed_layers(model)
    if not layers:
        wanted = "" if format == "auto" else f" as {format}"
        raise ValueError(f"no linear layer of the model would shrink{wanted}: prune it first")
    _set_config(model, {name: describe(layer) for name, layer in layers.items()})
    return report


def decompress(model: nn.Module) -> None:
    """Replace every :class:`PackedLinear` by a dense layer with the same weight, bit for bit, in place.

    Raises:
        ValueError: the model holds none.
    """
    layers = packed_layers(model)
    if not layers:
        raise ValueError("the model is not packed")
    for name, layer in layers.items():
        model.set_submodule(name, layer.to_linear())
    _set_config(model, None)


def keep_prefill_copies(model: nn.Module) -> int:
    """Give every 2:4 layer torch's semi-structured tensor beside its packed weight, for products with many tokens on
    CUDA (:meth:`PackedLinear.keep_prefill_copy`). Returns the bytes that they take.

    Raises:
        ValueError: the model has no 2:4 layer, or one cannot have a copy.
    """
    layers = [layer for layer in packed_layers(model).values() if layer.form == "2:4"]
    if not layers:
        raise ValueError("the model has no layer that is packed as 2:4")
    for layer in layers:
        layer.keep_prefill_copy()
    return sum(layer.prefill_bytes() for layer in layers)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def describe(layer: PackedLinear) -> dict[str, Any]:
    """What config.json says of a layer: enough to make it without its data."""
    if layer.form == "2:4":
        return {"format": "2:4"}
    return {"format": layer.form, "kept": layer.weight.numel() - PADDING}


def _set_config(model: Any, layers: dict[str, dict[str, Any]] | None) -> None:
    from .quantizer import WandaPackedConfig

    if layers is not None:
        model.config.quantization_config = WandaPackedConfig(layers=layers)
        return
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.remove_quantization_config(model)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
