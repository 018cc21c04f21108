"""Wanda, SparseGPT, Wanda's mask refined, and that with updated weights, on two real models and two texts.

python -m benchmarks.masks --out DIR [--models smollm2,gemma] [--seeds 5] [--dampings 0.1,1] [--record]

50 %, 60 % and 2:4, 16 x 512 tokens of one half of Python's help texts, float32; perplexity on the other half and on the
standard library's source. Each model's study lies in DIR/<model> and goes on where it was ended; at the end, or with
--record at once, what is there goes to benchmarks/results/<device>/masks.json, and `python -m benchmarks.report` draws
it. As many windows a text that evaluating both costs what pruning by Wanda costs: a window takes 2.2 CPU seconds of
SmolLM2, 4.5 of Gemma with its vocabulary of 262,144, pruning 3.6 and 3.2 a sample.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import gemma, smollm2, texts
from benchmarks.circumstances import write_result
from wanda_kernels.study.stored import read_results
from wanda_kernels.study.tables import by_label, perplexities

SAMPLES, LENGTH = 16, 512
MODELS: dict[str, tuple[ModuleType, int]] = {"smollm2": (smollm2, 12), "gemma": (gemma, 6)}  # windows of each text


def study(name: str, out: Path, runs: Sequence[str]) -> None:
    """In a process of its own: its memory goes with it. ``runs``: options of the grid."""
    model, windows = MODELS[name]
    calibration, *evaluation = texts.write(out)
    command = [sys.executable, "-m", "wanda_kernels", "study", model.model_file(), "--out", out / name]
    command += [*runs, "--refine", "--update", "--no-layers", "--samples", SAMPLES, "--length", LENGTH]
    command += ["--windows", windows, "--dtype", "float32", "--device", "cpu", "--calibration", calibration]
    for text in evaluation:
        command += ["--text", text]
    subprocess.run(list(map(str, command)), check=True)


def summary(name: str, folder: Path) -> dict[str, Any]:
    """Of a study: for each method and target the figures of all its seeds."""
    data = read_results(folder / "results.json")
    rows = [
        {
            "label": label,
            "target": target,
            "seeds": [run["seed"] for run in runs],
            "perplexities": [perplexities(run) for run in runs],
            "seconds": [run["seconds"] for run in runs],
            "parts": [run["parts"] for run in runs],
        }
        for (label, target), runs in by_label(list(data["runs"].values())).items()
    ]
    settings = data["settings"] | {"samples": SAMPLES}
    return {"model": MODELS[name][0].NAME, "settings": settings, "dense": perplexities(data["dense"]), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for texts and studies")
    parser.add_argument("--models", default=",".join(MODELS), help="with commas between them [default: all]")
    parser.add_argument("--seeds", type=int, default=5, help="how many draws of the calibration samples")
    parser.add_argument("--dampings", metavar="D,..", help="also these of refined masks at 50 %%, of the first draw")
    parser.add_argument("--record", action="store_true", help="run nothing: write down what is there")
    options = parser.parse_args()
    names = options.models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}, got {', '.join(unknown)}")
    if not options.record:
        grid = ["--methods", "wanda,sparsegpt", "--sparsities", "0.5,0.6", "--patterns", "2:4"]
        grid += ["--seeds", ",".join(map(str, range(options.seeds)))]
        for name in names:
            study(name, options.out, grid)
            if options.dampings is not None:
                dampings = ["--refine-damping", options.dampings, "--methods", "wanda", "--sparsities", "0.5"]
                study(name, options.out, dampings)
    done = [name for name in MODELS if (options.out / name / "results.json").exists()]
    print(write_result("masks", {"models": [summary(name, options.out / name) for name in done]}))


if __name__ == "__main__":
    main()
