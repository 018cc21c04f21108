"""English and source text that every CPython carries, for calibration and evaluation without a network.

The first text is pydoc_data.topics, Python's own help, in two halves: one to calibrate on, one to evaluate on. The
second is the standard library's source, which nothing is calibrated on: what a pruned model keeps on it, it has not
learned from its calibration. Both are those of the Python that runs: compare figures of one version only.

python -m benchmarks.texts --out DIR writes help-calibration.txt, help.txt and source.txt.
"""

from __future__ import annotations

import argparse
import random
import sys
import sysconfig
from pathlib import Path

EXCERPT = 2000  # characters of a source file: 500 to 700 tokens
CALIBRATION, HELP, SOURCE = "help-calibration.txt", "help.txt", "source.txt"


def help_halves() -> tuple[str, str]:
    """Two halves of the help texts with no paragraph in common: for calibration and for evaluation."""
    from pydoc_data.topics import topics

    paragraphs: list[str] = []
    seen: set[str] = set()
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
    # Topics are in alphabetical order: shuffled, both halves speak of the same things.
    random.Random(0).shuffle(paragraphs)
    middle = len(paragraphs) // 2
    return "\n\n".join(paragraphs[:middle]), "\n\n".join(paragraphs[middle:])


def source_text() -> str:
    """Whole lines from the middle of each public top-level module of the standard library, in an order that is drawn
    once: a few windows are of as many files, and their beginnings, which are licences and imports, are few."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = [name for name in sorted(sys.stdlib_module_names) if not name.startswith("_")]
    files = [folder / f"{name}.py" for name in names if (folder / f"{name}.py").is_file()]
    random.Random(0).shuffle(files)
    excerpts = []
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        text = "".join(lines[len(lines) // 2 :])
        excerpts.append(text if len(text) <= EXCERPT else text[: text.rfind("\n", 0, EXCERPT) + 1])
    return "\n\n".join(excerpts)


def write(folder: Path) -> tuple[Path, Path, Path]:
    """The files to calibrate on, to evaluate on, and the second text."""
    folder.mkdir(parents=True, exist_ok=True)
    files = (folder / CALIBRATION, folder / HELP, folder / SOURCE)
    for file, text in zip(files, (*help_halves(), source_text()), strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    for file in write(parser.parse_args().out):
        print(file)


if __name__ == "__main__":
    main()
