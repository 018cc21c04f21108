"""Builds wanda_kernels._C against the torch that is installed: pip install --no-build-isolation .

With a CUDA torch and nvcc the CUDA kernels are built too; that takes no GPU. nvcc is CUDA_HOME's, the one on PATH, or
the package index's (the extra `nvcc`, installed before). WANDA_KERNELS_NO_CUDA=1 leaves them out, TORCH_CUDA_ARCH_LIST
says for which architectures (default "8.0;9.0+PTX", and 10.0 where nvcc has it).
Without a C++ compiler the package installs all the same and runs on its PyTorch reference (`wanda-kernels info`
says so). WANDA_KERNELS_NO_EXTENSION=1 asks for that. A compiler that fails is an error, never a silent fallback.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
COMPILE_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
NVCC_FLAGS = ["-O3", "-Xcompiler=-fvisibility=hidden"]


def why_not_built() -> str | None:
    """The reason not to build the extension, or None."""
    if os.environ.get("WANDA_KERNELS_NO_EXTENSION") == "1":
        return "WANDA_KERNELS_NO_EXTENSION=1 is set"
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"no C++ compiler was found ({', '.join(compilers)})"
    return None


def openmp_flags() -> list[str]:
    """What makes at::parallel_for run in threads: without it, it is a plain loop, and says nothing."""
    compiler = (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "clang++").split()
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"
    command = [*compiler, "-fopenmp", "-x", "c++", "-", "-o", os.devnull]
    if subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0:
        return ["-fopenmp"]
    print("wanda_kernels: the compiler has no OpenMP; the CPU kernels will run in one thread", file=sys.stderr)
    return []


def find_toolkit() -> None:
    """Sets CUDA_HOME to a folder with compiler and headers. torch would take the folder above the nvcc on PATH, which
    may be a link or a wrapper far from the headers."""
    nvcc = shutil.which("nvcc")
    guesses = [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent] if nvcc else []
    for home in [*guesses, Path("/usr/local/cuda"), *wheels()]:
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime_api.h").exists():
            os.environ.setdefault("CUDA_HOME", str(home))


def wheels() -> list[Path]:
    """Folders of NVIDIA's wheels in this environment."""
    found = importlib.util.find_spec("nvidia")
    places = (found.submodule_search_locations or []) if found else []
    return sorted(folder for place in places for folder in Path(place).iterdir() if folder.is_dir())


def is_index_nvcc() -> bool:
    """Rather than a toolkit's: ``wanda-kernels info`` says so."""
    from torch.utils.cpp_extension import CUDA_HOME

    return Path(CUDA_HOME or "") in wheels()


def linkable_runtime() -> list[str]:
    """A folder with libcudart.so, where the toolkit has it under another name alone, as the wheels do."""
    from torch.utils.cpp_extension import CUDA_HOME

    runtimes = sorted((Path(CUDA_HOME or "") / "lib").glob("libcudart.so.*"))
    if not runtimes or (runtimes[0].parent / "libcudart.so").exists():
        return []
    link = ROOT / "build" / "cudart" / "libcudart.so"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(runtimes[0])
    return [str(link.parent)]


def why_no_cuda() -> str | None:
    """The reason not to build the CUDA kernels, or None. Whether a GPU is here does not matter."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if os.environ.get("WANDA_KERNELS_NO_CUDA") == "1":
        return "WANDA_KERNELS_NO_CUDA=1 is set"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not nvcc.exists() or not (Path(CUDA_HOME) / "include" / "cuda_runtime_api.h").exists():
        return f"no CUDA toolkit for the CUDA {torch.version.cuda} of this torch was found (CUDA_HOME is {CUDA_HOME})"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.\d+", said)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"this torch was built with CUDA {torch.version.cuda}, {nvcc} is {release[0] if release else 'unknown'}"
    return None


def architectures() -> str:
    """The default: A100, H100 (its PTX serves later cards) and, where nvcc compiles for it, B200."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return "8.0;9.0+PTX;10.0" if "sm_100" in known else "8.0;9.0+PTX"


def cusparse_flags() -> list[str]:
    """torch's headers include cusparse.h; where the toolkit lacks it, the wheels that torch requires have it."""
    from torch.utils.cpp_extension import CUDA_HOME

    if (Path(CUDA_HOME or "") / "include" / "cusparse.h").exists():
        return []
    return next((["-isystem", str(f / "include")] for f in wheels() if (f / "include" / "cusparse.h").exists()), [])


def files(folder: str, *patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / folder).glob(pattern))


def extension_arguments() -> dict:
    reason = why_not_built()
    if reason:
        print(f"wanda_kernels: {reason}; installing with the PyTorch reference only", file=sys.stderr)
        return {}
    find_toolkit()  # before the import: torch reads CUDA_HOME there
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = files("csrc", "*.cpp", "cpu/*.cpp")
    openmp = openmp_flags()
    flags = {"cxx": [*COMPILE_FLAGS, *openmp]}
    no_cuda = why_no_cuda()
    if no_cuda:
        print(f"wanda_kernels: {no_cuda}; building the CPU kernels only", file=sys.stderr)
    else:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
        sources += files("csrc/cuda", "*.cpp", "*.cu")
        flags = {
            "cxx": [
                *flags["cxx"],
                "-DWANDA_WITH_CUDA",
                f"-DWANDA_INDEX_NVCC={int(is_index_nvcc())}",
                *cusparse_flags(),
            ],
            "nvcc": [*NVCC_FLAGS, *cusparse_flags()],
        }
    extension = (CppExtension if no_cuda else CUDAExtension)(
        "wanda_kernels._C",
        sources=sources,
        depends=[*files("csrc", "**/*.h", "**/*.cuh"), "wanda_kernels/schemas.def"],
        extra_compile_args=flags,
        extra_link_args=openmp,
        library_dirs=[] if no_cuda else linkable_runtime(),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension_arguments())
