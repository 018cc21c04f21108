"""LoRA whose adapter has the zeros of the weight that it adapts: ``W + M * (B A)``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from .masks import mask_of, pruned_linears


def _masked_linear() -> type[nn.Module]:
    """The layer, made here because its base class is in an optional package."""
    from peft.tuners.lora import Linear

    class MaskedLoraLinear(Linear):
        """peft's LoRA layer, except that the adapter's weight is masked, and that it adds weights, not outputs."""

        mask: Tensor

        def __init__(self, base_layer: nn.Linear, *args: Any, **options: Any) -> None:
            super().__init__(base_layer, *args, **options)
            self.register_buffer("mask", mask_of(base_layer.weight), persistent=False)

        def get_delta_weight(self, adapter: str) -> Tensor:
            """M * (B A) * scaling: what merging adds."""
            return super().get_delta_weight(adapter) * self.mask

        def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
            if self.disable_adapters or self.merged:
                return super().forward(x, *args, **options)
            base: Any = self.get_base_layer()
            weight: Tensor = base.weight
            for adapter in self.active_adapters:
                if adapter in self.lora_A:
                    # added and rounded as merging does it: the merged model is the trained one, to the bit
                    weight = (weight + self.get_delta_weight(adapter)).to(base.weight.dtype)
            return product(x, weight, base.bias)

    return MaskedLoraLinear


def masked_lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: int = 16,
    target_modules: Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """Wrap a pruned model for LoRA training that keeps its zeros.

    Args:
        model: a pruned causal language model of transformers. Its own weights are frozen and not changed.
        rank: of the adapters. The paper trains with 8.
        alpha: the adapter is scaled by ``alpha / rank``.
        target_modules: full names or their ends, as ``q_proj``; None: every linear layer of the blocks with zeros.
        options: more of ``peft.LoraConfig``; no dropout, DoRA or bias, which do not act on the weight.

    Returns:
        A ``peft.PeftModel``: train its parameters that require gradients, then :func:`merge`.

    Raises:
        ImportError: without peft.
        ValueError: a model without zeros, targets that are none of its pruned layers, or options as above.

    Source: Wanda (arXiv 2306.11695), section 5, LoRA fine-tuning; the mask on the adapter is this package's.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("LoRA needs the peft package: pip install 'wanda_kernels[finetune]'")
    import peft

    for name in ("lora_dropout", "use_dora", "lora_bias", "r", "lora_alpha"):
        if options.get(name):
            instead = {"r": "rank", "lora_alpha": "alpha"}.get(name)
            raise ValueError(f"{name}: " + (f"give {instead}" if instead else "a masked adapter cannot have it"))
    linears = pruned_linears(model)
    chosen = [
        name
        for name in linears
        if target_modules is None or any(name == end or name.endswith(f".{end}") for end in target_modules)
    ]
    if not chosen:
        raise ValueError(f"target_modules {list(target_modules or [])} are none of the model's pruned linear layers")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=chosen,
        task_type="CAUSAL_LM",
        **options,
    )
    config._register_custom_module({nn.Linear: _masked_linear()})
    training = model.training
    return peft.get_peft_model(model, config).train(training)


@torch.no_grad()
def merge(model: Any) -> nn.Module:
    """The model without adapters, their masked weights added to its own: zeros stay, logits stay up to rounding.

    Args:
        model: what :func:`masked_lora` returned.
    """
    return model.merge_and_unload()
