"""Loading packed checkpoints with transformers: a quantizer of its public registry, ``quant_method: wanda_packed``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..models.checkpoint import Checkpoint
from ..models.experts import layout_of
from ..models.fits import check_fits, listed, unplaced
from ..pruning.blocks import PACKED
from .dense import serve_dense
from .experts import PackedExperts, PackedStack
from .format import FORMATS
from .linear import PackedLinear
from .model import packed_layers, unpack_layers
from .values import ValueType

VERSION = 1


class WandaPackedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint.

    Args:
        layers: linear layer, or weight of fused experts -> ``{"format": "2:4"}`` or ``{"format": "bitmap", "kept":
            values}``; of 8 or 4 bits with ``"values": "int8", "group_size": 0``, ``kept`` in bytes, and ``"format":
            "dense"`` beside the others.
        version: of the formats.
    """

    def __init__(self, layers: Any = None, version: Any = VERSION, **_unused: Any) -> None:
        self.quant_method = PACKED  # type: ignore[assignment]  # an enum of transformers' own methods
        self.version = version
        self.layers = layers
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f"quantization_config: packed in version {version!r:.99}, this wanda_kernels knows {VERSION}"
            )
        if not isinstance(layers, dict) or not layers:
            raise ValueError("quantization_config: its layers must be an object of layers and their formats")
        for name, layer in layers.items():
            if not isinstance(layer, dict) or not _is_sound(layer):
                raise ValueError(f"quantization_config: {name} is described as {str(layer)[:200]}")


def _is_sound(layer: dict[str, Any]) -> bool:
    kept, values, group = layer.get("kept", 0), layer.get("values", "float"), layer.get("group_size")
    if type(kept) is not int or not 0 <= kept < 2**31 or not isinstance(values, str):
        return False
    if group is not None and type(group) is not int:
        return False
    try:
        kind = ValueType.parse(values, group)
    except ValueError:
        return False
    return layer.get("format") in (*FORMATS, *(["dense"] if kind is not None else []))


class WandaPackedQuantizer(HfQuantizer):
    """Puts :class:`PackedLinear` and :class:`PackedExperts` in the places that the config names, and checks them after
    loading."""

    requires_calibration = True  # it loads what is packed; compress() packs
    quantization_config: WandaPackedConfig

    _checkpoint: Checkpoint | None = None

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_kwargs: Any
    ) -> None:
        for name, layer in self.quantization_config.layers.items():
            put_empty(model, name, layer)
        files = [Path(file) for file in checkpoint_files or ()]
        if len({file.parent for file in files}) == 1 and all(file.suffix == ".safetensors" for file in files):
            self._checkpoint = Checkpoint(files[0].parent, sorted({file.name for file in files}))
            check_fits(model, self._checkpoint, packed_layers(model))

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:
        # transformers marks what it loaded, fills the rest with whatever is in memory, and only warns
        tensors = model.state_dict(keep_vars=True)
        missing = [name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
        held = {} if self._checkpoint is None else self._checkpoint.entries
        sizes = [
            f"{name} is {list(held[name].shape)}, not {list(tensors[name].shape)}" for name in missing if name in held
        ]
        if sizes:
            raise ValueError(f"the packed checkpoint does not fit its config.json: {listed(sizes)}")
        if missing:
            raise ValueError(f"the packed checkpoint is incomplete: its files lack {listed(missing)}")
        left = [] if self._checkpoint is None else unplaced(model, self._checkpoint)
        if left:
            raise ValueError(f"the packed checkpoint holds what its config.json has no place for: {listed(left)}")
        for name, layer in packed_layers(model).items():
            try:
                layer.validate()
            except ValueError as error:
                raise ValueError(f"packed layer {name} is damaged: {error}") from error
        serve_dense(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        if isinstance(dtype, str):  # what save_pretrained leaves in the config
            dtype = getattr(torch, dtype)
        for dense in unpack_layers(model).values():
            dense.to(dtype)
        return model


def put_empty(model: nn.Module, name: str, layer: dict[str, Any]) -> None:
    """A packed layer without data in the place of the dense one that ``layer`` describes. Raises ValueError where that
    cannot be it."""
    form, kept = layer["format"], layer.get("kept", 0)
    kind = ValueType.parse(layer.get("values", "float"), layer.get("group_size"))

    def check(*shape: int) -> None:
        if kept > math.prod(shape):
            raise ValueError(f"quantization_config: {name} of {list(shape)} cannot be packed as {layer}")

    linear = _submodule(model, name)
    if isinstance(linear, nn.Linear):
        rows, cols, has_bias = linear.out_features, linear.in_features, linear.bias is not None
        check(rows, cols)
        model.set_submodule(name, PackedLinear(cols, rows, has_bias, form, kept, linear.weight.dtype, "meta", kind))
        return
    place, _, parameter = name.rpartition(".")
    experts = _submodule(model, place)
    layout = experts.layout if isinstance(experts, PackedExperts) else None if experts is None else layout_of(experts)
    if experts is None or layout is None or parameter not in layout.names:
        raise ValueError(
            f"quantization_config names {name}, which is no linear layer of {type(model).__name__}, nor a weight of "
            "its experts"
        )
    weight = experts.get_parameter(parameter)
    count, rows, cols = weight.shape if not layout.is_transposed else weight.transpose(-1, -2).shape
    check(count, rows, cols)
    if kind is not None and kind.bits == 4 and rows % 2:
        raise ValueError(f"quantization_config: {name}: experts of int4 need an even number of outputs, got {rows}")
    packed = PackedExperts.of(experts)
    packed.put(parameter, PackedStack(count, cols, rows, form, kept, weight.dtype, "meta", kind))
    model.set_submodule(place, packed)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
