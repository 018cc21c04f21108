"""llama.cpp beside ours: its ``llama-bench``, where it is on the path, generates from GGUF files in the same turns."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

PROGRAM = "llama-bench"
WAY = "llama.cpp"


def check_program(files: list[Path]) -> str:
    """The path of ``llama-bench``. Raises ValueError where it is not on the path, or a file is not there."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise ValueError(f"{PROGRAM} is not on the path: it comes with llama.cpp (its target of that name)")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is no file: {PROGRAM} reads GGUF files")
    return program


class LlamaBench:
    """A GGUF file, one prompt at a time: the same numbers of tokens and threads as the models, random tokens of its
    own. Decoding begins behind the prompt, as theirs does.

    Args:
        program: as :func:`check_program` gives it.
        prompt, tokens: how many are read and generated.
    """

    way, batch = WAY, 1

    def __init__(self, program: str, file: Path, prompt: int, tokens: int, device: torch.device) -> None:
        self._program, self._file, self._device = program, file, device
        self._prompt, self._tokens = prompt, tokens
        self._speeds: list[tuple[float, float]] = []
        self._bytes = 0

    def turn(self, number: int) -> None:
        """As the models' turns; their second, which measures memory, is not for it: what it takes cannot be told."""
        if number == 1:
            return
        read = self._run("-p", self._prompt, "-n", 0)
        made = self._run("-p", 0, "-n", self._tokens, "-d", self._prompt)
        self._bytes = read["model_size"]
        if number > 1:
            self._speeds.append((read["avg_ts"], made["avg_ts"]))

    def _run(self, *options: str | int) -> dict[str, Any]:
        # One repetition after its own warm-up, in a process of its own: the rounds repeat it.
        command = [self._program, "-m", self._file, *options, "-r", 1, "-o", "json", "-t", torch.get_num_threads()]
        command += ["-ngl", 0 if self._device.type == "cpu" else 99]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        try:
            if done.returncode == 0:
                (found,) = json.loads(done.stdout)
                return {name: found[name] for name in ("avg_ts", "model_size")}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{PROGRAM} printed no result that is known for {self._file}: {error}") from error
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"{PROGRAM} ended with {done.returncode} for {self._file}: {last}")

    def row(self) -> dict[str, Any]:
        prefill, decode = (statistics.median(run) for run in zip(*self._speeds, strict=True))
        return {
            "way": self.way, "batch": self.batch, "first_token_s": self._prompt / prefill, "prefill_tokens_s": prefill,
            "decode_tokens_s": decode, "weight_bytes": self._bytes, "peak_bytes": None,
        }  # fmt: skip
