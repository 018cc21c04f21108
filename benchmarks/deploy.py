"""A pruned and packed model beside what people run instead: llama.cpp's formats of the same model, on the same threads.

python -m benchmarks.deploy --out DIR [--model qwen|smollm2] [--samples 16] [--windows 6] [--rounds 3]

Makes in DIR, what is not there yet: the dense model, the model pruned to 50 % (refined, updated, calibrated on
help texts), packed as bfloat16, int8 and int4, and llama.cpp's formats, where llama-quantize and llama-bench are there.
Then the perplexities of all of them, `wanda-kernels speed` with all of them in turns, and deploy.json. The models come
from 4-bit files, which flatters llama.cpp's formats of 4 bits and more: they lose next to nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import qwen, smollm2, texts
from benchmarks.circumstances import write_result
from wanda_kernels.models import load_model, load_tokenizer, save_pretrained

MODELS: dict[str, ModuleType] = {"qwen": qwen, "smollm2": smollm2}
PRUNED = "pruned"
PACKED: dict[str, list[str]] = {
    "bitmap": [],
    "bitmap-int8": ["--values", "int8", "--head", "int8"],
    "bitmap-int4": ["--values", "int4", "--group-size", "64", "--head", "int8", "--calibrate"],
}
FORMATS = ("BF16", "Q8_0", "Q4_K_M", "Q3_K_M")
PROMPT, TOKENS = 64, 32


Argument = str | float | Path


def wanda(*arguments: Argument) -> None:
    """A command as a user gives it."""
    subprocess.run([sys.executable, "-m", "wanda_kernels", *map(str, arguments)], check=True)


def make(model: ModuleType, out: Path, samples: int, length: int) -> None:
    """The folders."""
    calibration, *_ = texts.write(out)
    given: list[Argument] = ["--calibration", calibration, "--samples", samples, "--length", length]
    if not (out / "dense").exists():
        source = str(model.model_file())
        save_pretrained(out / "dense", load_model(source, "bfloat16", "cpu"), load_tokenizer(source))
    if not (out / PRUNED).exists():
        wanda("prune", out / "dense", "--out", out / PRUNED, "--sparsity", 0.5, "--refine", "--update", *given)
    for name, options in PACKED.items():
        if not (out / name).exists():
            calibrated = given if "--calibrate" in options else []
            wanda("compress", out / PRUNED, "--out", out / name, *options, *calibrated)


def make_gguf(model: ModuleType, out: Path) -> list[Path]:
    """llama.cpp's formats, where its programs are on the path."""
    program = shutil.which("llama-quantize")
    if program is None or shutil.which("llama-bench") is None:
        print("llama-quantize or llama-bench is not on the path: llama.cpp is not measured")
        return []
    found = [out / f"{name}.gguf" for name in FORMATS]
    for file in found:
        if not file.exists():
            partial = file.with_suffix(".partial")
            command = [program, "--allow-requantize", model.model_file(), partial, file.stem]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            os.replace(partial, file)
    return found


def perplexities(out: Path, files: list[Path], windows: int, length: int) -> dict[str, list[float]]:
    """Of each folder and file, on both texts, by the same program: transformers dequantises llama.cpp's formats. BF16
    is the dense model."""
    found = {}
    for path in (out / "dense", *(out / name for name in PACKED), *(file for file in files if file.stem != "BF16")):
        figures = out / f"{path.stem}.{windows}x{length}.json"
        if not figures.exists():
            given: list[Argument] = [part for text in (texts.HELP, texts.SOURCE) for part in ("--text", out / text)]
            given += ["--windows", windows, "--length", length, "--dtype", "bfloat16"]
            wanda("eval", path, *given, "--json", figures)
        found[path.stem] = [entry["perplexity"] for entry in json.loads(figures.read_text())["texts"]]
    return found | {"BF16": found["dense"]}


def measure(out: Path, files: list[Path], rounds: int) -> list[dict[str, Any]]:
    figures = out / "speed.json"
    peers: list[Argument] = [part for file in files for part in ("--llama-bench", file)]
    given: list[Argument] = ["--batches", 1, "--prompt", PROMPT, "--tokens", TOKENS, "--rounds", rounds]
    wanda("speed", *(out / name for name in ("dense", *PACKED)), "--static", *peers, *given, "--json", figures)
    rows = json.loads(figures.read_text())["rows"]
    return [row | {"model": Path(row["model"]).name} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models: 12 GB for qwen")
    parser.add_argument("--model", choices=MODELS, default="qwen")
    parser.add_argument("--samples", type=int, default=16, help="of calibration, 512 tokens each")
    parser.add_argument("--windows", type=int, default=6, help="of each text, 512 tokens each")
    parser.add_argument("--rounds", type=int, default=3, help="of timing, in turns")
    options = parser.parse_args()
    model, length = MODELS[options.model], 512
    make(model, options.out, options.samples, length)
    files = make_gguf(model, options.out)
    found = perplexities(options.out, files, options.windows, length)
    rows = measure(options.out, files, options.rounds)
    for row in rows:
        row["perplexities"] = found[row["model"]]
    settings = {"samples": options.samples, "windows": options.windows, "length": length, "rounds": options.rounds,
                "prompt": PROMPT, "tokens": TOKENS}  # fmt: skip
    print(write_result("deploy", {"model": model.NAME, "settings": settings, "rows": rows}))


if __name__ == "__main__":
    main()
