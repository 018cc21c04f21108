"""A study of SmolLM2-135M on Python's own help texts, its source the second text: ``wanda-kernels study`` with all that
it needs, offline.

python -m benchmarks.study --out DIR [--scale small|tiny]: all of --paper. small (16 x 512 tokens) is meant for an hour
at most on two cores, tiny (8 x 256) for a quarter of one; DIR/report.html is what comes out. Stopped, it goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import smollm2, texts
from wanda_kernels.cli.app import main as wanda_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and report.html")
    parser.add_argument("--scale", default="tiny", choices=("small", "tiny"))
    options = parser.parse_args()
    calibration, *evaluation = texts.write(options.out)
    arguments = ["study", str(smollm2.model_file()), "--out", str(options.out), "--paper", "--scale", options.scale]
    arguments += ["--dtype", "float32", "--calibration", str(calibration)]
    wanda_kernels([*arguments, *(argument for text in evaluation for argument in ("--text", str(text)))])


if __name__ == "__main__":
    main()
