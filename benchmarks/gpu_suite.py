"""Everything that only a GPU can settle, in one command: build, test, measure, record.

    python -m benchmarks.gpu_suite --minutes 9 --out DIR [--only build,smoke] [--dry]     (make gpu)
    python -m benchmarks.gpu_suite --record DIR       puts its rows into benchmarks/results/<device>/

Stages run in order of value, each in a process of its own with a time limit; what one prints is on the disk at once,
and a failure does not stop the next. DIR gets at most six files: summary.txt, log.txt, environment.json, figures.jsonl,
rows.csv, ncu.csv. --dry runs the same plan on the CPU with tiny sizes; what needs a GPU's tools is only named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.circumstances import RESULTS, ROOT, slug
from benchmarks.records import Row, read, row_writer, writer

FILE_BYTES = 16 << 20
LOG_BYTES = 800_000  # of a stage: twenty of them fit a file
LEAST_SECONDS = 3.0  # a stage that has less is not begun
DRY_SLOWER = 10  # a CPU may be, and be busy
PARTS = ".parts"  # in DIR while it runs
MODELS = "7B,65B,3-8B"
METRICS = (
    "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread"
)


@dataclass
class Stage:
    """``command`` after the interpreter, or a tool's own; ``dry`` is what runs with --dry (None: it is only named)."""

    name: str
    seconds: float
    command: list[str]
    dry: list[str] | None = None
    tool: str | None = None


def plan(parts: Path) -> list[Stage]:
    python = sys.executable

    def own(stage: str) -> list[str]:
        return [python, "-m", "benchmarks.gpu_stages", stage, "--device", "cuda"]

    def tiny(stage: str) -> list[str]:
        return [python, "-m", "benchmarks.gpu_stages", stage, "--device", "cpu", "--quick"]

    def sanitizer(tool: str) -> Stage:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *own("smoke"), "--quick"]
        return Stage(tool, 40, command, tool="compute-sanitizer")

    def bench(suite: str, seconds: float) -> Stage:
        shared = [python, "-m", "wanda_kernels", "bench", "--suite", suite, "--out", str(parts)]
        full = [*shared, "--device", "cuda", *([] if suite in ("end-to-end", "scaling") else ["--models", MODELS])]
        return Stage(f"bench {suite}", seconds, full, [*shared, "--device", "cpu", "--quick"])

    llama = [python, "-m", "benchmarks.random_llama"]
    profile = ["ncu", "--csv", "--log-file", str(parts / "ncu.csv"), "--metrics", METRICS]
    profile += ["--kernel-name", "regex:rows|nm_|pack|sqnorm|bitmap|sparse24"]
    return [
        Stage("environment", 30, own("environment"), tiny("environment")),
        Stage("build", 180, [python, "setup.py", "build_ext", "--inplace"], tool="nvcc"),
        Stage("smoke", 60, own("smoke"), tiny("smoke")),
        Stage("tests", 120, [python, "-m", "pytest", "-m", "gpu", "-q", "--maxfail", "30", "-p", "no:cacheprovider"]),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        sanitizer("synccheck"),
        Stage("repeats", 40, own("repeats"), tiny("repeats")),
        Stage("ceilings", 30, own("ceilings"), tiny("ceilings")),
        bench("select", 40),
        bench("sparse", 40),
        bench("nm", 40),
        bench("stats", 30),
        bench("end-to-end", 60),
        Stage("llama-7b", 90, llama, [*llama, "--device", "cpu", "--quick", "--blocks", "2", "--samples", "2",
                                      "--length", "16"]),
        bench("scaling", 30),
        Stage("ncu", 60, [*profile, *own("main")], tool="ncu"),
    ]  # fmt: skip


def run(out: Path, minutes: float, only: Sequence[str] = (), dry: bool = False) -> int:
    """Runs the plan; 0 where no stage failed or ran out of time."""
    parts = out / PARTS
    stages = plan(parts)
    names = [stage.name for stage in stages]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"--only must be of {', '.join(names)}, got '{unknown[0]}'")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"--out {out} is not empty: name a new folder")
    parts.mkdir(parents=True)
    end = time.monotonic() + 60 * minutes
    bad = 0
    with (out / "summary.txt").open("w") as summary:

        def tell(line: str) -> None:
            print(line, flush=True)
            summary.write(line + "\n")
            summary.flush()

        tell(f"{'dry run, ' if dry else ''}{len(only) or len(stages)} stages, {minutes:g} minutes, results in {out}")
        for stage in stages:
            if only and stage.name not in only:
                continue
            try:
                verdict, seconds, note = _run_stage(stage, parts, dry, end - time.monotonic())
            except KeyboardInterrupt:
                _collect(out, parts)
                tell(f"{stage.name:<17} interrupted")
                raise
            bad += verdict in ("failed", "out of time")
            tell(f"{stage.name:<17} {verdict:<12} {seconds:6.1f} s  {note[:160]}")
            _collect(out, parts)
        tell("all passed" if bad == 0 else f"{bad} stages failed: see log.txt")
    shutil.rmtree(parts)
    return 1 if bad else 0


def _run_stage(stage: Stage, parts: Path, dry: bool, left: float) -> tuple[str, float, str]:
    """Verdict, seconds, a note."""
    command = stage.dry if dry else stage.command
    if dry and command is None:
        return "dry", 0.0, shlex.join(stage.command)
    assert command is not None
    environment = _environment()
    if not dry and stage.tool and shutil.which(stage.tool, path=environment["PATH"]) is None:
        return "skipped", 0.0, f"{stage.tool} is not installed"
    if left < LEAST_SECONDS:
        return "skipped", 0.0, "no time left"
    log = parts / f"{stage.name.replace(' ', '-')}.log"
    start = time.monotonic()
    with log.open("w") as file:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | None = child.wait(timeout=min(stage.seconds * (DRY_SLOWER if dry else 1), left))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
    verdict = "out of time" if code is None else "ok" if code == 0 else "failed"
    note = _note(log, code)
    if stage.name.startswith("bench ") and not note:
        files = parts.glob(f"{stage.name.removeprefix('bench ')}.csv*")
        note = f"{sum(len(read(path)) for path in files)} rows"
    return verdict, time.monotonic() - start, note


def _environment() -> dict[str, str]:
    """Finds the toolkit's programs where its folder is not on PATH; nothing waits for a network."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    path = os.environ.get("PATH", os.defpath) + os.pathsep + str(toolkit)
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def _end(child: subprocess.Popen[bytes]) -> None:
    """The process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _note(log: Path, code: int | None) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found = [line.removeprefix("summary: ") for line in lines if line.startswith("summary: ")]
    if found:
        return found[-1]
    return lines[-1] if lines and (code or "passed" in lines[-1]) else ""


def _collect(out: Path, parts: Path) -> None:
    """Everything so far, packed: logs one after the other, rows of all suites, figures, a profile."""
    logs = sorted(parts.glob("*.log"), key=lambda path: path.stat().st_mtime)
    with (out / "log.txt").open("w") as file, (out / "figures.jsonl").open("w") as figures:
        for path in logs:
            text = path.read_text(errors="replace")
            cut = "" if len(text) <= LOG_BYTES else f"\n[{len(text) - LOG_BYTES} characters cut]"
            file.write(f"==== {path.stem}\n{text[:LOG_BYTES]}{cut}\n")
            for line in text.splitlines():
                if line.startswith("figures: "):
                    _keep(line.removeprefix("figures: "), out, figures)
    rows = [row for path in sorted(parts.glob("*.csv*")) if path.name != "ncu.csv" for row in read(path)]
    with (out / "rows.csv").open("w", newline="") as file:
        write = row_writer(file)
        for row in rows:
            write(row)
    profile = parts / "ncu.csv"
    if profile.exists():
        (out / "ncu.csv").write_bytes(profile.read_bytes()[:FILE_BYTES])


def _keep(text: str, out: Path, figures: object) -> None:
    found = json.loads(text)
    if "environment" in found:
        (out / "environment.json").write_text(json.dumps(found["environment"], indent=2) + "\n")
    else:
        print(json.dumps(found), file=figures)  # type: ignore[call-overload]


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
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--only", default="", metavar="STAGE,STAGE,..")
    parser.add_argument("--dry", action="store_true", help="the plan on the CPU, with tiny sizes")
    parser.add_argument("--record", type=Path, metavar="DIR", help="take over the rows of a run, and run nothing")
    options = parser.parse_args()
    try:
        if options.record is not None:
            print("\n".join(f"wrote {path}" for path in record(options.record)))
            return
        only = [name.strip() for name in options.only.split(",") if name.strip()]
        sys.exit(run(options.out, options.minutes, only, options.dry))
    except (OSError, ValueError) as error:
        sys.exit(f"gpu_suite: error: {error}")
    except KeyboardInterrupt:
        print("interrupted; what was measured is in the folder", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
