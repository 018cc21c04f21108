"""Mutated model folders: each is refused with a message that names what is wrong, or loads with exactly the tensors
that the files hold. Never a crash, a hang, a traceback, memory that grows without bound, or weights that come from
nowhere.

python tests/mutations.py [--packed 2000] [--plain 500] [--seed 0] [--only N]

A number below --packed is a packed folder's, the others are plain ones. Every 20th goes through the command line too.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import saved
import tiny
import torch
from judging import Broken, check_same
from mutators import mutate
from mutators_tensors import HOSTILE, load_json
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import wanda_kernels
from wanda_kernels.cli.app import main as command_line
from wanda_kernels.models import load_model

FAMILIES = ("llama", "llama tied", "llama biases", "gemma2", "gemma3", "phi3", "opt")
PACKINGS = ("bitmap", "2:4", "mixed")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
CHUNK = 50  # numbers per process
HANGS_S = 60
MEMORY = 400 << 20  # more than this for a folder of half a megabyte is a bomb
ADDRESSES = 3 << 30
TOO_MANY = [value for value in (*HOSTILE, 10**5, 10**7, 10**12) if isinstance(value, int | float) and value > 1000]
# Words of a library's insides that tell nobody what is wrong, unless the message names a file, a tensor or a field too.
NAMES_IT = re.compile(
    r"config\.json|\.safetensors|\.json|quantization_config|--length|layers\.\d|weight|bias|lm_head|embed|tensor|config"
)
INSIDES = re.compile(r"index out of range in self|unhashable type|list indices must|^'?\w+'?$|recursion depth")
NO_MEMORY = re.compile(r"allocate memory|not enough memory|MemoryError|bad_alloc|Cannot allocate", re.I)


@dataclass(frozen=True)
class Case:
    """One mutated folder, drawn from its number."""

    number: int
    seed: int
    packed: bool

    @property
    def draw(self) -> random.Random:
        return random.Random(f"{self.seed} {self.number}")

    @property
    def base(self) -> str:
        """Which sound folder is mutated."""
        draw = self.draw
        packing = draw.choice(PACKINGS) if self.packed else "plain"
        return ",".join((draw.choice(FAMILIES), draw.choice(("float32", "bfloat16")), draw.choice("1n"), packing))


def make_base(folder: Path, base: str) -> None:
    family, dtype, shards, packing = base.split(",")
    options = SIZES | ({"ffn_dim": 128} if family == "opt" else {})
    model = tiny.model(family, getattr(torch, dtype), **options)
    if packing != "plain":
        blocks = model.get_decoder().layers
        for number, (name, linear) in enumerate(
            (name, module) for name, module in blocks.named_modules() if isinstance(module, torch.nn.Linear)
        ):
            weight = linear.weight.data
            if packing == "2:4" or (packing == "mixed" and name.startswith("1.")):
                weight.view(weight.shape[0], -1, 4)[..., number % 2 :: 2] = 0
            elif packing == "bitmap" or number:  # mixed: the first stays dense
                weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(number)) < 0.6] = 0
        wanda_kernels.compress(model)
    model.save_pretrained(folder, max_shard_size="60KB" if shards == "n" else "1GB")
    saved.tokenizer().save_pretrained(folder)


def causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def judge_error(error: Exception) -> str:
    """The kind of a refusal."""
    message = str(error)
    for cause in causes(error):
        if isinstance(cause, MemoryError) or NO_MEMORY.search(str(cause)):
            raise Broken(f"asks for memory that is not there: {message}") from error
    if type(error) not in (ValueError, FileNotFoundError, OSError, ImportError):
        raise Broken(f"{type(error).__name__}: {message}") from error
    if INSIDES.search(message) or not NAMES_IT.search(message) or len(message) > 2000:
        raise Broken(f"a message that names nothing: {type(error).__name__}: {message}") from error
    return "refused"


def forward(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model(input_ids=tiny.ids()[:1, :4])


def judge_load(folder: Path, draw: random.Random) -> str:
    dtype = draw.choice(("auto", "auto", "auto", "float16", "float32", "bfloat16"))
    device_map = draw.choice((None, None, "cpu"))
    try:
        model = load_model(str(folder), dtype, "cpu", device_map)
    except Exception as error:  # noqa: BLE001  (judged)
        return f"{judge_error(error)}: {error}"
    if dtype != "auto" and model.dtype != getattr(torch, dtype):
        raise Broken(f"asked for {dtype}, got {model.dtype}")
    check_same(model, folder)
    try:
        forward(model)
    except Exception as error:
        if isinstance(error, ValueError) and any(name in str(error) for name in load_json(folder / "config.json")):
            return "cannot compute, and says by which field"
        raise Broken(f"loads, and cannot compute: {type(error).__name__}: {error}") from error
    return "loaded"


def judge_plain_transformers(folder: Path) -> str:
    """What a user does who imports the package: nothing may be wrong silently, a crash or a hang must not be."""
    config = load_json(folder / "config.json")
    quantised = config.get("quantization_config")
    if config.get("num_hidden_layers") in TOO_MANY:
        return "not tried: transformers makes all those layers before it asks anybody"
    if not isinstance(quantised, dict) or quantised.get("quant_method") != "wanda_packed":
        return "not tried: nothing of this package takes part"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        if any(isinstance(cause, MemoryError) or NO_MEMORY.search(str(cause)) for cause in causes(error)):
            raise Broken(f"from_pretrained asks for memory that is not there: {error}") from error
        return "refused"
    left = check_same(model, folder, drops=True)
    return f"dropped: {left[0]}" if left else "loaded"


def judge_command(folder: Path, base: Path, draw: random.Random, loads: bool) -> None:
    text = base / "text.txt"
    text.write_text(saved.text(40))
    out = base / "out"
    command = draw.choice(
        [["eval", str(folder), "--text", str(text), "--length", "8", "--device", "cpu"]]
        + [[name, str(folder), "--out", str(out)] for name in ("compress", "decompress")]
    )
    said, printed, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        try:
            command_line(command)
        except SystemExit as exit_:
            code = exit_.code
    lines = [line for line in said.getvalue().splitlines() if "error:" in line]
    told = f"{command[0]}: exit {code}: {said.getvalue()}"
    if "Traceback" in told or code not in (0, 1, 2):
        raise Broken(told)
    if code and (len(lines) != 1 or not lines[0].startswith("wanda-kernels: error: ")):
        raise Broken(f"not one error line: {told}")
    if code == 0 and not loads:
        raise Broken(f"what load_model refuses goes through {told}")
    if code and ((not NAMES_IT.search(told) and str(folder) not in told) or INSIDES.search(lines[0])):
        raise Broken(f"a message that names nothing: {told}")
    if code and out.exists():
        raise Broken(f"an error, and an output: {told}")


def judge(case: Case, bases: Path, folder: Path) -> tuple[str, str, str]:
    """(what was done, how it ended, how transformers' own from_pretrained ended). Raises Broken."""
    shutil.copytree(bases / case.base, folder)
    draw = case.draw
    done = mutate(folder, draw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        end = judge_load(folder, draw)
        through = judge_plain_transformers(folder) if case.packed else ""
        if case.number % 20 == 0:
            judge_command(folder, folder.parent, draw, not end.startswith("refused"))
    except Broken as error:
        raise Broken(f"{done}: {error}") from error
    if done == "none" and end != "loaded":
        raise Broken(f"a sound folder is {end}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if grown > MEMORY:
        raise Broken(f"{done}: {end}: takes {grown >> 20} MiB")
    return done, end, through


def work(cases: list[Case], bases: Path, top: Path, log: Path) -> None:
    """In a process of its own: a line to the log when a case begins, and one when it has ended."""
    torch.set_num_threads(1)  # here too: the first use of torch's threads after a fork must not be by two at once
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, resource.RLIM_INFINITY))
    with log.open("a") as file:

        def tell(*line: object) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for case in cases:
            tell(case.number)
            folder = top / str(case.number) / "model"
            folder.parent.mkdir()
            try:
                tell(case.number, "ok", *judge(case, bases, folder))
                shutil.rmtree(folder.parent)
            except Exception as error:  # noqa: BLE001  (a fault of the test itself is told as well)
                tell(case.number, "red", f"{type(error).__name__}: {error}")
            if case.number % 10 == 0:
                gc.collect()


@dataclass
class Chunk:
    """Cases that one process works on."""

    cases: list[Case]
    log: Path
    process: multiprocessing.Process
    since: float = 0.0
    size: int = -1

    def lines(self) -> list[list[str]]:
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("]")]

    def hangs(self) -> bool:
        size = self.log.stat().st_size if self.log.exists() else 0
        if size != self.size:
            self.size, self.since = size, time.monotonic()
        return time.monotonic() - self.since > HANGS_S


def run(cases: list[Case], jobs: int = 2, tell: bool = False) -> tuple[list[list[str]], list[str]]:
    """(a line for each case that kept the promise, words for each that broke it)."""
    torch.set_num_threads(1)
    top = Path(tempfile.mkdtemp(prefix="mutations-"))
    bases = top / "bases"
    for base in sorted({case.base for case in cases}):
        make_base(bases / base, base)
    judge_load(bases / cases[0].base, cases[0].draw)  # what is imported now, no process imports again
    judge_command(bases / cases[0].base, top, cases[0].draw, True)
    shutil.rmtree(top / "out", ignore_errors=True)
    gc.freeze()
    fork = multiprocessing.get_context("fork")
    waiting = [cases[begin : begin + CHUNK] for begin in range(0, len(cases), CHUNK)]
    active: list[Chunk] = []
    good: list[list[str]] = []
    red: list[str] = []
    count = 0
    while waiting or active:
        while waiting and len(active) < jobs:
            chunk, log = waiting.pop(0), top / f"log{count}"
            count += 1
            process = fork.Process(target=work, args=(chunk, bases, top, log))
            process.start()
            active.append(Chunk(chunk, log, process))
        time.sleep(0.02)
        for chunk in list(active):
            hangs = chunk.hangs()
            if hangs:
                chunk.process.kill()
                chunk.process.join()
            if chunk.process.is_alive():
                continue
            active.remove(chunk)
            lines = chunk.lines()
            ended = {line[0]: line for line in lines if len(line) > 1}
            good += [line for line in ended.values() if line[1] == "ok"]
            broken = [f"{line[0]}: {line[2]}" for line in ended.values() if line[1] == "red"]
            left = [case for case in chunk.cases if case.number not in ended]
            if left:
                how = "hangs" if hangs else f"the process died: exit code {chunk.process.exitcode}"
                broken.append(f"{left[0].number}: {how}")
                waiting += [left[1:]] if left[1:] else []
            if tell:
                print(*broken, sep="\n", end="\n" if broken else "", flush=True)
            red += broken
    if not red:
        shutil.rmtree(top)
    elif tell:
        print(f"folders: {top}/NUMBER/model")
    return good, red


def cases_of(packed: int, plain: int, seed: int) -> list[Case]:
    return [Case(number, seed, number < packed) for number in range(packed + plain)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=int, default=2000)
    parser.add_argument("--plain", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, help="this one alone")
    parser.add_argument("--verbose", action="store_true", help="how each ended")
    options = parser.parse_args()
    logging.disable_progress_bar()
    cases = cases_of(options.packed, options.plain, options.seed)
    if options.only is not None:
        cases = [case for case in cases if case.number == options.only]
    begin = time.monotonic()
    good, red = run(cases, options.jobs, tell=True)
    if options.verbose or options.only is not None:
        for number, _, done, end, through in sorted(good):
            print(f"{number}: {done}\n    {end}\n    from_pretrained: {through or '-'}")
    packed = {case.number for case in cases if case.packed}
    for kind in (True, False):
        ends = Counter(line[3].split(":")[0] for line in good if (line[0] in packed) == kind)
        print(f"{'packed' if kind else 'plain'}: {dict(sorted(ends.items()))}")
    print(f"from_pretrained: {dict(sorted(Counter(line[4].split(':')[0] for line in good if line[4]).items()))}")
    print(f"{len(good)} good, {len(red)} red, {time.monotonic() - begin:.0f} s")
    for line in red:
        number = line.split(":")[0]
        print(
            f"again: python tests/mutations.py --packed {options.packed} --plain {options.plain} "
            f"--seed {options.seed} --only {number}"
        )
    sys.exit(1 if red else 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
