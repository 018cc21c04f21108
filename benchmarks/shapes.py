"""Weights of LLaMA's linear layers, [C_out, C_in]: q and o, k and v where they differ, gate and up, down."""

from __future__ import annotations

MODELS: dict[str, tuple[tuple[int, int], ...]] = {
    "7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "13B": ((5120, 5120), (13824, 5120), (5120, 13824)),
    "30B": ((6656, 6656), (17920, 6656), (6656, 17920)),
    "65B": ((8192, 8192), (22016, 8192), (8192, 22016)),
    "3-8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "3-70B": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "3-405B": ((16384, 16384), (1024, 16384), (53248, 16384), (16384, 53248)),
}
QUICK = ((64, 128),)


def weights_of(models: list[str]) -> list[tuple[int, int]]:
    """The distinct shapes of some of ``MODELS``, in their order."""
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got '{unknown[0]}'")
    return list(dict.fromkeys(shape for name in models for shape in MODELS[name]))
