"""Loading packed checkpoints with transformers: a quantizer of its public registry, ``quant_method: wanda_packed``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..models.load import listed
from ..pruning.blocks import PACKED
from .linear import PackedLinear
from .model import packed_layers

VERSION = 1


class WandaPackedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint.

    Args:
        layers: layer -> ``{"format": "2:4"}`` or ``{"format": "bitmap", "kept": values}``.
        version: of the formats.
    """

    def __init__(self, layers: dict[str, dict[str, Any]], version: int = VERSION, **_unused: Any) -> None:
        self.quant_method = PACKED  # type: ignore[assignment]  # an enum of transformers' own methods
        self.version = version
        self.layers = layers
        if version != VERSION:
            raise ValueError(f"the checkpoint is packed in version {version}, this wanda_kernels knows {VERSION}")
        for name, layer in layers.items():
            form, kept = layer.get("format"), layer.get("kept", 0)
            if form not in ("2:4", "bitmap") or not isinstance(kept, int) or not 0 <= kept < 2**31:
                raise ValueError(f"quantization_config: {name} is described as {layer}")


class WandaPackedQuantizer(HfQuantizer):
    """Puts :class:`PackedLinear` in the places that the config names, and checks them after loading."""

    requires_calibration = True  # it loads what is packed; compress() packs
    quantization_config: WandaPackedConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_kwargs: Any) -> None:
        for name, layer in self.quantization_config.layers.items():
            try:
                dense = model.get_submodule(name)
            except AttributeError:
                dense = None
            if not isinstance(dense, nn.Linear):
                raise ValueError(
                    f"quantization_config names {name}, which is no linear layer of {type(model).__name__}"
                )
            packed = PackedLinear(
                dense.in_features,
                dense.out_features,
                dense.bias is not None,
                layer["format"],
                layer.get("kept", 0),
                dense.weight.dtype,
                torch.device("meta"),
            )
            model.set_submodule(name, packed)

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:
        # transformers marks what it loaded, fills the rest with whatever is in memory, and only warns
        tensors = model.state_dict(keep_vars=True)
        missing = [name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if missing:
            raise ValueError(f"the packed checkpoint is incomplete: its files lack {listed(missing)}")
        for name, layer in packed_layers(model).items():
            try:
                layer.validate()
            except ValueError as error:
                raise ValueError(f"packed layer {name} is damaged: {error}") from error
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in packed_layers(model).items():
            model.set_submodule(name, layer.to_linear().to(dtype))
        return model
