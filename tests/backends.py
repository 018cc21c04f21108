"""The implementations of an operator that this machine can run, each as a callable of its arguments."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from simt import backend as simt
from simt.machine import compiler

import wanda_kernels._backend as backend
from wanda_kernels import ops, reference


def _on_cpu(isa: str, name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        before = backend.extension.isa()
        backend.extension.set_isa(isa)
        try:
            return getattr(ops, name)(*args)
        finally:
            backend.extension.set_isa(before)

    return call


def _on_cuda(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        on_device = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
        result = getattr(ops, name)(*on_device)
        for argument, there in zip(args, on_device, strict=True):
            if isinstance(argument, torch.Tensor):
                argument.copy_(there)  # what was written in place
        if isinstance(result, tuple):
            return tuple(tensor.cpu() for tensor in result)
        return result.cpu() if isinstance(result, torch.Tensor) else result

    return call


def names() -> list[str]:
    """``reference`` aside: every compiled CPU instruction set, or the operators as they are without them; the CUDA
    kernels on the CPU, where g++ is there to compile them; CUDA, skipped where no GPU is (conftest.py)."""
    found = [f"cpu-{isa}" for isa in backend.extension.available_isas()] if backend.extension else ["cpu-reference"]
    found += ["cuda-simt"] if compiler() else []
    return [*found, "cuda"]


def statistics_names() -> list[str]:
    """As names(), for the operators that add up statistics on the way: Triton on the CPU by its interpreter, where no
    GPU is (conftest.py switches it on)."""
    interpreter = ["triton-interpreter"] if has_interpreter() and not torch.cuda.is_available() else []
    return [*(name for name in names() if name != "cuda-simt"), *interpreter]


def has_interpreter() -> bool:
    """Whether Triton is installed, and its interpreter runs with this NumPy: before 3.8 it makes an integer of an array
    of one element, which NumPy 2.5 refuses."""
    if importlib.util.find_spec("triton") is None:
        return False
    versions = [tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy")]
    return versions[0] >= (3, 8) or versions[1] < (2, 5)


@functools.cache
def implementation(backend_name: str, operator: str) -> Callable[..., Any]:
    if backend_name == "reference":
        return getattr(reference, operator)
    if backend_name == "cpu-reference":
        return getattr(ops, operator)
    if backend_name == "cuda-simt":
        return getattr(simt, operator)
    if backend_name == "triton-interpreter":
        from wanda_kernels import triton

        return getattr(triton, operator)
    if backend_name == "cuda":
        return _on_cuda(operator)
    return _on_cpu(backend_name.removeprefix("cpu-"), operator)
