"""Compiles the shipped CUDA kernel headers with g++ and runs them on the CPU, one fiber a thread (simt.h)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SOURCES = (".h", ".cpp", ".cuh", ".cu")
MARGIN = 64  # bytes on both sides of a buffer that no kernel may touch
ORDERS = ("forward", "reverse", "random", "warp")
KINDS = ("barrier", "mask", "copy wait")

# -fsanitize=thread calls our own hooks, which are not libtsan's: the flag is not given to the linker.
INSTRUMENTED = ["-O1", "-fsanitize=thread", "-fno-threadsafe-statics", "-ffp-contract=off", "-Wno-unknown-pragmas"]


class SimtError(AssertionError):
    """A race, a bad access, a divergent barrier or a mask that does not fit its lanes."""


def compiler() -> str | None:
    return shutil.which("g++")


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled kernels, once a process: two copies would share their C++ statics. In build/, under a name that is
    made of their sources, so that only who changes a kernel waits half a minute."""
    library = ROOT / "build" / f"simt-{_digest()}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            os.replace(_build(Path(directory)), library)
    loaded = ctypes.CDLL(str(library))
    loaded.simt_errors.restype = loaded.simt_sites.restype = ctypes.c_char_p
    return loaded


def _digest() -> str:
    files = [file for folder in (HERE, ROOT / "csrc") for file in sorted(folder.rglob("*")) if file.suffix in SOURCES]
    made_of = [subprocess.run([str(compiler()), "--version"], capture_output=True, check=True).stdout]
    for file in (Path(__file__), *files):
        made_of += [file.name.encode(), file.read_bytes()]
    return hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]


def _build(directory: Path) -> Path:
    objects = []
    sources = {"simt.cpp": ["-O2"], "hooks.cpp": ["-O2"], "matrix.cpp": ["-O2"], "kernels.cpp": INSTRUMENTED}
    for source, flags in sources.items():
        target = directory / (source + ".o")
        command = [compiler(), "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags, f"-I{HERE}"]
        subprocess.run([*command, "-c", str(HERE / source), "-o", str(target)], check=True)
        objects.append(str(target))
    library = directory / "simt.so"
    subprocess.run([compiler(), "-shared", "-Wl,-z,defs", *objects, "-o", str(library)], check=True)
    return library


@dataclass(frozen=True)
class Site:
    file: str
    line: int
    kind: str
    visits: int


class Buffer:
    """A copy of a tensor with margins: 16-byte aligned plus `offset` bytes, `gap` elements after each row."""

    def __init__(self, tensor: torch.Tensor, name: str, writable: bool = True, offset: int = 0, gap: int = 0) -> None:
        self.name, self.writable = name, writable
        rows = tensor.shape[0] if gap else 1
        self._size = tensor.numel() * tensor.element_size()
        self._stride = self._size // max(rows, 1) + gap * tensor.element_size()
        self.size = self._size + (rows - 1) * gap * tensor.element_size()
        self._memory = torch.full((self.size + 2 * MARGIN + 32 + offset,), 0xA5, dtype=torch.uint8)
        self._start = MARGIN + -(self._memory.data_ptr() + MARGIN) % 16 + offset
        row_bytes = self._size // max(rows, 1)
        self._view = self._memory[self._start :].as_strided((rows, row_bytes), (self._stride, 1), self._start)
        self._view.copy_(tensor.contiguous().view(-1).view(torch.uint8).view(rows, row_bytes))
        self._shape, self._dtype = tensor.shape, tensor.dtype

    @property
    def pointer(self) -> int:
        return self._memory.data_ptr() + self._start

    def tensor(self) -> torch.Tensor:
        outside = self._memory.clone()
        outside.as_strided(self._view.shape, self._view.stride(), self._start).fill_(0xA5)
        assert bool((outside == 0xA5).all()), f"{self.name}: written outside its rows"
        return self._view.clone().view(-1).view(self._dtype).view(self._shape)


class Machine:
    """Launches kernels in one thread order; `disabled` names a site to switch off (see `sites`)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.order, self.seed, self.races = "forward", 0, True
        self.disabled, self.removed_lane = -1, 31

    def sites(self) -> list[Site]:
        """Every barrier, mask and copy wait that was reached so far; the index is the site's number."""
        lines = self.library.simt_sites().decode().splitlines()
        fields = [line.split() for line in lines]
        return [Site(file, int(line), KINDS[int(kind)], int(visits)) for file, line, kind, visits in fields]

    def run(self, function: str, buffers: list[Buffer], *arguments: object) -> None:
        library = self.library
        library.simt_reset(
            ORDERS.index(self.order), ctypes.c_uint64(self.seed), int(self.races), self.disabled, self.removed_lane
        )
        for buffer in buffers:
            library.simt_region(
                ctypes.c_void_p(buffer.pointer), ctypes.c_size_t(buffer.size), buffer.name.encode(), buffer.writable
            )
        getattr(library, function)(*arguments)
        errors = library.simt_errors().decode()
        if errors:
            raise SimtError(errors)
