"""The masked adapter as a method of peft's own. Import it where peft is installed: that registers it.

An adapter that it saves is of a type, and has tensors of names, that plain LoRA does not know: where this package is
not imported, peft refuses it (``KeyError``, the type's name says what to import) instead of making another model of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import Linear, LoraModel
from torch import Tensor, nn
from torch.nn.functional import linear as product

from ..identity import checksum

PEFT_TYPE: Any = "WANDA_MASKED_LORA (import wanda_kernels.finetune)"

# Read in peft 0.21: these set the factors alone. The others change the weight that is adapted (pissa, olora, corda,
# loftq, lora_ga), do not compute with B A (mica), or need data (eva).
INITS = (True, False, "gaussian", "orthogonal")
# What only chooses layers, ranks and scale, or is a note. Any other, a later version's too, must be at its default.
_PLAIN = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora", "init_lora_weights", "masks",
}  # fmt: skip
OPTIONS = sorted(_PLAIN - {"task_type", "peft_type", "r", "lora_alpha", "target_modules", "masks"})


@dataclass
class MaskedLoraConfig(LoraConfig):
    """peft's configuration, without what would lose the zeros.

    Attributes:
        masks: layer -> :func:`mask_digest` of the weight that the adapter is trained on.

    Raises:
        ValueError: for that, by name.
    """

    masks: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        refuse_other_options({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


def refuse_other_options(options: dict[str, Any]) -> None:
    """Raises ValueError naming the first of ``options`` that a masked adapter cannot have."""
    defaults = LoraConfig()
    for name, value in options.items():
        if name not in _PLAIN and (not hasattr(defaults, name) or value != getattr(defaults, name)):
            raise ValueError(
                f"{name}: a masked adapter cannot have it, got {value!r}. Beside rank, alpha and target_modules it has "
                f"{', '.join(OPTIONS)}"
            )
    init = options.get("init_lora_weights", True)
    if not (isinstance(init, bool) or init in INITS[2:]):  # 1 == True, but is none of peft's
        raise ValueError(
            f"init_lora_weights must be one of {', '.join(map(repr, INITS))}, which leave the pruned weight as it is, "
            f"got {init!r}"
        )


class MaskedLoraLinear(Linear):
    """peft's LoRA layer, except that the adapter's weight is masked, and that it adds weights, not outputs."""

    mask: Tensor

    def __init__(self, base_layer: nn.Linear, *args: Any, **options: Any) -> None:
        mask = base_layer.weight.detach() != 0
        super().__init__(base_layer, *args, **options)
        self.register_buffer("mask", mask, persistent=False)

    def update_layer(self, adapter_name: str, *args: Any, **options: Any) -> None:
        """Adds an adapter. That it leaves the weight alone is also checked, whatever a version of peft may do."""
        before = checksum(self.weight)
        super().update_layer(adapter_name, *args, **options)
        if checksum(self.weight) != before:
            raise RuntimeError(f"initialising adapter '{adapter_name}' changed the pruned weight: load the model anew")

    def get_delta_weight(self, adapter: str) -> Tensor:
        """M * (B A) * scaling: what merging adds."""
        return super().get_delta_weight(adapter) * self.mask

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        if options.get("adapter_names") is not None:
            raise ValueError("adapter_names: a masked adapter serves whole batches, choose it with set_adapter()")
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **options)
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                # added and rounded as merging does it: the merged model is the trained one, to the bit
                weight = (weight + self.get_delta_weight(adapter)).to(base.weight.dtype)
        return product(x, weight, base.bias)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # M * (B A) has no low rank


class MaskedLoraModel(LoraModel):
    """peft's model with masked layers, whose tensors are saved as ``masked_lora_A`` and ``masked_lora_B``."""

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **options: Any) -> None:
        if not isinstance(peft_config, dict):  # transformers' load_adapter, which looks for plain LoRA's tensors
            raise ValueError(
                "a masked adapter is loaded by wanda_kernels.finetune.load_masked_lora or peft.PeftModel, not into the "
                "bare model"
            )
        super().__init__(model, peft_config, *args, **options)

    @staticmethod
    def _create_new_module(
        lora_config: LoraConfig, adapter_name: str, target: nn.Module, **options: Any
    ) -> MaskedLoraLinear:
        if type(target) is not nn.Linear or bool((target.weight != 0).all()):
            raise ValueError(
                f"layer {options.get('target_name')} is no linear layer with zeros: a masked adapter belongs to the "
                "pruned model that it was trained on"
            )
        trained_on = (getattr(lora_config, "masks", None) or {}).get(str(options.get("target_name")))
        if trained_on is not None and trained_on != mask_digest(target.weight):
            raise ValueError(
                f"layer {options.get('target_name')} has other zeros than the one that the adapter was trained on: a "
                "masked adapter belongs to one pruned model"
            )
        options.pop("device_map", None)
        return MaskedLoraLinear(target, adapter_name, config=lora_config, **options)

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **options: Any) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(*args, **options)
        return {name.replace(".lora_", ".masked_lora_"): tensor for name, tensor in found.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        plain = {name.replace(".masked_lora_", ".lora_"): tensor for name, tensor in state_dict.items()}
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, plain)
        wanted = {
            f"{name}.lora_{factor}.{adapter_name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, MaskedLoraLinear) and adapter_name in module.lora_A
            for factor in "AB"
        }
        other = sorted(wanted ^ {name for name in found if ".lora_" in name})
        if other:  # peft would warn of what is missing, and drop what is too much
            where = "the adapter lacks" if other[0] in wanted else "the model has no layer for"
            raise ValueError(f"the adapter does not fit the model: {where} {other[0]} ({len(other)} tensors in all)")
        return found


@torch.no_grad()
def mask_digest(weight: Tensor) -> str:
    """How many of a weight's elements are zero, and the sum of their places: enough to tell masks apart."""
    places = (weight.detach().reshape(-1) == 0).nonzero()
    return f"{places.numel()}-{int(places.sum())}"


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MaskedLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = MaskedLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = MaskedLoraModel.prefix
