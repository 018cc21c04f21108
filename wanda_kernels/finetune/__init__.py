"""Training that keeps the zeros of a pruned model.

Two ways:

- LoRA, through ``peft`` (extra ``[finetune]``): :func:`masked_lora` wraps a pruned model; what it computes with is
  ``W + M * (B A)``, M the mask of W, in training as after :func:`merge`. Plain LoRA, whose B A is dense, would give
  a dense model or, masked only afterwards, another one than was trained. :func:`load_masked_lora` loads a saved
  adapter.
- all weights, by any torch optimiser: :func:`hold_masks` keeps what is zero at zero.

:func:`fit` is a plain loop for either; a trainer of your own does as well.
"""

import importlib.util

from .fit import fit
from .lora import load_masked_lora, masked_lora, merge
from .masks import HeldMasks, hold_masks

if importlib.util.find_spec("peft") is not None:
    from . import adapter as adapter  # makes it known to peft: its own from_pretrained then loads masked adapters

__all__ = ["HeldMasks", "fit", "hold_masks", "load_masked_lora", "masked_lora", "merge"]
