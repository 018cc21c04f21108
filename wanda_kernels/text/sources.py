"""Where calibration text comes from: one source, or several in stated shares."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

_SHARE = re.compile(r"(.+)=([+-]?(?:\d{1,20}\.?\d{0,20}|\.\d{1,20})(?:[eE][+-]?\d{1,2})?)", re.DOTALL)
_TOLERANCE = Fraction(1, 1000)  # 0.333 three times is 1


@dataclass(frozen=True)
class Source:
    """A source as it is given to ``load_calibration``, and its share of the samples, in (0, 1]."""

    name: str
    share: Fraction

    @property
    def is_file_of_ids(self) -> bool:
        """Ready token ids, which have a length of their own."""
        return Path(self.name).suffix == ".safetensors"


def parse_sources(given: str | Sequence[str]) -> list[Source]:
    """Sources and their shares. ``notes.txt=0.75`` is ``notes.txt`` with three quarters of the samples; sources without
    a share divide what the others leave in equal parts.

    What stands behind the last ``=`` is a share where it is a number, unless a file has the whole name: that is the
    file. ``./a=0.5=1`` is the file ``a=0.5`` whatever else is there.

    Raises:
        ValueError: no source, one named twice, a share that is not in (0, 1], shares that do not add up to 1.
    """
    named = [_split(one) for one in ([given] if isinstance(given, str) else given)]
    if not named:
        raise ValueError("calibration must name at least one source, got none")
    seen: set[str] = set()
    for name, _ in named:
        place = os.path.realpath(Path(name).expanduser()) if Path(name).expanduser().exists() else name
        if place in seen:
            raise ValueError(f"calibration must name each source once, got {name} twice")
        seen.add(place)
    for name, share in named:
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"calibration must give {name} a share above 0 and at most 1, got {float(share):g}")
    stated = sum((share for _, share in named if share is not None), Fraction(0))
    without = sum(share is None for _, share in named)
    if without and stated >= 1:
        raise ValueError(
            f"calibration must leave a share for every source, got shares of {float(stated):g} and {without} without"
        )
    if without:
        return [Source(name, (1 - stated) / without if share is None else share) for name, share in named]
    if abs(stated - 1) > _TOLERANCE:
        raise ValueError(f"calibration must have shares that add up to 1, got {float(stated):g}")
    return [Source(name, share / stated) for name, share in named if share is not None]


def _split(given: str) -> tuple[str, Fraction | None]:
    match = None if Path(given).expanduser().exists() else _SHARE.fullmatch(given)
    return (given, None) if match is None else (match[1], Fraction(match[2]))


def split_samples(samples: int, sources: Sequence[Source]) -> list[int]:
    """How many of ``samples`` come from each source: its share rounded down, and one more for the largest remainders
    (the first of equal ones).

    Raises:
        ValueError: where a source would have none.
    """
    exact = [samples * source.share for source in sources]
    counts = [int(value) for value in exact]
    order = sorted(range(len(sources)), key=lambda index: (counts[index] - exact[index], index))
    for index in order[: samples - sum(counts)]:
        counts[index] += 1
    for source, count in zip(sources, counts, strict=True):
        if count < 1:
            raise ValueError(
                f"samples must be enough for each calibration source, got {samples}: {source.name} has a share of "
                f"{float(source.share):.3g}, less than one sample"
            )
    return counts
