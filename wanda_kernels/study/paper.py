"""Published figures to show beside a study's own."""

from __future__ import annotations

from typing import Any

SOURCE = (
    "Wanda (arXiv 2306.11695), perplexity on wikitext2 of pruned LLaMA-2, as the official repository's README gives it"
)

# target -> method -> perplexity. Windows of 4,096 tokens, 128 calibration samples of c4.
_LLAMA_2: dict[str, dict[str, dict[str, float]]] = {
    "7b": {
        "dense": {"dense": 5.12},
        "50%": {"magnitude": 14.89, "sparsegpt": 6.51, "wanda": 6.42},
        "4:8": {"magnitude": 16.48, "sparsegpt": 8.12, "wanda": 7.97},
        "2:4": {"magnitude": 54.59, "sparsegpt": 10.17, "wanda": 11.02},
    },
    "13b": {
        "dense": {"dense": 4.57},
        "50%": {"magnitude": 6.37, "sparsegpt": 5.63, "wanda": 5.56},
        "4:8": {"magnitude": 6.76, "sparsegpt": 6.60, "wanda": 6.55},
        "2:4": {"magnitude": 8.33, "sparsegpt": 8.32, "wanda": 8.27},
    },
    "70b": {
        "dense": {"dense": 3.12},
        "50%": {"magnitude": 4.98, "sparsegpt": 3.98, "wanda": 3.98},
        "4:8": {"magnitude": 5.58, "sparsegpt": 4.59, "wanda": 4.47},
        "2:4": {"magnitude": 6.33, "sparsegpt": 5.40, "wanda": 5.16},
    },
}

# (hidden size, layers, vocabulary, context) of the published models
_SIZES = {(4096, 32): "7b", (5120, 40): "13b", (8192, 80): "70b"}


def published(config: Any) -> dict[str, dict[str, float]] | None:
    """The paper's figures for the model, where its configuration is that of a LLaMA-2; otherwise None."""
    named = ("model_type", "vocab_size", "max_position_embeddings")
    is_llama_2 = [getattr(config, name, None) for name in named] == ["llama", 32000, 4096]
    size = _SIZES.get((getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)))
    return _LLAMA_2[size] if is_llama_2 and size else None
