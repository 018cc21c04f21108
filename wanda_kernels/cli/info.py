"""``wanda-kernels info``: versions, which backends are on and why, processor and GPU."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from rich.table import Table
from rich.text import Text

from .._version import __version__
from .options import Debug

PACKAGES = ("torch", "transformers", "triton", "safetensors", "datasets", "gguf", "lm_eval")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()


def gather() -> dict[str, dict[str, str]]:
    """Section -> name -> value, all that ``info`` prints."""
    import torch

    from .. import _backend
    from ..packed import dispatch

    versions = {"python": platform.python_version(), "wanda_kernels": __version__}
    versions |= {name: _version(name) for name in PACKAGES}
    backends = {"cpu": _backend.cpu_status, "cuda": _backend.cuda_status}
    backends["triton"] = "installed" if importlib.util.find_spec("triton") else "not installed"
    cpu = {"processor": processor_name(), "cores": str(os.cpu_count()), "torch threads": str(torch.get_num_threads())}
    if _backend.extension is not None:
        module = _backend.extension
        cpu["instruction sets"] = ", ".join(module.available_isas())
        cpu["in use"] = f"{module.isa()} (WANDA_KERNELS_ISA=scalar|avx2|avx512 forces one)"
        cpu["features"] = ", ".join(name for name, there in module.cpu_features().items() if there) or "none"
        build = {str(name): str(value) for name, value in module.build_info().items()}
    else:
        build = {"extension": _backend.cpu_status}
    gpu = {"cuda": f"torch built with {torch.version.cuda}" if torch.version.cuda else "torch built without CUDA"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpu[f"device {index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
    if torch.cuda.device_count() == 0:
        gpu["device"] = "none"
    # Of packed products. In this process none was timed: these are the ones of WANDA_KERNELS_DISPATCH.
    choices = dict(dispatch.choices()) or {
        "packed products": "timed at the first use of a shape (WANDA_KERNELS_DISPATCH)"
    }
    return {"versions": versions, "backends": backends, "cpu": cpu, "build": build, "gpu": gpu, "dispatch": choices}


def info_command(debug: Debug = False) -> None:
    """Show versions, backends (on or off, and why), processor features and GPUs."""
    from .display import screen

    table = Table(show_header=False, box=None, pad_edge=False)
    for section, entries in gather().items():
        for number, (name, value) in enumerate(entries.items()):
            table.add_row(Text(section if number == 0 else "", "bold"), name, value)
        table.add_section()
    screen().print(table)
