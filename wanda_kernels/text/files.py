"""Text files: the encodings and line ends that a text can have, and documents in them."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

# UTF-32's mark begins as UTF-16's does: it is looked for first.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)


def check_regular(path: Path, argument: str) -> None:
    """Raises FileNotFoundError or ValueError where there is no file that ends: a folder, a pipe that would wait."""
    if not path.exists():
        raise FileNotFoundError(f"{argument} file {path} does not exist")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe, a socket or a device"
        raise ValueError(f"{argument} file {path} is {what}: give a regular file")


def read_text(path: Path, argument: str) -> str:
    r"""A text file's text, its lines ended by ``\n`` where they end so, by ``\r\n`` or by ``\r``.

    UTF-8, or what a byte order mark says: UTF-8, UTF-16, UTF-32. Nothing is guessed. NUL and other control characters
    are text, except where they show that it is UTF-16 or UTF-32 without its mark.

    Args:
        argument: what the file is for, for messages.

    Raises:
        ValueError: no regular file, another encoding (with the first byte that cannot be), nothing but white space.
        OSError: a file that is not there, or may not be read.
    """
    check_regular(path, argument)
    data = path.read_bytes()
    mark, encoding = next((known for known in _MARKS if data.startswith(known[0])), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{argument} file {path} is not {encoding.upper()} text (byte {len(mark) + error.start}: {error.reason}): "
            "save it as UTF-8"
        ) from error
    for first in (0, 1):
        if not mark and 2 * data[first::2].count(0) > len(data[first::2]):
            raise ValueError(
                f"{argument} file {path} is not UTF-8 text (byte {data.index(0)}: every second one is NUL, as in "
                "UTF-16 without a byte order mark): save it as UTF-8"
            )
    if not text.strip():
        raise ValueError(f"{argument} file {path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_jsonl(path: Path, column: str) -> list[str]:
    """The texts of a JSONL file: an object a line, its text in ``column``. Empty lines are skipped.

    Raises:
        ValueError: naming the line, where it is no object with a text in ``column``; as :func:`read_text`.
    """
    documents = []
    # not splitlines(), which also splits at characters that a text in a line may have (U+2028, form feed, ..)
    for number, line in enumerate(read_text(path, "calibration").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, strict=False)  # a text may hold control characters that nobody escaped
        except (ValueError, RecursionError) as error:
            raise ValueError(f"calibration file {path}, line {number} is not JSON: {error}") from error
        documents.append(text_of(row, column, f"calibration file {path}, line {number}"))
    return documents


def text_of(row: Any, column: str, where: str) -> str:
    """Raises ValueError where ``row`` has no text in ``column``, with the columns it has, or one that is no Unicode."""
    if isinstance(row, dict) and column in row and not isinstance(row[column], str):
        raise ValueError(f"{where} has a {type(row[column]).__name__} in column '{column}', it must be text")
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        there = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where} has no text in column '{column}' (it has: {there}): name another column")
    text: str = row[column]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a surrogate pair in column '{column}' (character {error.start})") from error
    return text
