"""Training that keeps the zeros of a pruned model.

Two ways:

- LoRA, through ``peft`` (extra ``[finetune]``): :func:`masked_lora` wraps a pruned model; what it computes with is
  ``W + M * (B A)``, M the mask of W, in training as after :func:`merge`. Plain LoRA, whose B A is dense, would give
  a dense model or, masked only afterwards, another one than was trained.
- all weights, by any torch optimiser: :func:`hold_masks` keeps what is zero at zero.

:func:`fit` is a plain loop for either; a trainer of your own does as well.
"""

from .fit import fit
from .lora import masked_lora, merge
from .masks import HeldMasks, hold_masks

__all__ = ["HeldMasks", "fit", "hold_masks", "masked_lora", "merge"]
