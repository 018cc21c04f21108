"""Saves a model as a Hugging Face folder that appears whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

REPORT = "pruning_report.json"  # beside a pruned model's weights
DROP_REPORT = "dropped_experts.json"
# How images and video are prepared, beside a model that takes them.
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and the flag, of Linux


def check_output(folder: Path, overwrite: bool, source: str | Path | None = None) -> None:
    """Raises where a model may not, or cannot, be written to ``folder``: call it before the long work.

    Args:
        source: where the model comes from, which must not be written over.

    Raises:
        FileExistsError: it is there and ``overwrite`` is false, or it is there and holds no model.
        NotADirectoryError: it, or a parent of it, is a file. PermissionError, OSError: it cannot be written.
        ValueError: it is ``source``, lies in it or holds it; no name that a folder can have.
    """
    check_writable(folder)
    if source is not None and Path(source).expanduser().exists():
        mine, theirs = folder.resolve(), Path(source).expanduser().resolve()
        if mine == theirs or mine in theirs.parents or (theirs.is_dir() and theirs in mine.parents):
            raise ValueError(f"output folder {folder} and the model {source} must not lie in each other: name another")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"output folder {folder} is not empty: choose another, or pass overwrite=True")
    if not holds_model(folder):
        raise FileExistsError(f"output folder {folder} holds no model (no config.json of one): it is not overwritten")


def check_writable(folder: Path) -> None:
    """Raises OSError where no folder can be made and written at ``folder``, by making one beside it."""
    if folder.is_symlink() and not folder.exists():
        raise NotADirectoryError(f"output folder {folder} is a link to nothing")
    absolute = folder.absolute()
    try:
        str(absolute).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"output folder {str(folder)!r} has a name that is no UTF-8 text: name another") from error
    if absolute == absolute.parent:
        raise ValueError(f"output folder {folder} is the root of the file system: name a folder in it")
    try:
        for parent in [absolute, *absolute.parents]:
            if parent.exists() and not parent.is_dir():
                raise NotADirectoryError(f"output folder {folder}: {parent} is a file")
        existing = next(parent for parent in absolute.parents if parent.exists())
        limit = os.pathconf(existing, "PC_NAME_MAX")
        for part in absolute.relative_to(existing).parts:
            if len(os.fsencode(_staging_prefix(part))) + 8 > limit:  # 8: what mkdtemp adds
                raise OSError(errno.ENAMETOOLONG, f"the name is too long by {len(os.fsencode(part))} bytes of {limit}")
        Path(tempfile.mkdtemp(prefix=_staging_prefix(absolute.name), dir=existing)).rmdir()
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it may not be written to")
    except NotADirectoryError:
        raise
    except OSError as error:
        raise type(error)(f"output folder {folder} cannot be written: {error.strerror or error}") from error


def holds_model(folder: Path) -> bool:
    """Whether a folder is one that a model was saved to: only such a one is replaced."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)


def check_file(path: Path, argument: str) -> None:
    """Raises OSError where no file can be written at ``path``; ``argument`` names it."""
    if path.is_dir():
        raise IsADirectoryError(f"{argument} {path} is a folder: name a file")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{argument} {path}: its folder does not exist")
    there = path.exists()
    try:
        with path.open("a"):  # what is there stays
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise type(error)(f"{argument} {path} cannot be written: {error.strerror or error}") from error


def check_space(folder: Path, model: nn.Module) -> None:
    """Raises OSError where the disk has less room than the model's weights take."""
    seen = {id(parameter): parameter.numel() * parameter.element_size() for parameter in model.parameters()}
    check_bytes(folder, sum(seen.values()))


def check_bytes(folder: Path, needed: int) -> None:
    """Raises OSError where the disk of ``folder`` has less room than ``needed`` bytes."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"output folder {folder}: the model needs {needed / 2**20:.0f} MiB, the disk has "
            f"{free / 2**20:.0f} MiB left"
        )


def save_pretrained(
    folder: Path | str,
    model: Any,
    tokenizer: Any = None,
    *,
    extra: dict[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write model, tokenizer and ``extra`` (file name -> text) to ``folder``.

    Everything goes to a hidden folder beside it first, which is renamed at the end: a full disk, an interrupt or a
    crash leaves ``folder`` as it was.

    Raises:
        FileExistsError: ``folder`` is there and ``overwrite`` is false.
        OSError: it could not be written.
    """
    folder = Path(folder)
    check_output(folder, overwrite)
    folder = folder.resolve() if folder.is_symlink() else folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=_staging_prefix(folder.name), dir=folder.parent))
    whole = False
    try:
        staging.chmod(0o755)  # mkdtemp makes it private to the user
        try:
            model.save_pretrained(staging)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            for name, text in (extra or {}).items():
                (staging / name).write_text(text, encoding="utf-8")
        except Exception as error:
            raise OSError(f"output folder {folder} could not be written: {error}") from error
        whole = True
        put_in_place(staging, folder, overwrite)
    except FileExistsError as error:
        if not whole:
            raise
        raise FileExistsError(f"{error}; what this run made is whole in {_keep(staging)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging_prefix(name: str) -> str:
    return f".{name}.partial-"


def _keep(staging: Path) -> Path:
    """A finished folder under a name that can be seen."""
    kept = Path(tempfile.mkdtemp(prefix=f"{staging.name[1:]}-", dir=staging.parent))
    staging.rename(kept)  # an empty folder is replaced
    return kept


def put_in_place(staging: Path, folder: Path, overwrite: bool) -> None:
    """Rename ``staging`` to ``folder``. What is there meanwhile is replaced only where ``overwrite`` allows it.

    Raises:
        FileExistsError: another command has written ``folder`` since it was checked.
    """
    try:
        staging.rename(folder)  # replaces an empty folder, and fails where there is anything in it
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not overwrite:
            raise FileExistsError(f"output folder {folder} was written by another command meanwhile") from error
        _exchange(staging, folder)


def _exchange(staging: Path, folder: Path) -> None:
    """Two folders change places at once (renameat2 of Linux): a kill at any moment leaves one of them at ``folder``.
    Elsewhere by two renames."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None and call(_HERE, os.fsencode(staging), _HERE, os.fsencode(folder), _RENAME_EXCHANGE) == 0:
        return
    if call is not None and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    folder.rename(old / "folder")
    try:
        staging.rename(folder)
    except OSError:
        (old / "folder").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
