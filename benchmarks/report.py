"""Writes the tables of the README and of docs/measured.md (between markers) and docs/benchmarks.md from the result
files, and the pictures.

python -m benchmarks.report [--check]: --check changes nothing, and fails where they disagree.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import pictures, tables
from benchmarks.circumstances import RESULTS, ROOT
from benchmarks.records import Row, read
from benchmarks.tables import NOT_MEASURED

README = ROOT / "README.md"
MEASURED = ROOT / "docs" / "measured.md"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
SUITES = ("select", "stats", "nm", "sparse", "scaling", "end-to-end")
HOW = """# Benchmarks

Written by `python -m benchmarks.report` from `benchmarks/results/<device>/`; CI fails where they disagree. `make bench`
measures all suites on the machine at hand, `wanda-kernels bench --suite S` one of them, `make gpu` everything on a GPU.

- The result is checked before anything is timed, on the very inputs; a red check gives no figure.
- An operator and its peers run in turns, on data that rotates through more memory than the last cache holds; what was
  changed in place is put back outside the timed part. Median, p20 and p80 are of at most 15 repetitions.
- On a GPU the time between two events, with launches queued before; on a CPU one thread for selection and statistics.
- `GB/s`: the bytes that must be moved, over the median. `x copy`: the time a byte as a multiple of what a copy of that
  size, between the same repetitions, takes a byte.
- `ratio`: the median over the repetitions of its time over that of `wanda_kernels` in the same one; on the CPU on the
  first 1,024 rows of a weight. Of `generate` and `prune` rows: over that of the dense model, of the first run.
- Peak memory: the weights, and what generating adds to what is resident, in a round that is not timed.
- `wanda-kernels bench --compare A.csv B.csv` shows what changed, and where by more than the spread.
"""


@dataclass
class Device:
    """A folder of results."""

    folder: Path

    def rows(self, suite: str) -> list[Row]:
        path = self.folder / f"{suite}.csv"
        return read(path) if path.exists() else []

    @property
    def is_gpu(self) -> bool:
        first = next((rows[0] for suite in SUITES if (rows := self.rows(suite))), None)
        return first is not None and first["device_type"] == "cuda"

    def date(self, suites: tuple[str, ...]) -> str:
        return max((row["date"] for suite in suites for row in self.rows(suite)), default="")


@dataclass
class Section:
    """A table of a page: the suites it needs, and how it is drawn from their rows."""

    suites: tuple[str, ...]
    draw: Callable[[list[Row]], str]
    is_gpu: bool = False


SECTIONS = {
    "headline": Section(("end-to-end",), tables.headline),
    "prune": Section(("end-to-end",), tables.prune),
    "generate": Section(("end-to-end",), tables.generate),
    "products": Section(("sparse",), tables.products),
    "values": Section(("sparse",), tables.values),
    "layers": Section(("sparse",), tables.layers),
    "kernels": Section(("select", "nm", "stats"), tables.kernels),
    "gpu kernels": Section(("select", "nm", "stats"), tables.kernels, is_gpu=True),
    "gpu products": Section(("sparse",), tables.products, is_gpu=True),
}

# section -> the result file, how it is drawn, and of how many devices, the newest first
JSON = {
    "demo": ("demo", tables.demo, 1), "masks": ("masks", tables.masks, 1), "all masks": ("masks", tables.all_masks, 1),
    "deploy": ("deploy", tables.deploy, 1), "all deploy": ("deploy", tables.deploy, None),
}  # fmt: skip

# The README has what a user decides by.
PAGES = {
    README: ("headline", "masks", "deploy"),
    MEASURED: (
        "demo",
        "all masks",
        "all deploy",
        "prune",
        "generate",
        "products",
        "values",
        "layers",
        "kernels",
        "gpu kernels",
        "gpu products",
    ),
}


def devices(results: Path) -> list[Device]:
    return [Device(path) for path in sorted(results.iterdir()) if path.is_dir()]


def newest(results: Path, section: Section) -> Device | None:
    """The device whose record is the newest, of those that have all the suites."""
    having = [d for d in devices(results) if d.is_gpu == section.is_gpu and all(d.rows(s) for s in section.suites)]
    return max(having, key=lambda device: device.date(section.suites), default=None)


def _body(results: Path, section: Section) -> str:
    device = newest(results, section)
    if device is None:
        return NOT_MEASURED
    rows = [row for suite in section.suites for row in device.rows(suite)]
    drawn = section.draw(rows)
    if drawn == NOT_MEASURED:
        return drawn
    names = ",".join(section.suites)
    names = f"{{{names}}}" if len(section.suites) > 1 else names
    return f"{drawn}\n\n{tables.source(f'benchmarks/results/{device.folder.name}/{names}.csv', rows[-1])}"


def _drawn_json(results: Path, name: str, draw: Callable[[dict[str, Any]], str], count: int | None) -> str:
    found = [(json.loads(path.read_text()), path) for path in sorted(results.glob(f"*/{name}.json"))]
    found.sort(key=lambda pair: pair[0]["circumstances"]["date"], reverse=True)
    parts = []
    for result, path in found[:count]:
        about = {"device_type": "cpu", "driver": "", **result["circumstances"]}
        parts += [draw(result), tables.source(f"benchmarks/results/{path.parent.name}/{name}.json", about)]
    return "\n\n".join(parts) or NOT_MEASURED


def render(page: Path, results: Path = RESULTS, text: str | None = None) -> str:
    """A page (its present text, where ``text`` is not given) with each section between its markers replaced by
    what the result files say."""
    text = page.read_text() if text is None else text
    for name in PAGES[page]:
        body = _drawn_json(results, *JSON[name]) if name in JSON else _body(results, SECTIONS[name])
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page.name} has no markers for {name}")
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}{match[2]}", text)  # type: ignore[misc]
    return text


def document(results: Path = RESULTS) -> str:
    """docs/benchmarks.md: every row of every device, GPUs first, and the pictures."""
    found = devices(results)
    parts = [HOW]
    if not any(device.is_gpu for device in found):
        parts.append("## GPU\n\nnot measured\n")
    for device in sorted(found, key=lambda d: (not d.is_gpu, d.folder.name)):
        parts.append(f"## {device.folder.name}\n")
        for suite in SUITES:
            rows = device.rows(suite)
            parts.append(f"### {suite}\n")
            if not rows:
                parts.append(f"{NOT_MEASURED}\n")
                continue
            parts.append(f"{tables.source(f'benchmarks/results/{device.folder.name}/{suite}.csv', rows[-1])}\n")
            for name in pictures.names(suite, rows):
                parts.append(f"![{name}](pictures/{device.folder.name}/{name}.png)\n")
            parts.append(f"{tables.every_row(rows)}\n")
    return "\n".join(parts)


def out_of_date(results: Path = RESULTS) -> list[str]:
    """What does not say what the result files say."""
    found = [str(page.relative_to(ROOT)) for page in PAGES if render(page, results) != page.read_text()]
    if not DOCUMENT.exists() or DOCUMENT.read_text() != document(results):
        found.append(f"docs/{DOCUMENT.name}")
    for device in devices(results):
        for suite in SUITES:
            found += pictures.out_of_date(device.folder.name, suite, device.rows(suite))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where something is out of date")
    options = parser.parse_args()
    if options.check:
        if found := out_of_date():
            sys.exit(f"{', '.join(found)}: not what the result files say: run python -m benchmarks.report")
        return
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("the pictures are drawn by matplotlib: pip install 'wanda_kernels[plot]'")
    for page in PAGES:
        page.write_text(render(page))
    DOCUMENT.write_text(document())
    for device in devices(RESULTS):
        for suite in SUITES:
            pictures.draw(device.folder.name, suite, device.rows(suite))


if __name__ == "__main__":
    main()
