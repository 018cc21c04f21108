"""Saves a model as a Hugging Face folder that appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises where ``folder`` may not be written: call it before the long work.

    Raises:
        FileExistsError: it is there and ``overwrite`` is false.
        NotADirectoryError: it, or a parent of it, is a file.
    """
    for parent in [folder, *folder.parents]:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(f"output folder {folder}: {parent} is a file")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"output folder {folder} is not empty: choose another, or pass --overwrite")


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
    folder: Path, model: Any, tokenizer: Any = None, *, extra: dict[str, str] | None = None, overwrite: bool = False
) -> None:
    """Write model, tokenizer and ``extra`` (file name -> text) to ``folder``.

    Everything goes to a hidden folder beside it first, which is renamed at the end: a full disk, an interrupt or a
    crash leaves ``folder`` as it was.

    Raises:
        FileExistsError: ``folder`` is there and ``overwrite`` is false.
        OSError: it could not be written.
    """
    check_output(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        staging.chmod(0o755)  # mkdtemp makes it private to the user
        try:
            model.save_pretrained(staging)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            for name, text in (extra or {}).items():
                (staging / name).write_text(text)
        except Exception as error:
            raise OSError(f"output folder {folder} could not be written: {error}") from error
        put_in_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def put_in_place(staging: Path, folder: Path) -> None:
    """Rename ``staging`` to ``folder``, replacing what is there."""
    if not folder.exists():
        staging.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    folder.rename(old / "folder")
    try:
        staging.rename(folder)
    except OSError:
        (old / "folder").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
