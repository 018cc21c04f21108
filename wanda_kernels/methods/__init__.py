"""What prunes one matrix: the paper's method, its baselines and its ablations, a file each.

``base`` says what a method is, ``inputs`` what is known of a matrix's inputs, ``select`` how scores become zeros.
Wanda and magnitude run on the kernels; the rest is plain PyTorch around them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .ablation import ABLATIONS
from .base import Method, Needs, Outcome, Pattern, option
from .inputs import LayerInputs
from .magnitude import Magnitude
from .ria import Ria
from .sparsegpt import SparseGPT
from .wanda import Wanda

__all__ = [
    "METHODS", "LayerInputs", "Method", "Needs", "Outcome", "Pattern", "create", "option", "options_of", "register",
]  # fmt: skip

_OURS: tuple[type[Method], ...] = (Wanda, Magnitude, SparseGPT, Ria, *ABLATIONS)
METHODS: dict[str, type[Method]] = {method.name: method for method in _OURS}


def register(method: type[Method]) -> type[Method]:
    """Make ``method`` one of :data:`METHODS`. A decorator; raises ValueError where another one has its name."""
    if METHODS.setdefault(method.name, method) is not method:
        raise ValueError(f"there is another method '{method.name}'")
    return method


def options_of(name: str) -> dict[str, dataclasses.Field[Any]]:
    """The options of the method ``name``."""
    return {one.name: one for one in dataclasses.fields(METHODS[name])}


def create(name: str, given: dict[str, Any]) -> Method:
    """The method ``name`` with the options ``given``; None, or False for what is off by default, is not given.

    Raises:
        ValueError: no such method, or an option of others.
        TypeError: an option of none.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got '{name}'")
    arguments = {}
    for key, value in given.items():
        takers = {other: options_of(other)[key] for other in METHODS if key in options_of(other)}
        if not takers:
            raise TypeError(f"prune() got an unexpected keyword argument '{key}'")
        default = next(iter(takers.values())).default
        if value is None or (value is False and default is False):
            continue
        if name not in takers:
            raise ValueError(f"{key} is an option of {', '.join(takers)}, not of {name}")
        parse = takers[name].metadata.get("parse")
        arguments[key] = parse(value) if parse is not None and isinstance(value, str) else value
    return METHODS[name](**arguments)
