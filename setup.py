"""Builds wanda_kernels._C against the torch that is installed: pip install --no-build-isolation .

Without a C++ compiler the package installs all the same and runs on its PyTorch reference (`wanda-kernels info`
says so). WANDA_KERNELS_NO_EXTENSION=1 asks for that. A compiler that fails is an error, never a silent fallback.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
COMPILE_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]


def why_not_built() -> str | None:
    """The reason not to build the extension, or None."""
    if os.environ.get("WANDA_KERNELS_NO_EXTENSION") == "1":
        return "WANDA_KERNELS_NO_EXTENSION=1 is set"
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"no C++ compiler was found ({', '.join(compilers)})"
    return None


def extension_arguments() -> dict:
    reason = why_not_built()
    if reason:
        print(f"wanda_kernels: {reason}; installing with the PyTorch reference only", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    sources += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    headers = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")]
    extension = CppExtension(
        "wanda_kernels._C",
        sources=sources,
        depends=[*headers, "wanda_kernels/schemas.def"],
        extra_compile_args={"cxx": COMPILE_FLAGS},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension_arguments())
