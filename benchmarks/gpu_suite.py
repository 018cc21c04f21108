"""Everything that only a GPU can settle, in one command: build, measure, test, record.

    python -m benchmarks.gpu_suite [--minutes 9] [--out DIR] [--only build,smoke] [--dry]     (make gpu)
    python -m benchmarks.gpu_suite --short            what matters most, in 200 seconds (make gpu-short)
    python -m benchmarks.gpu_suite --record DIR       puts its rows into benchmarks/results/<device>/

Stages run in order of value, each in a process of its own with a time limit. A failure does not stop the next, but
nothing is timed where the kernels were not built for the card. DIR ($OUT, where that is set) gets at most seven files:
summary.txt, log.txt, environment.json, figures.jsonl, rows.csv, ncu.csv, and for a moment one that replaces another.
They are at most a few seconds old, whatever ends the run. --dry runs the same plan on the CPU with tiny sizes; what
needs a GPU's tools is only named.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from benchmarks.gpu_results import PROFILE, Results
from benchmarks.places import RESULTS, ROOT, slug
from benchmarks.records import Row, read, writer

LEAST_SECONDS = 3.0  # a stage that has less is not begun
GRACE_SECONDS = 5.0  # at the end of a limit: from the request to end to the end
UPDATE_SECONDS = 2.0
DRY_SLOWER = 10  # a CPU may be, and be busy
MINUTES, SHORT_MINUTES = 9.0, 200 / 60
MODELS = "7B,3-8B,65B"
SHORT = {  # seconds
    "build": 82, "kernels": 15, "environment": 10, "smoke": 20, "ceilings": 10, "bench select": 19, "bench sparse": 19,
    "bench refine": 13, "predictions": 6,
}  # fmt: skip
METRICS = (
    "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "lts__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,smsp__issue_active.avg.pct_of_peak_sustained_active,"
    "launch__registers_per_thread"
)
OUR_KERNELS = "wanda|sqnorm|total_kernel"  # in mangled names: the namespace of the CUDA kernels, and Triton's


@dataclass
class Stage:
    """``command`` after the interpreter, or a tool's own; ``dry`` is what runs with --dry (None: it is only named).

    Attributes:
        required: the run stops where it fails.
        spare: it runs only where the limits of all later stages leave it its seconds.
    """

    name: str
    seconds: float
    command: list[str]
    dry: list[str] | None = None
    tool: str | None = None
    required: bool = False
    spare: bool = False


class StoppedError(KeyboardInterrupt):
    """SIGINT or SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def plan(parts: Path) -> list[Stage]:
    python = sys.executable

    def own(stage: str) -> list[str]:
        return [python, "-m", "benchmarks.gpu_stages", stage, "--device", "cuda"]

    def tiny(stage: str) -> list[str]:
        return [python, "-m", "benchmarks.gpu_stages", stage, "--device", "cpu", "--quick"]

    def sanitizer(tool: str) -> Stage:
        """Of our kernels alone: it would spend its time on the reference's sorts."""
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command += ["--kernel-name", f"regex={OUR_KERNELS}", *own("smoke"), "--quick"]
        return Stage(tool, 23, command, tool="compute-sanitizer")

    def bench(suite: str, seconds: float, spare: bool = False) -> Stage:
        shared = [python, "-m", "wanda_kernels", "bench", "--suite", suite, "--out", str(parts)]
        full = [*shared, "--device", "cuda", *([] if suite in ("end-to-end", "scaling") else ["--models", MODELS])]
        return Stage(f"bench {suite}", seconds, full, [*shared, "--device", "cpu", "--quick"], spare=spare)

    beside = [python, "-m", "benchmarks.predict", "--beside", str(parts)]
    llama = [python, "-m", "benchmarks.random_llama"]
    tiny_llama = [*llama, "--device", "cpu", "--quick", "--blocks", "2", "--samples", "2", "--length", "16"]
    decode = [python, "-m", "benchmarks.decode_7b"]
    tiny_decode = [*decode, "--device", "cpu", "--quick", "--blocks", "2"]
    tiny_decode += ["--prompt", "8", "--tokens", "4", "--rounds", "1"]
    tests = [python, "-m", "pytest", "-m", "gpu and not slow", "--tb=short", "--maxfail", "30"]
    tests += ["-p", "no:cacheprovider", "--continue-on-collection-errors", *_test_files()]
    # A card's clocks are not ours to set.
    profile = ["ncu", "--clock-control", "none", "--csv", "--log-file", str(parts / PROFILE), "--metrics", METRICS]
    profile += ["--kernel-name", "regex:rows|nm_|refine|pack|sqnorm|bitmap|sparse24"]
    return [
        Stage("build", 100, [python, "-m", "benchmarks.gpu_build"], tool="nvcc", required=True),
        Stage("kernels", 15, own("kernels"), tiny("kernels"), required=True),
        Stage("environment", 10, own("environment"), tiny("environment")),
        Stage("smoke", 35, own("smoke"), tiny("smoke")),
        Stage("ceilings", 15, own("ceilings"), tiny("ceilings")),
        bench("select", 35),
        bench("sparse", 37),
        bench("refine", 18),
        Stage("llama-7b", 40, llama, tiny_llama),
        Stage("decode-7b", 41, decode, tiny_decode),
        bench("end-to-end", 23),
        Stage("repeats", 20, own("repeats"), tiny("repeats")),
        Stage("tests", 45, tests, [*tests, "--collect-only"]),
        bench("nm", 20),
        bench("stats", 15),
        Stage("predictions", 7, beside, beside),
        bench("scaling", 25, spare=True),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Stage("ncu", 30, [*profile, *own("main")], tiny("main"), tool="ncu", spare=True),
    ]


def _test_files() -> list[str]:
    """What only a card can show first; pytest keeps the order of files, but not of a file and its folder."""
    names = [path.name for path in (ROOT / "tests").glob("test_*.py")]
    return [f"tests/{name}" for name in sorted(names, key=lambda name: (name != "test_gpu.py", name))]


def short_plan(parts: Path) -> list[Stage]:
    return [replace(stage, seconds=SHORT[stage.name]) for stage in plan(parts) if stage.name in SHORT]


def run(out: Path, minutes: float, only: Sequence[str] = (), dry: bool = False, short: bool = False) -> int:
    """Runs the plan; 0 where no stage failed or ran out of time."""
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as scratch:
        parts = Path(scratch)
        stages = short_plan(parts) if short else plan(parts)
        names = [stage.name for stage in stages]
        unknown = [name for name in only if name not in names]
        if unknown:
            raise ValueError(f"--only must be of {', '.join(names)}, got '{unknown[0]}'")
        if out.exists() and any(out.iterdir()):
            raise FileExistsError(f"--out {out} is not empty: name a new folder")
        if only:  # on a GPU never without a look at what would run
            stages = [stage for stage in stages if stage.name in only or (stage.name == "kernels" and not dry)]
        results = Results(out, parts)
        results.tell(f"{'dry run, ' if dry else ''}{len(stages)} stages, {minutes:g} minutes, results in {out}")
        bad = 0
        for number, stage in enumerate(stages):
            left = end - time.monotonic()
            later = sum(other.seconds for other in stages[number + 1 :] if not other.spare)
            try:
                if stage.spare and left - later < stage.seconds:
                    verdict, seconds, note = "skipped", 0.0, f"its {stage.seconds:g} s do not fit"
                else:
                    verdict, seconds, note = _run_stage(stage, results, dry, left)
            except KeyboardInterrupt:
                results.tell(f"{stage.name:<17} interrupted")
                raise
            results.tell(f"{stage.name:<17} {verdict:<12} {seconds:6.1f} s  {note[:160]}")
            bad += verdict in ("failed", "out of time")
            if stage.required and verdict not in ("ok", "dry"):
                for failed in (other for other in stages[: number + 1] if other.required):
                    for line in results.reason(failed.name):
                        results.tell(f"  {failed.name}: {line}")
                results.tell(f"stopped: without '{stage.name}' the rest would say nothing of the kernels")
                return 1
        results.tell("all passed" if bad == 0 else f"{bad} stages failed: see log.txt")
    return 1 if bad else 0


def _run_stage(stage: Stage, results: Results, dry: bool, left: float) -> tuple[str, float, str]:
    """Verdict, seconds, a note."""
    command = stage.dry if dry else stage.command
    if dry and command is None:
        return "dry", 0.0, shlex.join(stage.command)
    assert command is not None
    environment = _environment()
    if not dry and stage.tool and shutil.which(stage.tool, path=environment["PATH"]) is None:
        return "failed" if stage.required else "skipped", 0.0, f"{stage.tool} is not installed"
    if left < LEAST_SECONDS:
        return "skipped", 0.0, "no time left"
    start = time.monotonic()
    limit = min(stage.seconds * (DRY_SLOWER if dry else 1), left)
    grace = min(GRACE_SECONDS, limit / 2)
    results.begin(stage.name)
    child = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=results.log, stderr=subprocess.STDOUT, env=environment,
        start_new_session=True, preexec_fn=_listen,
    )  # fmt: skip
    try:
        code = _wait(child, stage, results, limit - grace)
        if code is None:
            _interrupt(child, stage, results, grace)
    except KeyboardInterrupt:
        _interrupt(child, stage, results, grace)
        raise
    finally:
        _kill(child)
        results.end()
    verdict = "out of time" if code is None else "ok" if code == 0 else "failed"
    note = results.note(verdict != "ok")
    if stage.name.startswith("bench ") and not note:
        note = f"{results.row_count(stage.name.removeprefix('bench '))} rows"
    return verdict, time.monotonic() - start, note


def _environment() -> dict[str, str]:
    """Finds the toolkit's programs where its folder is not on PATH; nothing waits for a network."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    path = os.environ.get("PATH", os.defpath) + os.pathsep + str(toolkit)
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def _wait(child: subprocess.Popen[bytes], stage: Stage, results: Results, seconds: float) -> int | None:
    """Its exit code, or None where it still runs; the results are brought up to date meanwhile."""
    start = time.monotonic()
    while child.poll() is None:
        waited = time.monotonic() - start
        if waited >= seconds:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(min(UPDATE_SECONDS, seconds - waited))
        results.update(f"{stage.name:<17} running")
    return child.returncode


def _listen() -> None:
    """In a stage's process: what a shell starts in the background ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(child: subprocess.Popen[bytes], stage: Stage, results: Results, grace: float) -> None:
    """Asks it and all that it started to end, and gives it time to say how far it came."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGINT)
    _wait(child, stage, results, grace)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _stop(number: int, _frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):  # the end takes seconds: once is enough
        signal.signal(each, signal.SIG_IGN)
    raise StoppedError(number)


def record(folder: Path) -> list[Path]:
    """The suites' rows of a run on a GPU, into ``benchmarks/results/<device>/<suite>.csv``."""
    rows = read(folder / "rows.csv")
    if not rows or any(row["device_type"] != "cuda" for row in rows):
        raise ValueError(f"{folder / 'rows.csv'} holds no rows of a GPU")
    name = slug(rows[0]["device"])
    by_suite: dict[str, list[Row]] = {}
    for row in rows:
        by_suite.setdefault(row["suite"], []).append(row)
    written = []
    for suite, mine in by_suite.items():
        written.append(RESULTS / name / f"{suite}.csv")
        with writer(written[-1]) as write:
            for row in mine:
                write(row)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help=f"default: {MINUTES:g}, with --short {SHORT_MINUTES:.1f}")
    parser.add_argument("--out", type=Path, help="default: $OUT, or gpu-results")
    parser.add_argument("--only", default="", metavar="STAGE,STAGE,..")
    parser.add_argument("--short", action="store_true", help="what matters most")
    parser.add_argument("--dry", action="store_true", help="the plan on the CPU, with tiny sizes")
    parser.add_argument("--record", type=Path, metavar="DIR", help="take over the rows of a run, and run nothing")
    options = parser.parse_args()
    try:
        if options.record is not None:
            print("\n".join(f"wrote {path}" for path in record(options.record)))
            return
        only = [name.strip() for name in options.only.split(",") if name.strip()]
        out = options.out or Path(os.environ.get("OUT") or "gpu-results")
        minutes = options.minutes or (SHORT_MINUTES if options.short else MINUTES)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        sys.exit(run(out, minutes, only, options.dry, options.short))
    except (OSError, ValueError) as error:
        sys.exit(f"gpu_suite: error: {error}")
    except StoppedError as stopped:
        print("interrupted; what was measured is in the folder", file=sys.stderr)
        sys.exit(128 + stopped.number)


if __name__ == "__main__":
    main()
