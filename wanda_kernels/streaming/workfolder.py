"""The hidden folder beside the output: what is done so far, what it was begun with, which what goes on with it must be
the same as, and the lock that keeps a second run out.

What lies there is believed only as far as it can be checked: links are not followed, other users' files are not used,
and a state counts only for the very folder, by its inode, that it was written for. So the rename that publishes the
folder makes the state void in the same moment: a run that is killed right after it leaves nothing to go on from.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._words import to_json
from ..identity import differences, in_words, of_environment, of_tokens
from ..models.checkpoint import Checkpoint, open_own
from ..models.save import put_in_place
from ..pruning.report import LayerReport
from ..pruning.source import Done
from .activations import TwoFiles

VERSION = 5


class WorkFolder:
    """``.OUT.partial`` beside the output folder ``OUT``.

    It holds ``folder`` (the output so far), ``state.json`` (what of it is done, see :meth:`commit`), activations, and
    ``lock``. At the end ``folder`` becomes ``OUT`` by a rename, and the rest goes.

    Args:
        out: the output folder.
        offload: where activations go; here if None.

    Raises:
        RuntimeError: another process works on it.
        OSError: it is a link, or another user's.
    """

    def __init__(self, out: Path, offload: str | Path | None = None) -> None:
        self.out = out
        self.path = path_for(out)
        self.folder = self.path / "folder"
        self.files = TwoFiles.beside(self.path, offload)
        out.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()

    def _take_lock(self) -> int:
        while True:
            self.path.mkdir(mode=0o700, exist_ok=True)
            _refuse_foreign(self.path)
            try:
                fd = open_own(self.path / "lock", os.O_RDWR | os.O_CREAT)
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

    def commit(self, state: dict[str, Any]) -> None:
        """Replace ``state.json`` at once: a run that dies at any moment leaves the old or the new one."""
        temporary = self.path / "state.new"
        temporary.unlink(missing_ok=True)
        content = state | {"version": VERSION, "folder": _inode(self.folder)}
        with os.fdopen(open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w") as file:
            file.write(to_json(content | {"digest": _digest(content)}, indent=None))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / "state.json")

    def begin(self) -> None:
        """An empty ``folder``, and nothing of an earlier run."""
        (self.path / "state.json").unlink(missing_ok=True)
        self.files.remove()
        TwoFiles.beside(self.path, None).remove()
        if self.folder.is_symlink() or self.folder.is_file():
            self.folder.unlink()
        elif self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(mode=0o755)

    def keep_only(self, names: set[str]) -> None:
        """Takes away what ``folder`` holds beside the files ``names``: what is written there later must not be written
        through a link."""
        for path in self.folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def publish(self, overwrite: bool) -> None:
        """``folder`` becomes the output; with it goes what makes the state valid."""
        for path in (*self.folder.iterdir(), self.folder):  # small files, too, before there is nothing to go on from
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        put_in_place(self.folder, self.out, overwrite)
        self.remove()

    def remove(self) -> None:
        self.files.remove()
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def release(self) -> None:
        """Leave it for a run that goes on."""
        os.close(self._lock)


def path_for(out: Path) -> Path:
    """Beside what ``out`` is, or is a link to."""
    out = out.resolve() if out.is_symlink() else out
    return out.parent / f".{out.name}.partial"


def _refuse_foreign(path: Path) -> None:
    """Raises OSError where ``path`` is no folder of this user's own."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise OSError(f"{path} is a link, or not a folder of this user's: it is not used; take it away first")


def _inode(folder: Path) -> list[int]:
    found = os.lstat(folder)
    return [found.st_dev, found.st_ino]


def _digest(state: dict[str, Any]) -> str:
    content = {key: value for key, value in state.items() if key != "digest"}
    return hashlib.sha256(json.dumps(json.loads(to_json(content)), sort_keys=True).encode()).hexdigest()


def read_state(out: Path) -> dict[str, Any] | None:
    """The state that an unfinished run to ``out`` left, or None: also where it was finished and published.

    Raises:
        ValueError: it is damaged, or what it speaks of is gone. OSError: it is a link, or another user's.
    """
    work = path_for(out)
    if not os.path.lexists(work):
        return None
    _refuse_foreign(work)
    path = work / "state.json"
    if not os.path.lexists(path):
        return None
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        content = file.read()
    advice = "pass overwrite=True without resume=True to start anew"
    try:
        state = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {advice}") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise ValueError(f"{path} was written by another version of wanda_kernels: {advice}")
    if state.get("digest") != _digest(state):
        raise ValueError(f"{path} is damaged: it was changed after it was written; {advice}")
    done, blocks = state.get("done"), state.get("blocks")
    if type(done) is not int or type(blocks) is not int or not 0 <= done <= blocks:
        raise ValueError(f"{path} is damaged: {done} of {blocks} blocks are done; {advice}")
    folder = work / "folder"
    if os.path.lexists(folder) and _inode(folder) == state.get("folder"):
        return state
    if done == blocks:  # its folder became the output
        return None
    raise ValueError(f"{path} speaks of {folder}, which was taken away or replaced since; {advice}")


def identity(
    spec: dict[str, Any], input_ids: Tensor | None, checkpoint: Checkpoint, device: torch.device
) -> dict[str, Any]:
    """All that decides a run's result."""
    config = (checkpoint.folder / "config.json").read_bytes()
    return {
        "option": spec,
        "calibration": of_tokens(input_ids),
        "model": {"config.json": hashlib.sha256(config).hexdigest(), "tensor": checkpoint.fingerprints()},
        "environment": of_environment(device),
    }


def refuse_other_run(then: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Raises ValueError where a state is another run's, and says in what it differs."""
    found = [f"{name} was {before}, now it is {after}" for name, before, after in differences(then, now)]
    if found:
        raise ValueError(
            f"the unfinished run to {out} was another one: {in_words(found)}. Give what it began with, "
            "or overwrite=True without resume=True to start anew"
        )


NUMBERS = ("sparsity", "seconds", "estimated_error")
OPTIONAL_NUMBERS = ("exact_error", "threshold", "damping")
NOT_FINITE = ("nan", "inf", "-inf")  # as strict JSON has them


def done_of(state: dict[str, Any]) -> Done:
    """What a run has done. Raises ValueError, KeyError or TypeError where the report on it is none: found out now, not
    where it is printed after all the work."""
    shares = state["sparsities"]
    if shares is not None and not all(type(share) in (int, float) and 0 <= share < 1 for share in shares):
        raise ValueError(f"its sparsities are {str(shares)[:100]}")
    return Done(state["done"], [_layer(data) for data in state["layers"]], shares)


def _layer(data: dict[str, Any]) -> LayerReport:
    numbers = {name: data[name] for name in NUMBERS}
    numbers |= {name: data[name] for name in OPTIONAL_NUMBERS if data[name] is not None}
    numbers |= {name: float(number) for name, number in numbers.items() if number in NOT_FINITE}
    words = [data[name] for name in ("input_of", "statistics") if data[name] is not None]
    if any(type(n) not in (int, float) for n in numbers.values()) or any(type(word) is not str for word in words):
        raise ValueError(f"its report on {data['name']} is {str(data)[:200]}")
    errors = data["gram_errors"]
    if errors is not None:
        errors = [float(error) if error in NOT_FINITE else error for error in errors]
        if len(errors) not in (2, 3) or any(type(error) not in (int, float) for error in errors):
            raise ValueError(f"its report on {data['name']} has the gram_errors {str(errors)[:100]}")
    if type(data["swaps"]) not in (int, type(None)):
        raise ValueError(f"its report on {data['name']} has the swaps {str(data['swaps'])[:100]}")
    for name in ("tokens", "pooled"):
        if data[name] is not None and any(type(count) is not int or count < 0 for count in data[name]):
            raise ValueError(f"its report on {data['name']} has the {name} {str(data[name])[:100]}")
    return LayerReport(**data | numbers | {"shape": tuple(data["shape"]), "gram_errors": errors})
