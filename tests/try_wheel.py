"""Installs a wheel into a new environment that has no compiler, and prunes a tiny model there on its compiled kernels.

python tests/try_wheel.py dist/wanda_kernels-*.whl
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import clone
import saved

PRUNE = ["-m", "wanda_kernels", "prune", "model", "--out", "pruned", "--calibration", "text.txt"]
PRUNE += ["--samples", "4", "--length", "32"]
CHECK = """
import torch, wanda_kernels
from wanda_kernels import _backend, ops
assert _backend.extension is not None, _backend.cpu_status
weight = torch.randn(8, 256)
ops.prune_rows_(weight, torch.ones(256), 0.5)
assert int((weight == 0).sum()) == 8 * 128
print(wanda_kernels.__file__, _backend.cpu_status, _backend.cuda_status, sep="\\n")
"""


def main() -> None:
    wheel = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory(prefix="wheel-") as scratch:
        folder = Path(scratch)
        python = clone.interpreter(folder / "environment")
        # pip of this environment installs into the other one; the wheel alone, without a network
        install = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
        ]
        subprocess.run([*install, wheel], check=True)
        saved.save_model(folder / "model")
        (folder / "text.txt").write_text(saved.text(2000))
        without = clone.environment() | {"PATH": str(python.parent), "CXX": "/no/compiler", "CUDA_HOME": "/no/toolkit"}
        said = subprocess.run([python, "-c", CHECK], cwd=folder, env=without, capture_output=True, text=True)
        if said.returncode or str(python.parent.parent) not in said.stdout:
            sys.exit(f"{wheel.name} does not run:\n{said.stdout}{said.stderr}")
        subprocess.run([python, *PRUNE], cwd=folder, env=without, check=True)
        if not (folder / "pruned" / "model.safetensors").is_file():
            sys.exit(f"{wheel.name}: nothing was pruned")
        print(f"{wheel.name}, {os.path.getsize(wheel) / 2**20:.1f} MiB: installs and prunes without a compiler")
        print(said.stdout.strip())


if __name__ == "__main__":
    main()
