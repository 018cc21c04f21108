"""A safetensors checkpoint by positions: what lies where, read and written without mapping a file.

A mapping's touched pages count as resident memory, and a full disk under a mapping is a SIGBUS; positioned reads and
writes have neither fault. Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, data).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CHUNK = 16 * 2**20  # of copies
SAMPLE = 4096  # bytes that a fingerprint takes at the begin, in the middle and at the end of a tensor


@dataclass(frozen=True)
class Entry:
    """One tensor: bytes [begin, end) of ``file``."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


def json_object(content: bytes, what: str) -> dict[str, Any]:
    """A JSON object of a file that may be damaged.

    Raises:
        ValueError: it is none, or says two things of one name (readers differ in which one counts).
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if found.setdefault(name, value) != value:
                raise ValueError(f"it has {name[:200]} twice, with other values")
        return found

    try:
        found = json.loads(content, object_pairs_hook=once)
    except RecursionError:
        raise ValueError(f"{what} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is damaged: it must be a JSON object, it is {str(found)[:50]}")
    return found


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_at(fd: int, buffer: memoryview, offset: int, what: str) -> None:
    """Fill ``buffer`` from ``offset`` on. Raises OSError where the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done : done + CHUNK]], offset + done)
        if count == 0:
            raise OSError(f"{what} is truncated: it ends at byte {offset + done}")
        done += count


def write_at(fd: int, buffer: memoryview | bytes, offset: int, what: Path | str) -> None:
    """Write ``buffer`` from ``offset`` on. Raises OSError that names ``what`` is written."""
    buffer = memoryview(buffer)
    done = 0
    try:
        while done < len(buffer):
            done += os.pwritev(fd, [buffer[done : done + CHUNK]], offset + done)
    except OSError as error:
        raise OSError(f"{what} could not be written: {error.strerror}") from error


def open_own(path: Path, flags: int, mode: int = 0o600) -> int:
    """Opens a file that this package wrote, or writes: a descriptor.

    Raises:
        OSError: it is a link, no plain file, known by a second name, or another user's: what is written there would
            be written elsewhere.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{path} is a link: it is not followed") from error
        raise
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_uid != os.geteuid():
        os.close(fd)
        raise OSError(f"{path} is not a plain file of this user's under one name: it is not used")
    return fd


def own_size(path: Path) -> int:
    """Bytes of a file that this package wrote. Raises ValueError where it is gone or is no longer a plain file."""
    try:
        fd = open_own(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{path} is gone or no plain file: {error}") from error
    size = os.fstat(fd).st_size
    os.close(fd)
    return size


class Checkpoint:
    """The tensors of a model folder.

    Args:
        folder: with ``model.safetensors``, or an index and the shards that it names.
        files: these files of it instead, whatever their names.

    Raises:
        FileNotFoundError, ValueError: a folder without either, or with both; a shard that is missing, damaged or
            truncated; an index that disagrees with its shards.
    """

    def __init__(self, folder: Path, files: Iterable[str] | None = None) -> None:
        self.folder = folder
        self.index: str | None = None
        self.files: dict[str, bytes] = {}  # name -> its first bytes, up to the data
        self.entries: dict[str, Entry] = {}
        self._fds: dict[str, int] = {}
        if files is not None:
            for name in files:
                self._add(name)
        elif (folder / SINGLE).is_file():
            if (folder / INDEX).is_file() and set(self._weight_map().values()) != {SINGLE}:  # one would be dropped
                raise ValueError(
                    f"{folder} holds {SINGLE} and also {INDEX} of other files: take away the one that does not count"
                )
            self._add(SINGLE)
        elif (folder / INDEX).is_file():
            self.index = INDEX
            self._add_shards()
        else:
            raise FileNotFoundError(
                f"{folder} holds neither {SINGLE} nor {INDEX}: only safetensors checkpoints can be streamed"
            )

    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX
        index = json_object(path.read_bytes(), f"index {path}")
        weight_map = index.get("weight_map")
        if not isinstance(index.get("metadata"), dict):
            raise ValueError(f"{path} is no index of a checkpoint: its metadata must be an object")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{path} is no index of a checkpoint: its weight_map must name a file for each tensor")
        return weight_map

    def _add_shards(self) -> None:
        path = self.folder / INDEX
        weight_map = self._weight_map()
        for name in sorted(set(weight_map.values())):
            if os.path.basename(name) != name or not name or len(name) > 255 or "\0" in name:
                raise ValueError(f"{path} names the shard '{name[:100]}': it must lie in the same folder")
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{path} names the shard {name}, which is not there")
            self._add(name)
        for tensor, name in weight_map.items():
            there = self.entries.get(tensor)
            if there is None or there.file != name:
                raise ValueError(
                    f"{path} has {tensor} in {name}, it is {f'in {there.file}' if there else 'in none of the shards'}"
                )

    def _add(self, name: str) -> None:
        path = self.folder / name
        try:
            with safe_open(path, "pt"):  # the library's own checks: header, no holes, no overlap, length
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated: {error}") from error
        with path.open("rb") as file:
            length = file.read(8)
            head = length + file.read(int.from_bytes(length, "little"))
        self.files[name] = head
        for tensor, entry in json_object(head[8:], f"the header of {path}").items():
            if tensor == "__metadata__":
                continue
            if tensor in self.entries:
                raise ValueError(f"{tensor} is in two shards: {self.entries[tensor].file} and {name}")
            begin, end = (len(head) + offset for offset in entry["data_offsets"])
            self.entries[tensor] = Entry(name, entry["dtype"], tuple(entry["shape"]), begin, end)

    @property
    def size(self) -> int:
        """Bytes of all the files."""
        heads = sum(len(head) for head in self.files.values())
        return heads + sum(entry.size for entry in self.entries.values())

    def size_of(self, name: str) -> int:
        """Bytes of the file ``name``."""
        ends = (entry.end for entry in self.entries.values() if entry.file == name)
        return max(ends, default=len(self.files[name]))

    def fd(self, name: str) -> int:
        if name not in self._fds:
            self._fds[name] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        return self._fds[name]

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def read(self, tensor: str, into: Tensor, begin: int = 0) -> None:
        """Read a tensor, or what of it begins at byte ``begin``, into a contiguous CPU tensor of that size."""
        entry = self.entries[tensor]
        read_at(self.fd(entry.file), bytes_of(into), entry.begin + begin, str(self.folder / entry.file))

    def load(self, tensor: str) -> Tensor:
        entry = self.entries[tensor]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{tensor} is {entry.dtype} in {entry.file}, it must be one of {', '.join(DTYPES)}")
        loaded = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self.read(tensor, loaded)
        return loaded

    def fingerprints(self) -> dict[str, str]:
        """Tensor -> hash of its dtype, shape and place, and of its first, middle and last 4 KiB: enough to tell
        one training run's weights from another's without reading the model."""
        found = {}
        for name, entry in self.entries.items():
            digest = hashlib.sha256(repr(entry).encode())
            middle = entry.begin + max(0, entry.size // 2 - SAMPLE // 2)
            for begin in (entry.begin, middle, max(entry.begin, entry.end - SAMPLE)):
                buffer = bytearray(min(SAMPLE, entry.end - begin))
                read_at(self.fd(entry.file), memoryview(buffer), begin, entry.file)
                digest.update(buffer)
            found[name] = digest.hexdigest()[:32]
        return found


class CheckpointWriter:
    """Files with the names, headers and places of another checkpoint's, written in any order.

    Args:
        folder: to write to.
        source: whose tensors go to the same places.
    """

    def __init__(self, folder: Path, source: Checkpoint) -> None:
        self._folder = folder
        self._source = source
        self._fds: dict[str, int] = {}
        self._sizes: dict[str, int] = {}  # what each file must have by now
        self._touched: set[str] = set()

    def _fd(self, name: str) -> int:
        if name not in self._fds:
            self._fds[name] = open_own(self._folder / name, os.O_RDWR | os.O_CREAT, 0o644)
            write_at(self._fds[name], self._source.files[name], 0, self._folder / name)
            self._sizes[name] = os.fstat(self._fds[name]).st_size
        self._touched.add(name)
        return self._fds[name]

    def _write(self, name: str, data: memoryview, offset: int) -> None:
        fd = self._fd(name)
        self._check_size(name)  # a file that somebody cut would grow again here, with zeros in between
        write_at(fd, data, offset, self._folder / name)
        self._sizes[name] = max(self._sizes[name], offset + len(data))

    def write(self, tensor: str, data: Tensor, begin: int = 0) -> None:
        """``data``: a contiguous CPU tensor of that tensor's dtype, to its bytes from ``begin`` on."""
        entry = self._source.entries[tensor]
        self._write(entry.file, bytes_of(data), entry.begin + begin)

    def copy(self, tensor: str) -> None:
        """Byte for byte from the source."""
        entry = self._source.entries[tensor]
        buffer = memoryview(bytearray(min(CHUNK, entry.size)))
        for begin in range(entry.begin, entry.end, CHUNK):
            part = buffer[: min(CHUNK, entry.end - begin)]
            read_at(self._source.fd(entry.file), part, begin, entry.file)
            self._write(entry.file, part, begin)

    def create_all(self) -> None:
        """Also the files in which nothing was written."""
        for name in self._source.files:
            self._fd(name)

    def sync(self) -> None:
        """What was written so far is on the disk, under its name, or an error says why not."""
        for name in self._touched:
            self._check_name(name)
            os.fdatasync(self._fds[name])
        self._touched.clear()

    def _check_size(self, name: str) -> None:
        if os.fstat(self._fds[name]).st_size < self._sizes[name]:
            raise OSError(f"{self._folder / name} was shortened while it was written")

    def _check_name(self, name: str) -> None:
        self._check_size(name)
        path, found = self._folder / name, os.fstat(self._fds[name])
        if found.st_nlink == 0 or not path.exists() or not os.path.samestat(found, os.lstat(path)):
            raise FileNotFoundError(f"{path} was removed while it was written")

    def check_written(self, tensors: Iterable[str]) -> None:
        """Raises ValueError where a file is too short to hold the ``tensors`` that were written to it, is gone or is
        no longer a plain file."""
        ends: dict[str, int] = {}
        for tensor in tensors:
            entry = self._source.entries[tensor]
            ends[entry.file] = max(entry.end, ends.get(entry.file, 0))
        for name, end in ends.items():
            path = self._folder / name
            size = own_size(path)
            if not end <= size <= self._source.size_of(name):
                raise ValueError(f"{path} has {size} bytes, at least {end} were written")

    def check_whole(self) -> None:
        """Raises OSError where a file has not the size, or lies no longer under the name, that it must have."""
        for name in self._source.files:
            self._check_name(name)
            size, wanted = os.fstat(self._fds[name]).st_size, self._source.size_of(name)
            if size != wanted:
                raise OSError(f"{self._folder / name} has {size} bytes, it must have {wanted}")

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._touched.clear()
