"""Builds wanda_kernels._C in place, for the card that is here and no other: a stage of gpu_suite.py.

The package is not imported: an extension of an older build would not load. TORCH_CUDA_ARCH_LIST says otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from benchmarks.places import ROOT


def main() -> None:
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        try:
            major, minor = torch.cuda.get_device_capability()
        except (RuntimeError, AssertionError) as error:  # no driver, no card, or a torch without CUDA
            sys.exit(f"summary: no card to build for, and TORCH_CUDA_ARCH_LIST names none: {error}")
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    print(f"for {os.environ['TORCH_CUDA_ARCH_LIST']}", flush=True)
    sys.exit(subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
