"""One run of the soak test: what is drawn from its number, its folder, and the checks that all faults share."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import saved
import streaming_child
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wanda_kernels import prune
from wanda_kernels.text import load_calibration
from wanda_kernels.text.windows import needs_bos

# One fault after the other. The longest lists of kinds come up twice as often.
TURNS = (
    "none", "disk full", "truncated", "wrong index", "NaN", "SIGTERM", "SIGINT", "SIGKILL",
    "other rank", "kill while publishing", "wrong state", "shard vanishes", "missing tensor", "killed rank",
    "two commands", "other rank", "kill while publishing", "killed rank",
)  # fmt: skip
OF_THE_MODEL = ("truncated", "wrong index", "NaN", "missing tensor")  # going on would meet them again
OF_RANKS = ("other rank", "killed rank")
FAMILIES = ("llama", "llama tied", "gemma2", "opt")
SAMPLES, LENGTH = 6, 24
TIMEOUT_S = 300
ERROR = "wanda-kernels: error: "


@dataclass
class Run:
    """Drawn from its number and the seed alone."""

    number: int
    seed: int
    base: Path
    fault: str = ""
    turn: int = 0  # how many runs with this fault were before
    family: str = ""
    dtype: str = ""
    shard: str = ""
    stream: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of prune()
    arguments: list[str] = field(default_factory=list)  # the same, for the command line
    outcome: str = ""
    commands: list[list[str]] = field(default_factory=list)  # that were run

    def __post_init__(self) -> None:
        draw = self.draw = random.Random(f"{self.seed} {self.number}")
        rounds, place = divmod(self.number, len(TURNS))
        self.fault = TURNS[place]
        self.turn = rounds * TURNS.count(self.fault) + TURNS[:place].count(self.fault) + self.seed
        self.family, self.dtype = draw.choice(FAMILIES), draw.choice(("float32", "bfloat16"))
        self.shard = draw.choice(("60KB", "150KB") if self.fault == "wrong index" else ("50GB", "60KB", "150KB"))
        self.stream = draw.random() < 0.7
        options: dict[str, Any] = draw.choice(
            [{"pattern": "2:4"}, {"pattern": "4:8"}, {"sparsity": draw.uniform(0.1, 0.9)}]
        )
        options["method"] = draw.choice(("wanda", "wanda", "magnitude"))
        if self.fault == "other rank":
            options["method"] = "wanda"
        if options["method"] == "wanda":
            options |= {"propagate": draw.choice(("pruned", "dense")), "batch_size": draw.choice((1, 2, 7))}
            options |= {"exact_error": draw.random() < 0.3, "fuse_statistics": draw.random() < 0.7}
            if self.fault in OF_RANKS:
                options |= {"batch_size": draw.choice((1, 2)), "exact_error": False}
        self.options = options
        self.few_activations = draw.random() < 0.5
        self._processes: list[BaseProcess] = []
        self.write_arguments()

    def write_arguments(self, text: Path | None = None) -> None:
        """Again after a change of ``options`` or ``stream``. ``text``: another one than the run's own."""
        self.arguments = ["--samples", str(SAMPLES), "--length", str(LENGTH), "--calibration", str(text or self.text)]
        flags = {"fuse_statistics": (None, "--no-fuse"), "exact_error": ("--exact-error", None)}
        for name, value in self.options.items():
            if name in flags:
                self.arguments += [flag for flag in [flags[name][0 if value else 1]] if flag]
            else:
                self.arguments += [f"--{name.replace('_', '-')}", str(value)]
        self.arguments += ["--stream"] if self.stream else []
        self.arguments += ["--activation-memory", "0"] if self.stream and self.few_activations else []

    def __str__(self) -> str:
        words = " ".join(self.arguments[6:])
        return f"{self.number:4} {self.fault:22} {self.family:12} {self.dtype:8} {self.shard:5} {words}"

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"base": str(self.base)}, indent=2)

    @property
    def model(self) -> Path:
        return self.base / "model"

    @property
    def text(self) -> Path:
        return self.base / "text.txt"

    @property
    def out(self) -> Path:
        return self.base / "out"

    @property
    def work(self) -> Path:
        """The hidden folder of a streamed run."""
        return self.base / ".out.partial"

    @property
    def said(self) -> Path:
        return self.base / "said.txt"

    def save_model(self) -> None:
        """The inputs, as they are before anything happens to them."""
        tiny.model(self.family, getattr(torch, self.dtype)).save_pretrained(self.model, max_shard_size=self.shard)
        saved.tokenizer().save_pretrained(self.model)
        self.text.write_text(saved.text(400))
        self.expected = self.reference(self.options)

    def reference(self, options: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What pruning with ``options`` must give."""
        whole = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")
        ids = None
        if options["method"] == "wanda":
            bos = needs_bos(whole.config)
            ids = load_calibration(str(self.text), saved.tokenizer(), SAMPLES, LENGTH, bos=bos)
        prune(whole, ids, **options)
        # copied: they may be views of a mapped file, which a fault is about to shorten
        return {name: tensor.clone() for name, tensor in whole.state_dict().items()}

    def start(self, arguments: list | None = None, said: Path | None = None, **how: Any) -> BaseProcess:
        """A command, not waited for. ``how``: of streaming_child.start_command."""
        command = ["prune", self.model, "--out", self.out, *self.arguments] if arguments is None else arguments
        self.commands.append([str(word) for word in command])
        process = streaming_child.start_command(command, said or self.said, **how)
        self._processes.append(process)
        return process

    def go(self, *extra: str, **how: Any) -> int:
        """The run's command to its end: its exit code."""
        process = self.start(["prune", self.model, "--out", self.out, *self.arguments, *extra], **how)
        return wait(process)

    def end(self) -> None:
        """No process stays behind a run that failed."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()

    def left(self) -> set[str]:
        """What is there beside the inputs, the output and what was printed."""
        mine = {"model", "text.txt", "out", "run.json", "inputs"}
        return {path.name for path in self.base.iterdir() if path.name not in mine and path.suffix != ".txt"}

    def check_output(self, expected: dict[str, torch.Tensor] | None = None, out: Path | None = None) -> None:
        """The output is complete and correct."""
        out = out or self.out
        assert out.is_dir(), f"no {out.name}: {last_line(self.said)}"
        found = tensors(out)
        AutoModelForCausalLM.from_pretrained(out)
        names = {path.name for path in out.iterdir()}
        assert {"config.json", "tokenizer.json", "pruning_report.json"} <= names, sorted(names)
        assert not any(path.is_symlink() for path in out.iterdir()), "a link in the output"
        for name, tensor in (self.expected if expected is None else expected).items():
            assert name in found or name == "lm_head.weight", f"{name} is missing in {out.name}"
            assert name not in found or torch.equal(found[name], tensor), f"{name} differs in {out.name}"

    def check_error(self, code: int, said: Path | None = None) -> str:
        """It ended in a clear error: its line."""
        said = said or self.said
        assert code > 0, f"exit code {code}: {last_line(said)}"
        # An exception that comes from outside (a signal, the loss of another rank) may hit a thread that just starts;
        # Python prints that one, and it is raised where it belongs all the same.
        assert "Traceback" not in said.read_text().partition("Exception ignored in")[0], said.read_text()
        assert last_line(said).startswith(ERROR), f"exit code {code}, and no error line: {last_line(said)}"
        return last_line(said).removeprefix(ERROR)

    def recover(self) -> None:
        """What a run left is gone on from to the right files, or refused; a start anew gives them."""
        if not self.out.exists() and self.work.exists():
            code = self.go("--resume")
            self.outcome += " | went on" if code == 0 else f" | refused: {self.check_error(code)[:150]}"
            assert (code == 0) == self.out.exists(), f"exit code {code}, output {self.out.exists()}"
        if not self.out.exists():
            assert self.go("--overwrite") == 0, f"no start anew: {last_line(self.said)}"
            self.outcome += " | anew"
        self.check_output()
        assert not self.left(), f"left beside the output: {self.left()}"


def wait(process: BaseProcess, seconds: float = TIMEOUT_S) -> int:
    process.join(seconds)
    assert not process.is_alive(), f"it still runs after {seconds:.0f} s"
    return process.exitcode or 0


def wait_until_it_speaks(process: BaseProcess, said: Path) -> None:
    while process.is_alive() and not (said.exists() and said.stat().st_size):
        time.sleep(0.001)


def is_of_killed(code: int) -> bool:
    return code == -signal.SIGKILL


def last_line(said: Path) -> str:
    lines = said.read_text().strip().splitlines() if said.exists() else []
    return lines[-1][:400] if lines else ""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def copy_inputs(run: Run) -> None:
    """For a run that changes or loses them."""
    shutil.copytree(run.model, run.base / "inputs")
