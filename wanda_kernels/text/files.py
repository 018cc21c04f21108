"""Text files: the encodings and line ends that a text can have."""

from __future__ import annotations

import codecs
from pathlib import Path

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
