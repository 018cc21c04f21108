"""LoRA whose adapter has the zeros of the weight that it adapts: ``W + M * (B A)``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._words import need
from .masks import pruned_matrices

_PEFT = "LoRA needs the peft package"


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
        options: of ``peft.LoraConfig``, those that choose layers, ranks and scale (``exclude_modules``,
            ``layers_to_transform``, ``rank_pattern``, ``use_rslora``, ..), and ``init_lora_weights`` of True, False,
            ``gaussian`` or ``orthogonal``. All others are refused: initialisations that change the pruned weight,
            dropout, DoRA, biases, trained tokens and such do not keep the zeros, or do not act on the weight.

    Returns:
        A ``peft.PeftModel``: train its parameters that require gradients, then :func:`merge`. What its
        ``save_pretrained`` writes is loaded by :func:`load_masked_lora`, and not by plain peft.

    Raises:
        ImportError: without peft.
        ValueError: a model without zeros, or with adapters; targets that are none of its pruned layers; options as
            above.

    Source: Wanda (arXiv 2306.11695), section 5, LoRA fine-tuning; the mask on the adapter is this package's.
    """
    need("peft", "finetune", _PEFT)
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    from . import adapter

    for name, instead in {
        "r": "give rank",
        "lora_alpha": "give alpha",
        "task_type": "it is CAUSAL_LM",
        "masks": "not given",
    }.items():
        if name in options:
            raise ValueError(f"{name}: {instead}")
    adapter.refuse_other_options(options)
    matrices = pruned_matrices(model).items()
    linears = {name: matrix.module for name, matrix in matrices if isinstance(matrix.module, nn.Linear)}
    wanted = sorted({name.rsplit(".", 1)[-1] for name in linears}) if target_modules is None else target_modules
    # peft's own rule says which are meant. It passes over layers_to_transform where targets are full names, as below.
    choosing = {name: options.pop(name, None) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")}
    asked = peft.LoraConfig(target_modules=wanted if isinstance(wanted, str) else list(wanted), **choosing)
    chosen = [name for name in linears if check_target_module_exists(asked, name)]
    if not chosen:
        said = "".join(f", {name} {value}" for name, value in choosing.items() if value is not None)
        raise ValueError(f"target_modules {target_modules}{said} are none of the model's pruned linear layers")
    masks = {name: adapter.mask_digest(linears[name].weight) for name in chosen}
    config = adapter.MaskedLoraConfig(
        r=rank, lora_alpha=alpha, target_modules=chosen, task_type="CAUSAL_LM", masks=masks, **options
    )  # fmt: skip
    training = model.training
    return peft.get_peft_model(model, config).train(training)


def load_masked_lora(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> Any:
    """The model with an adapter that the ``save_pretrained`` of :func:`masked_lora`'s model wrote.

    ``peft.PeftModel.from_pretrained`` gives the same where ``wanda_kernels.finetune`` is imported, and an error where
    it is not.

    Args:
        model: the pruned model that the adapter was trained on, without it.
        folder: of the adapter.
        trainable: go on with the training.

    Raises:
        ImportError: without peft.
        ValueError: no masked adapter, one that does not fit the model, a model as :func:`masked_lora` refuses it.
    """
    need("peft", "finetune", _PEFT)
    import peft

    from .adapter import MaskedLoraConfig

    pruned_matrices(model)
    config = peft.PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, MaskedLoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{folder} holds an adapter of type {kind}, not one that masked_lora made")
    training = model.training
    return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable).train(training)


@torch.no_grad()
def merge(model: Any) -> nn.Module:
    """The model without adapters, their masked weights added to its own: zeros stay, logits stay up to rounding.

    Args:
        model: what :func:`masked_lora` or :func:`load_masked_lora` returned.

    Raises:
        ValueError: for any other, whose adapter would fill the zeros.
    """
    need("peft", "finetune", _PEFT)
    from .adapter import MaskedLoraModel

    if not isinstance(getattr(model, "base_model", None), MaskedLoraModel):
        raise ValueError(
            f"merge needs what masked_lora returned, got a {type(model).__name__} without a masked adapter"
        )
    return model.merge_and_unload()
