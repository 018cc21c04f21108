"""Which implementation serves the ``wanda::`` operators, and why (docs/design.md); ``wanda-kernels info`` says so."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from importlib import resources
from types import ModuleType
from typing import Any

import torch

from . import reference

NAMESPACE = "wanda"
_REFERENCE_ONLY = "WANDA_KERNELS_REFERENCE"


def schemas() -> dict[str, str]:
    """Operator name -> schema, from the one list of them (``schemas.def``)."""
    text = resources.files("wanda_kernels").joinpath("schemas.def").read_text()
    return {schema.split("(")[0]: schema for schema in re.findall(r'^SCHEMA\("(.*)"\)$', text, re.MULTILINE)}


def fake(op: str, check: Callable[..., object], empty: Callable[..., Any] = lambda *_: None) -> None:
    """Registers an operator's fake implementation: its ``check`` of the arguments, then an ``empty`` output."""

    @torch.library.register_fake(f"{NAMESPACE}::{op}")
    def _(*arguments: Any) -> Any:
        check(op, *arguments)
        return empty(*arguments)


def _load_extension() -> tuple[ModuleType | None, str]:
    """The compiled module and why it is on or off."""
    wanted = os.environ.get(_REFERENCE_ONLY, "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"{_REFERENCE_ONLY} must be 0 or 1, got '{wanted}'")
    if wanted == "1":
        return None, f"{_REFERENCE_ONLY}=1 is set"
    if importlib.util.find_spec("wanda_kernels._C") is None:
        return None, (
            "wanda_kernels._C is not built (no C++ compiler at installation); install one and run: "
            "pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    try:
        module = importlib.import_module("wanda_kernels._C")
    except ImportError as error:
        raise ImportError(
            f"wanda_kernels._C does not load with torch {torch.__version__}: {error}. It was built for another "
            "torch or Python; reinstall the package (pip install --no-build-isolation --force-reinstall "
            f"--no-deps .), or set {_REFERENCE_ONLY}=1 to run on the PyTorch reference."
        ) from error
    missing = [name for name in schemas() if not hasattr(getattr(torch.ops, NAMESPACE), name)]
    if missing:
        raise ImportError(
            f"wanda_kernels._C is older than the package's Python files (it lacks {', '.join(missing)}); reinstall the "
            "package (pip install --no-build-isolation --force-reinstall --no-deps .)"
        )
    try:
        return module, f"C++ kernels, {module.isa()}"
    except ValueError as error:
        raise ValueError(f"WANDA_KERNELS_ISA: {error}") from error


extension, cpu_status = _load_extension()
_built_cuda = extension.build_info().get("cuda") if extension else None
_has_triton = importlib.util.find_spec("triton") is not None
_NOT_IN_CUDA = (
    "rms_norm_sqnorm", "silu_mul_sqnorm", "gelu_tanh_mul_sqnorm", "norm_of_sequences", "sparsegpt_block", "pack_bitmap",
    "pack_sparse24",
)  # fmt: skip
# The first four: cuBLAS's products.
_REFERENCE_ON_CUDA = (
    "add_gram_", "solve_rows_", "calibrate_levels_", "dense_linear", "quantize", "exact_levels", "pack_kept_",
)  # fmt: skip


def cuda_kernels(name: str) -> str:
    """What runs an operator, or a step of the driver, on CUDA tensors: ``cuda``, ``triton`` or ``reference``."""
    if _built_cuda and name not in (*_NOT_IN_CUDA, *_REFERENCE_ON_CUDA):
        return "cuda"
    return "triton" if _has_triton and name in (*_NOT_IN_CUDA, "add_sqnorm_") else "reference"


def serves_reference(device_type: str) -> bool:
    """Whether selection on ``cpu`` or ``cuda`` runs the PyTorch reference."""
    return extension is None or (device_type == "cuda" and not _built_cuda)


def _describe_cuda() -> str:
    triton = "Triton" if _has_triton else "the PyTorch reference (no Triton)"
    if _built_cuda:
        status = (
            f"CUDA kernels, built with CUDA {_built_cuda}; fused statistics by {triton}; Gram matrices, "
            "updates of weights and levels, and products of dense layers by PyTorch's"
        )
    elif os.environ.get(_REFERENCE_ONLY) == "1":
        status = f"the PyTorch reference: {_REFERENCE_ONLY}=1 is set"
    else:
        status = (
            "this build has no CUDA kernels (`make CUDA=1 install` in a checkout builds them, with the package index's "
            "nvcc where there is no toolkit; or pip install --no-build-isolation where nvcc is): the PyTorch reference "
            f"serves CUDA tensors, and {triton} their statistics"
        )
    return status if torch.cuda.is_available() else f"{status}; torch sees no CUDA device"


def in_triton(name: str) -> Callable[..., Any]:
    """The launcher of that name."""

    def call(*args: Any) -> Any:
        from . import triton  # takes a moment, and only CUDA tensors need it

        return getattr(triton, name)(*args)

    return call


def without_autocast(operator: Any, key: str) -> Callable[..., Any]:
    """``operator`` as it computes outside of autocast, which would turn the products inside of it to other types: on
    one of its threads alone."""
    autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operator(*args, **kwargs)

    return call


cuda_status = _describe_cuda()

# Kept for the life of the process: a Library that is collected takes its registrations with it.
_library = torch.library.Library(NAMESPACE, "IMPL" if extension else "DEF")
for _name, _schema in schemas().items():
    if serves_reference("cpu"):
        _library.define(_schema)
        _library.impl(_name, getattr(reference, _name), "CPU")
    if cuda_kernels(_name) != "cuda":
        _library.impl(_name, in_triton(_name) if cuda_kernels(_name) == "triton" else getattr(reference, _name), "CUDA")
    for _key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(_name, without_autocast(getattr(getattr(torch.ops, NAMESPACE), _name).default, _key), _key)
