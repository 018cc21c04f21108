"""Prunes random small models with random options and a fault in most runs: disk full, truncated shard, wrong index, NaN
weights, SIGTERM, SIGINT, SIGKILL. Each must end in a complete and correct output, or in a clear error with nothing
half-written; a streamed run that left a state must go on from it to the correct output.

python tests/soak.py [--runs 200] [--seed 0] [--only N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import saved
import streaming_child
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from wanda_kernels import prune
from wanda_kernels.models.checkpoint import INDEX
from wanda_kernels.text import load_calibration

FAULTS = ("none", "disk full", "truncated", "wrong index", "NaN", "SIGTERM", "SIGINT", "SIGKILL")
OF_THE_MODEL = ("truncated", "wrong index", "NaN")  # going on would meet them again
FAMILIES = ("llama", "llama tied", "gemma2", "opt")
TIMEOUT_S = 300


@dataclass
class Run:
    """One run, drawn from its number."""

    number: int
    seed: int
    fault: str = ""
    family: str = ""
    dtype: str = ""
    shard: str = ""
    stream: bool = False
    arguments: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # the same, for prune()
    outcome: str = ""

    def __post_init__(self) -> None:
        draw = self.draw = random.Random(f"{self.seed} {self.number}")
        self.fault = FAULTS[self.number % len(FAULTS)]
        self.family, self.dtype = draw.choice(FAMILIES), draw.choice(("float32", "bfloat16"))
        self.shard = draw.choice(("50GB", "60KB", "150KB"))
        self.stream = self.fault == "SIGKILL" or draw.random() < 0.7
        options: dict[str, Any] = draw.choice(
            [{"pattern": "2:4"}, {"pattern": "4:8"}, {"sparsity": draw.uniform(0, 0.9)}]
        )
        options["method"] = draw.choice(("wanda", "wanda", "magnitude"))
        if options["method"] == "wanda":
            options |= {"propagate": draw.choice(("pruned", "dense")), "batch_size": draw.choice((1, 2, 7))}
            options |= {"exact_error": draw.random() < 0.3, "fuse_statistics": draw.random() < 0.7}
        self.options = options
        flags = {"fuse_statistics": (None, "--no-fuse"), "exact_error": ("--exact-error", None)}
        for name, value in options.items():
            if name in flags:
                self.arguments += [flag for flag in [flags[name][0 if value else 1]] if flag]
            else:
                self.arguments += [f"--{name.replace('_', '-')}", str(value)]
        self.arguments += ["--stream"] if self.stream else []
        self.arguments += ["--activation-memory", "0"] if self.stream and draw.random() < 0.5 else []

    def __str__(self) -> str:
        return (
            f"{self.number:4} {self.fault:12} {self.family:10} {self.dtype:8} {self.shard:5} {' '.join(self.arguments)}"
        )


def damage(run: Run, model: Path) -> None:
    shards = sorted(model.glob("*.safetensors"))
    if run.fault == "truncated":
        path = run.draw.choice(shards)
        os.truncate(path, run.draw.randrange(path.stat().st_size))
    elif run.fault == "NaN":
        path, name = run.draw.choice(
            [
                (path, name)
                for path in shards
                for name in load_file(path)
                if name.endswith(("q_proj.weight", "up_proj.weight", "fc1.weight"))
            ]
        )
        held = load_file(path)
        held[name].view(-1)[run.draw.randrange(held[name].numel())] = run.draw.choice((float("nan"), float("inf")))
        save_file(held, path, {"format": "pt"})
    elif run.fault == "wrong index" and (model / INDEX).exists():
        index = json.loads((model / INDEX).read_text())
        places = index["weight_map"]
        name = run.draw.choice(sorted(places))
        kind = run.draw.choice(("elsewhere", "missing file", "missing tensor", "unknown tensor", "no map"))
        if kind == "elsewhere":
            places[name] = run.draw.choice(sorted(set(places.values())))
        elif kind == "missing file":
            places[name] = "model-00099-of-00099.safetensors"
        elif kind == "missing tensor":
            del places[name]
        elif kind == "unknown tensor":
            places["model.layers.7.nothing.weight"] = places[name]
        else:
            del index["weight_map"]
        (model / INDEX).write_text(json.dumps(index))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def reference(run: Run, model: Path, text: Path) -> dict[str, torch.Tensor]:
    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    ids = load_calibration(str(text), saved.tokenizer(), 5, 24) if run.options["method"] == "wanda" else None
    prune(whole, ids, **run.options)
    return whole.state_dict()


def check_output(out: Path, expected: dict[str, torch.Tensor]) -> None:
    found = tensors(out)
    AutoModelForCausalLM.from_pretrained(out)
    assert {"config.json", "tokenizer.json", "pruning_report.json"} <= {path.name for path in out.iterdir()}
    for name, tensor in expected.items():
        assert name in found or name == "lm_head.weight", f"{name} is missing"
        assert name not in found or torch.equal(found[name], tensor), f"{name} differs"


def go(run: Run, base: Path, said: Path, arguments: list[str], fault: str) -> int:
    limit = int(10 ** run.draw.uniform(3, 5.3)) if fault == "disk full" else None
    process = streaming_child.start_command(["prune", *arguments], said, limit)
    if fault.startswith("SIG"):
        while process.is_alive() and not (said.exists() and said.stat().st_size):
            time.sleep(0.001)
        time.sleep(run.draw.uniform(0, 1.0) ** 2)
        if process.is_alive():
            os.kill(process.pid or 0, getattr(signal, fault))
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        raise AssertionError("it hangs")
    return process.exitcode or 0


def soak_one(run: Run, base: Path) -> None:
    """Raises AssertionError where the run broke the promise. ``run.outcome`` says how it ended."""
    model, text, out, said = base / "model", base / "text.txt", base / "out", base / "said.txt"
    tiny.model(run.family, getattr(torch, run.dtype)).save_pretrained(model, max_shard_size=run.shard)
    saved.tokenizer().save_pretrained(model)
    text.write_text(saved.text(400))
    expected = reference(run, model, text)
    damage(run, model)
    arguments = [model, "--out", out, *run.arguments]
    if run.options["method"] == "wanda":
        arguments += ["--calibration", text, "--samples", 5, "--length", 24]
    code = go(run, base, said, arguments, run.fault)
    lines = said.read_text().strip().splitlines() or [""]
    run.outcome = f"{code} {lines[-1][:150]}"
    if out.exists():
        assert run.fault not in ("NaN", "truncated"), "a damaged model was pruned"
        assert code == 0 or run.fault.startswith("SIG"), run.outcome
        check_output(out, expected)
    else:
        assert code != 0, "no output, and it says that all is well"
        assert code == -signal.SIGKILL or lines[-1].startswith("wanda-kernels: error: "), run.outcome
        assert "Traceback" not in said.read_text(), said.read_text()
        assert run.fault != "none", run.outcome
    left = {path.name for path in base.iterdir()} - {"model", "text.txt", "out", "said.txt"}
    if left:
        assert left == {".out.partial"}, left
        assert run.stream, left
        assert run.fault not in OF_THE_MODEL, "left a state that nothing can be done with"
        assert not out.exists(), "left a state beside the output"
        code = go(run, base, said, [*arguments, "--resume"], "none")
        assert code == 0, said.read_text()
        check_output(out, expected)
        assert not (base / ".out.partial").exists()
        run.outcome += " | went on"


def soak(numbers: list[int], seed: int, tell: bool = False) -> dict[str, int]:
    """How often each fault ended in an output, in an error, in an error and a state to go on from."""
    counts: dict[str, int] = {}
    for number in numbers:
        run = Run(number, seed)
        base = Path(tempfile.mkdtemp(prefix="soak-"))
        try:
            soak_one(run, base)
        except AssertionError as error:
            raise AssertionError(f"{run}\n{error}\nkept: {base}") from error
        shutil.rmtree(base)
        end = "output" if run.outcome.startswith("0") else "state" if "went on" in run.outcome else "error"
        counts[f"{run.fault}: {end}"] = counts.get(f"{run.fault}: {end}", 0) + 1
        if tell:
            print(f"{run}\n       {run.outcome}", flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this run alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    numbers = [options.only] if options.only is not None else list(range(options.runs))
    try:
        counts = soak(numbers, options.seed, tell=True)
    except AssertionError as error:
        sys.exit(str(error))
    for end, count in sorted(counts.items()):
        print(f"{end:24} {count}")


if __name__ == "__main__":
    main()
