"""Which implementation serves the ``wanda::`` operators, and why.

CPU tensors run the C++ kernels of ``wanda_kernels._C``, CUDA tensors its CUDA kernels. Where the extension is not
built, or built without CUDA, the PyTorch reference serves them; ``wanda-kernels info`` says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from importlib import resources
from types import ModuleType

import torch

from . import reference

NAMESPACE = "wanda"
_REFERENCE_ONLY = "WANDA_KERNELS_REFERENCE"


def _load_extension() -> tuple[ModuleType | None, str]:
    """The compiled module and why it is on or off."""
    if os.environ.get(_REFERENCE_ONLY) == "1":
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
    return module, f"C++ kernels, {module.isa()}"


def schemas() -> dict[str, str]:
    """Operator name -> schema, from the one list of them (``schemas.def``)."""
    text = resources.files("wanda_kernels").joinpath("schemas.def").read_text()
    return {schema.split("(")[0]: schema for schema in re.findall(r'^SCHEMA\("(.*)"\)$', text, re.MULTILINE)}


extension, cpu_status = _load_extension()
_built_cuda = extension.build_info().get("cuda") if extension else None
if _built_cuda:
    cuda_status = f"CUDA kernels, built with CUDA {_built_cuda}"
else:
    cuda_status = "this build has no CUDA kernels: the PyTorch reference serves CUDA tensors"
if not torch.cuda.is_available():
    cuda_status += "; torch sees no CUDA device"


def serves_reference(device_type: str) -> bool:
    """Whether tensors on ``cpu`` or ``cuda`` run the PyTorch reference."""
    return extension is None or (device_type == "cuda" and not _built_cuda)


# Kept for the life of the process: a Library that is collected takes its registrations with it.
_library = torch.library.Library(NAMESPACE, "IMPL" if extension else "DEF")
for _name, _schema in schemas().items():
    if serves_reference("cpu"):
        _library.define(_schema)
        _library.impl(_name, getattr(reference, _name), "CPU")
    if serves_reference("cuda"):
        _library.impl(_name, getattr(reference, _name), "CUDA")
