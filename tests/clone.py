"""The repository as a plain clone, with an interpreter that has what a machine with a GPU has and no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# Not gguf, datasets, lm-eval, and not wanda_kernels itself.
PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "matplotlib", "peft", "pytest", "hypothesis", "ninja", "pybind11",
    "setuptools", "typer", "rich",
)  # fmt: skip


def make(folder: Path) -> tuple[Path, Path]:
    """The clone and its interpreter."""
    return _copy(folder / "clone"), interpreter(folder / "environment")


def environment() -> dict[str, str]:
    """For processes in it: nothing of this checkout, one thread."""
    return {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OUT", "TRITON_INTERPRET")
    } | {"OMP_NUM_THREADS": "1"}


def _copy(clone: Path) -> Path:
    """What git tracks or would: no extension that was built here."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    return clone


def interpreter(home: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    packages = next(home.glob("lib/python*/site-packages"))
    for distribution in _closure():
        for file in distribution.files or ():
            name = file.parts[0]
            if name not in ("..", "__pycache__") and not (packages / name).is_symlink():
                (packages / name).symlink_to(Path(str(distribution.locate_file(name))))
    return home / "bin" / "python"


def _closure() -> list[metadata.Distribution]:
    """``PACKAGES``, where they are installed, and all that they require."""
    installed = {_canonical(each.metadata["Name"]): each for each in metadata.distributions()}
    wanted, found = [name for name in PACKAGES if name in installed], {}
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        found[name] = installed[name]
        for line in found[name].requires or ():
            required = Requirement(line)
            if required.marker is None or required.marker.evaluate({"extra": ""}):
                wanted.append(_canonical(required.name))
    return list(found.values())


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
