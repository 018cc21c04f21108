"""The hidden folder beside the output: what is done so far, and the lock that keeps a second run out."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..models.save import put_in_place
from .activations import TwoFiles

VERSION = 1


class WorkFolder:
    """``.OUT.partial`` beside the output folder ``OUT``.

    It holds ``folder`` (the output so far), ``state.json`` (what of it is done, see :meth:`commit`), activations, and
    ``lock``. At the end ``folder`` becomes ``OUT`` by a rename, and the rest goes.

    Args:
        out: the output folder.

    Raises:
        RuntimeError: another process works on it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = path_for(out)
        self.folder = self.path / "folder"
        out.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        self.folder.mkdir(exist_ok=True)
        self.files: TwoFiles | None = None

    def choose_files(self, state: dict[str, Any] | None, offload: str | Path | None) -> TwoFiles:
        """Where activations go: as before if a state has some, else to ``offload``, or here."""
        stored = state["activations"] if state is not None else None
        self.files = TwoFiles.of(stored["file"]) if stored is not None else TwoFiles.beside(self.path, offload)
        return self.files

    def _take_lock(self) -> int:
        while True:
            self.path.mkdir(exist_ok=True)
            try:
                fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # removed by a run that ended just now
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
                os.close(fd)
                raise RuntimeError(f"output folder {self.out} is being written by process {holder}") from None
            try:
                if os.path.samestat(os.fstat(fd), os.stat(self.path / "lock")):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, str(os.getpid()).encode(), 0)
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)  # a run that ended just now took the folder away between the opening and the locking

    def state(self) -> dict[str, Any] | None:
        return read_state(self.out)

    def commit(self, state: dict[str, Any]) -> None:
        """Replace ``state.json`` at once: a run that dies at any moment leaves the old or the new one."""
        temporary = self.path / "state.new"
        with temporary.open("w") as file:
            json.dump(state | {"version": VERSION}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / "state.json")

    def clear(self) -> None:
        """Forget what an earlier run left."""
        path = self.path / "state.json"
        # there may be no state, a damaged one, or one without activations
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            TwoFiles.of(json.loads(path.read_text())["activations"]["file"]).remove()
        path.unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def publish(self) -> None:
        """``folder`` becomes the output."""
        put_in_place(self.folder, self.out)
        self.remove()

    def remove(self) -> None:
        if self.files is not None:
            self.files.remove()
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def release(self) -> None:
        """Leave it for :option:`--resume`."""
        os.close(self._lock)


def path_for(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def read_state(out: Path) -> dict[str, Any] | None:
    """The state that an unfinished run to ``out`` left, or None."""
    path = path_for(out) / "state.json"
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; remove {path.parent} to start anew") from error
    if state.get("version") != VERSION:
        raise ValueError(f"{path} was written by another version of wanda_kernels: remove {path.parent} to start anew")
    return state
