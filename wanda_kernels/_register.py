"""Tells transformers of the packed checkpoints, at once or when its quantizers are imported: importing them for that
alone would double the time of ``import wanda_kernels``.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_QUANTIZERS = "transformers.quantizers.auto"


def register() -> None:
    """Now, or as soon as transformers imports its list of quantizers."""
    if _QUANTIZERS in sys.modules:
        _register(sys.modules[_QUANTIZERS])
    else:
        sys.meta_path.insert(0, _Watcher())


def _register(quantizers: ModuleType) -> None:
    from .packed.quantizer import WandaPackedConfig, WandaPackedQuantizer
    from .pruning.blocks import PACKED

    if PACKED not in quantizers.AUTO_QUANTIZER_MAPPING:
        quantizers.register_quantization_config(PACKED)(WandaPackedConfig)
        quantizers.register_quantizer(PACKED)(WandaPackedQuantizer)


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds the module as usual, once, and registers after it was run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
