"""Packs the linear layers of a model's blocks in place, and unpacks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..pruning.blocks import Block, find_blocks, matrices_of, unwrapped, why_not_plain
from .format import COLUMNS, PADDING, check_format, choose_format, why_dense, why_not_packable
from .linear import PackedLinear


@dataclass
class PackedReport:
    """What :func:`compress` did.

    Attributes:
        formats: layer -> its format, or ``dense`` where it stayed so.
        dense: layer that stayed dense -> why.
        dense_bytes, packed_bytes: of the weights of all those layers, before and after.
    """

    formats: dict[str, str]
    dense: dict[str, str]
    dense_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        counts = {form: list(self.formats.values()).count(form) for form in ("2:4", "bitmap", "dense")}
        layers = ", ".join(f"{count} {form}" for form, count in counts.items() if count)
        share = self.packed_bytes / max(self.dense_bytes, 1)
        total = f"{layers}: {self.packed_bytes / 2**20:.1f} of {self.dense_bytes / 2**20:.1f} MiB ({share:.3f})"
        return "\n".join([total, *(f"dense: {line}" for line in stayed_dense(self.dense))])


def stayed_dense(reasons: dict[str, str]) -> list[str]:
    """A line for each reason in ``reasons`` (layer -> why it is dense): ``up_proj, gate_proj (4 layers, the first is
    ..): why``."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        lines.append(f"{kinds} ({len(names)} layers, the first is {names[0]}): {reason}")
    return lines


def compress(model: nn.Module, format: str = "auto") -> PackedReport:
    """Replace the linear layers of a transformers decoder's blocks by :class:`PackedLinear`, in place.

    Args:
        model: pruned; float32, bfloat16 or float16.
        format: ``bitmap`` (any sparsity), ``2:4``, or ``auto``: 2:4 where a weight is, else a bitmap.

    A layer that would not shrink, or that is not a plain ``nn.Linear`` (a subclass, one with hooks), stays dense; the
    report says why. ``model.save_pretrained`` then writes a packed checkpoint, which ``from_pretrained`` loads after
    ``import wanda_kernels``.

    Raises:
        ValueError: an unknown format, a model that is packed already, or one in which every layer stays dense.
    """
    check_format(format)
    if packed_layers(model):
        raise ValueError("the model is packed already")
    model = unwrapped(model)
    report = PackedReport({}, {}, 0, 0)
    for name, matrix in matrices_of(find_blocks(model)).items():
        linear, stored = matrix.module, matrix.stored.detach()
        special: str | None = f"a {type(linear).__name__} is not packed"
        if isinstance(linear, nn.Linear):
            special = why_not_plain(linear)
        form = choose_format(stored, format) if special is None else None
        report.formats[name] = form or "dense"
        report.dense_bytes += stored.nbytes
        if form is None or not isinstance(linear, nn.Linear):
            report.dense[name] = special or why_dense(stored, format)
            report.packed_bytes += stored.nbytes
            continue
        packed = PackedLinear.from_linear(linear, form).train(linear.training)
        report.packed_bytes += sum(tensor.nbytes for tensor in packed.packed())
        model.set_submodule(name, packed)
    layers = packed_layers(model)
    if not layers:
        raise ValueError(_nothing_packed(report.dense, format))
    _set_config(model, {name: describe(layer) for name, layer in layers.items()})
    return report


def refuse_unpackable(blocks: list[Block]) -> None:
    """Raises ValueError where no layer of any block could be packed, whatever is pruned: known from the shapes."""
    widths = {name: matrix.weight.shape[-1] for name, matrix in matrices_of(blocks).items()}
    if all(width % COLUMNS for width in widths.values()):
        reasons = {name: why_not_packable(width) for name, width in widths.items()}
        raise ValueError(_nothing_packed(reasons, "auto"))


def _nothing_packed(reasons: dict[str, str], format: str) -> str:
    wanted = "" if format == "auto" else f" as {format}"
    return f"no linear layer of the model can be packed{wanted}: {'; '.join(stayed_dense(reasons))}"


def decompress(model: nn.Module) -> None:
    """Replace every :class:`PackedLinear` by a dense layer with the same weight, bit for bit, in place.

    Raises:
        ValueError: the model holds none.
    """
    model = unwrapped(model)
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


def dense_layers(model: nn.Module) -> dict[str, str]:
    """The linear layers beside the packed ones in the blocks of a packed model -> why they are dense."""
    packed = packed_layers(model)
    stacks = {name.rpartition(".")[0] for name in packed}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[0] in stacks
    }
    return {name: why_not_plain(linear) or why_dense(linear.weight.data) for name, linear in found.items()}


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
