"""`make gpu`, as far as it goes without a GPU: the plan, time limits, failures, what is written and when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import clone
import pytest
import torch

from benchmarks import gpu_build, gpu_results, gpu_stages, gpu_suite, records
from benchmarks.gpu_suite import Stage
from benchmarks.harness import Settings

ROW = {"suite": "select", "operator": "prune_rows_", "device": "Some Card 80GB", "device_type": "cuda"}


def plan_of(monkeypatch, *stages: Stage) -> None:
    monkeypatch.setattr(gpu_suite, "plan", lambda parts: list(stages))


def python(name: str, code: str, seconds: float = 30.0, **more) -> Stage:
    return Stage(name, seconds, ["never"], [sys.executable, "-c", code], **more)


def text(folder: Path, name: str) -> str:
    return (folder / name).read_text()


@pytest.mark.slow
def test_a_failure_and_a_hang_do_not_stop_the_next(tmp_path, monkeypatch):
    hang = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '600'])"
    plan_of(
        monkeypatch,
        python("broken", "print('first'); raise SystemExit('summary: 2 of 3 are wrong')"),
        python("hangs", hang, 3.0 / gpu_suite.DRY_SLOWER),
        python("fine", "print('figures: {\"ceilings\": {\"copy\": 3}}'); print('summary: all well')"),
        Stage("tool", 1.0, ["compute-sanitizer", "--tool", "memcheck"]),
    )
    start = time.monotonic()
    assert gpu_suite.run(tmp_path / "out", 9, dry=True) == 1
    assert time.monotonic() - start < 30
    lines = text(tmp_path / "out", "summary.txt").splitlines()
    assert lines[1].split()[:2] == ["broken", "failed"]
    assert lines[1].endswith("2 of 3 are wrong")
    assert lines[2].startswith("hangs             out of time")
    assert lines[3].endswith("all well")
    assert "compute-sanitizer --tool memcheck" in lines[4]
    assert lines[-1] == "2 stages failed: see log.txt"
    log = text(tmp_path / "out", "log.txt")
    assert "==== broken\nfirst" in log
    assert "begun" in log  # what was printed before it was ended
    assert json.loads(text(tmp_path / "out", "figures.jsonl")) == {"ceilings": {"copy": 3}}


ASKED = "import time\ntry: print('begun'); time.sleep(600)\nexcept KeyboardInterrupt: print('summary: came to 7')"
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf'); time.sleep(600)"


@pytest.mark.slow
def test_out_of_time_is_a_request_to_end_and_then_the_end(tmp_path, monkeypatch):
    plan_of(monkeypatch, python("asked", ASKED, 9 / gpu_suite.DRY_SLOWER), python("deaf", DEAF, 0.4))
    start = time.monotonic()
    assert gpu_suite.run(tmp_path / "out", 9, dry=True) == 1
    assert time.monotonic() - start < 9 + 4 + 5  # the grace is within the limits
    lines = text(tmp_path / "out", "summary.txt").splitlines()
    assert lines[1].startswith("asked             out of time")
    assert lines[1].endswith("came to 7")
    assert lines[2].startswith("deaf              out of time")
    assert "deaf" in text(tmp_path / "out", "log.txt")


def test_nothing_runs_after_a_failed_build(tmp_path, monkeypatch):
    failing = "print('wanda_kernels: no CUDA toolkit; the CPU kernels only'); print('\\n'.join('x' * 20)); print('end')"
    plan_of(
        monkeypatch,
        python("build", failing, required=True),
        python("kernels", "raise SystemExit('rows.cu(3): error: no such thing')", required=True),
        python("smoke", "print('never')"),
    )
    assert gpu_suite.run(tmp_path / "out", 9, dry=True) == 1
    summary = text(tmp_path / "out", "summary.txt")
    assert "rows.cu(3): error: no such thing" in summary
    assert "build: wanda_kernels: no CUDA toolkit" in summary
    assert "build: end" in summary
    assert summary.splitlines()[-1].startswith("stopped: without 'kernels'")
    assert "smoke" not in summary
    assert "never" not in text(tmp_path / "out", "log.txt")


def test_no_compiler_is_a_failed_build(tmp_path, monkeypatch):
    plan_of(
        monkeypatch,
        Stage("build", 9, ["never"], tool="no-such-nvcc", required=True),
        Stage("smoke", 9, ["never"]),
    )
    assert gpu_suite.run(tmp_path / "out", 9) == 1
    assert "no-such-nvcc is not installed\nstopped:" in text(tmp_path / "out", "summary.txt")


@pytest.mark.parametrize("only", [(), ("smoke",)])
def test_kernels_are_looked_at_whatever_is_asked_for(tmp_path, monkeypatch, only):
    """Not in a dry run: the commands are those for a GPU."""
    fails = [sys.executable, "-c", "raise SystemExit('summary: built without CUDA')"]
    runs = [sys.executable, "-c", "print(1)"]
    plan_of(monkeypatch, Stage("kernels", 9, fails, required=True), Stage("smoke", 9, runs), Stage("more", 9, runs))
    assert gpu_suite.run(tmp_path / "out", 9, only) == 1
    summary = text(tmp_path / "out", "summary.txt")
    assert "built without CUDA" in summary
    assert "smoke" not in summary


def test_what_counts_as_built_for_a_card(monkeypatch):
    settings = Settings(device=torch.device("cuda"))
    monkeypatch.setattr(gpu_stages._backend, "extension", None)
    with pytest.raises(SystemExit, match="summary: "):
        gpu_stages.kernels(settings)
    monkeypatch.setattr(gpu_stages._backend, "extension", SimpleNamespace(build_info=dict))
    with pytest.raises(SystemExit, match="without CUDA kernels"):
        gpu_stages.kernels(settings)


@pytest.mark.parametrize(("given", "built_for"), [(None, "9.0"), ("8.0;9.0+PTX", "8.0;9.0+PTX")])
def test_only_the_card_is_built_for(monkeypatch, given, built_for):
    monkeypatch.setattr(os, "environ", os.environ | ({"TORCH_CUDA_ARCH_LIST": given} if given else {}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    seen = []

    def build(command: list[str], cwd: Path) -> SimpleNamespace:
        seen.append((command[1:], os.environ["TORCH_CUDA_ARCH_LIST"]))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(gpu_build.subprocess, "run", build)
    with pytest.raises(SystemExit) as ended:
        gpu_build.main()
    assert ended.value.code == 3
    assert seen == [(["setup.py", "build_ext", "--inplace"], built_for)]


@pytest.mark.parametrize("error", [RuntimeError("Found no NVIDIA driver"), AssertionError("not compiled with CUDA")])
def test_a_build_without_a_card_says_so(monkeypatch, error):
    def capability():
        raise error

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(gpu_build.torch.cuda, "get_device_capability", capability)
    with pytest.raises(SystemExit, match=f"no card to build for, and TORCH_CUDA_ARCH_LIST names none: {error}"):
        gpu_build.main()


def test_no_time_is_left(tmp_path, monkeypatch):
    plan_of(
        monkeypatch,
        python("late", "print(1)"),
        python("spare", "print(1)", 1.0, spare=True),
        python("last", "print(1)", 0.1),
    )
    assert gpu_suite.run(tmp_path / "out", 0.01, dry=True) == 0
    summary = text(tmp_path / "out", "summary.txt")
    assert "no time left" in summary
    assert "its 1 s do not fit" in summary


def test_what_is_written_is_small(tmp_path, monkeypatch):
    """Of an overlong log the head and the tail stay, and figures of what was cut."""
    many = "print('head'); print('x' * 3_000_000); print('figures: {\"a\": 1}'); print('y\\n' * 500_000); print('tail')"
    plan_of(monkeypatch, *(python(f"stage {number}", many) for number in range(2)))
    gpu_suite.run(tmp_path / "out", 9, dry=True)
    files = list((tmp_path / "out").iterdir())
    assert all(path.stat().st_size < gpu_results.FILE_BYTES for path in files)
    log = text(tmp_path / "out", "log.txt")
    assert len(log) < 2 * gpu_results.LOG_BYTES
    assert log.count("==== stage") == log.count("head\n") == log.count("\ntail\n") == log.count("bytes cut here") == 2
    assert text(tmp_path / "out", "figures.jsonl") == '{"a": 1}\n' * 2


def test_a_log_is_cut_again_and_again(tmp_path):
    results = gpu_results.Results(tmp_path / "out", tmp_path)
    results.begin("long")
    for number in range(400):
        results.log.write(f"{number:09d}\n".encode() * 1000)
        results.update()
    results.end()
    log = text(tmp_path / "out", "log.txt")
    cut = int(log.split("[")[1].split("bytes")[0])
    mark = len(gpu_results.CUT % 0)
    assert len(log) - len("==== long\n") - len("\n") - mark + cut == 400 * 10 * 1000
    assert log.startswith("==== long\n000000000\n")
    assert log.endswith("000000399\n\n")


@pytest.mark.slow
def test_never_more_than_eight_files(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "UPDATE_SECONDS", 0.01)
    write = f"""
import time, sys
from pathlib import Path
from benchmarks.records import writer
parts = Path({str(tmp_path / "parts")!r})
with writer(parts / "select.csv") as write:
    for number in range(40):
        write({{"suite": "select", "operator": str(number)}})
        print('figures: {{"environment": %d}}' % number)
        print('figures: {{"number": %d}}' % number)
        (parts / "ncu.csv").write_text("a" * number)
        time.sleep(0.02)
"""
    plan_of(monkeypatch, python("bench select", write), python("again", write))
    monkeypatch.setattr(gpu_suite.tempfile, "TemporaryDirectory", lambda prefix: FixedFolder(tmp_path / "parts"))
    seen: list[dict[str, bool]] = []  # name -> whether it is a plain file
    over = threading.Event()
    (tmp_path / "out").mkdir()  # an empty folder is fine

    def look() -> None:
        while not over.is_set():
            seen.append({entry.name: entry.is_file(follow_symlinks=False) for entry in os.scandir(tmp_path / "out")})

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        assert gpu_suite.run(tmp_path / "out", 9, dry=True) == 0
    finally:
        over.set()
        watcher.join()
    lasting = {"summary.txt", "log.txt", "environment.json", "figures.jsonl", "rows.csv", "ncu.csv"}
    assert len(seen) > 100
    assert max(len(names) for names in seen) <= 8
    assert all(all(names.values()) for names in seen)
    assert {name for names in seen for name in names} <= lasting | {f"{name}.new" for name in lasting}
    assert {path.name for path in (tmp_path / "out").iterdir()} == lasting
    assert len(records.read(tmp_path / "out" / "rows.csv")) == 40
    assert "40 rows" in text(tmp_path / "out", "summary.txt")


class FixedFolder:
    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = str(path)

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        """It stays."""


SUITE = """
import sys
from pathlib import Path
from benchmarks import gpu_suite
gpu_suite.UPDATE_SECONDS = 0.1
gpu_suite.GRACE_SECONDS = 2.0
code = '''
import os, sys, time
from pathlib import Path
from benchmarks.records import writer
print("process", os.getpid())
print('figures: {"number": 1}')
try:
    with writer(Path(sys.argv[1]) / "select.csv") as write:
        write({"suite": "select", "operator": "first"})
        time.sleep(600)
except KeyboardInterrupt:
    print("said at the end")
'''
gpu_suite.plan = lambda parts: [
    gpu_suite.Stage("bench select", 60, ["never"], [sys.executable, "-c", code, str(parts)]),
    gpu_suite.Stage("next", 60, ["never"], [sys.executable, "-c", "print('never')"]),
]
sys.argv = ["gpu_suite", "--dry"]
gpu_suite.main()
"""


def suite_in_the_middle_of_a_stage(out: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A suite whose results go to $OUT, and the process of its stage."""
    root = Path(gpu_suite.ROOT)
    (out.parent / "scratch").mkdir()
    environment = os.environ | {"OUT": str(out), "PYTHONPATH": str(root), "TMPDIR": str(out.parent / "scratch")}
    suite = subprocess.Popen([sys.executable, "-c", SUITE], cwd=root, env=environment)
    deadline = time.monotonic() + 60
    while not (out / "rows.csv").exists() or "first" not in text(out, "rows.csv"):
        assert suite.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return suite, int(text(out, "log.txt").split("process ")[1].split()[0])


def test_a_killed_suite_leaves_its_results(tmp_path):
    suite, stage = suite_in_the_middle_of_a_stage(tmp_path / "out")
    suite.kill()
    suite.wait()
    os.kill(stage, signal.SIGKILL)
    assert [row["operator"] for row in records.read(tmp_path / "out" / "rows.csv")] == ["first"]
    assert json.loads(text(tmp_path / "out", "figures.jsonl")) == {"number": 1}
    assert text(tmp_path / "out", "summary.txt").splitlines()[-1].split() == ["bench", "select", "running"]
    assert len(list((tmp_path / "out").iterdir())) <= 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_suite_ends_its_stage(tmp_path, number, code):
    suite, stage = suite_in_the_middle_of_a_stage(tmp_path / "out")
    suite.send_signal(number)
    assert suite.wait(timeout=30) == code
    with pytest.raises(ProcessLookupError):
        os.kill(stage, 0)
    assert not list((tmp_path / "scratch").iterdir())
    assert "said at the end" in text(tmp_path / "out", "log.txt")
    assert [row["operator"] for row in records.read(tmp_path / "out" / "rows.csv")] == ["first"]
    assert text(tmp_path / "out", "summary.txt").splitlines()[-1] == "bench select      interrupted"


@pytest.mark.parametrize(("plan", "minutes"), [("plan", 9), ("short_plan", 200 / 60)])
def test_limits_add_up(plan, minutes):
    """With a reserve for the suite itself; stages in order of value."""
    stages = getattr(gpu_suite, plan)(Path("parts"))
    assert sum(stage.seconds for stage in stages if not stage.spare) <= 60 * minutes * 0.97
    assert [stage.name for stage in stages][:7] == [
        "build", "kernels", "environment", "smoke", "ceilings", "bench select", "bench sparse",
    ]  # fmt: skip
    assert all(stage.seconds > gpu_suite.GRACE_SECONDS for stage in stages)
    assert {stage.name for stage in stages if stage.required} == {"build", "kernels"}


def test_the_plan():
    stages = gpu_suite.plan(Path("parts"))
    names = [stage.name for stage in stages]
    assert names[7:] == [
        "bench refine", "llama-7b", "decode-7b", "bench end-to-end", "repeats", "tests", "bench nm", "bench stats",
        "predictions", "bench scaling", "memcheck", "racecheck", "ncu",
    ]  # fmt: skip
    assert len(gpu_suite.short_plan(Path("parts"))) == len(gpu_suite.SHORT) == 9
    assert len(names) + 2 <= 25  # the summary fits one screen
    assert gpu_results.LOG_BYTES * len(names) < gpu_results.FILE_BYTES
    tests = stages[names.index("tests")].command
    assert tests.index("tests/test_gpu.py") < tests.index("tests/test_fused_sqnorm.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "smok"], "--only must be of build, kernels"),
        (["--short", "--only", "tests"], "--only must be of build, kernels"),
        (["--out", "."], "is not empty: name a new folder"),
        (["--record", "."], "rows.csv does not exist"),
    ],
)
def test_wrong_use(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "something").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu_suite.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--dry", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main()
    assert message in str(ended.value.code)


def test_rows_of_a_card_are_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "RESULTS", tmp_path / "results")
    with records.writer(tmp_path / "rows.csv") as write:
        write(ROW)
        write(ROW | {"suite": "nm"})
    assert {path.name for path in gpu_suite.record(tmp_path)} == {"select.csv", "nm.csv"}
    assert records.read(tmp_path / "results" / "some-card-80gb" / "nm.csv")[0]["operator"] == "prune_rows_"
    with records.writer(tmp_path / "rows.csv") as write:
        write(ROW | {"device_type": "cpu"})
    with pytest.raises(ValueError, match="holds no rows of a GPU"):
        gpu_suite.record(tmp_path)


# Run by the suite itself, in processes of their own: what is required, what writes rows, what reads them, pytest.
IN_THE_SUITE = ("build", "kernels", "bench select", "tests", "predictions", "memcheck", "racecheck")
# The others' commands as they are, one after the other in one process: imports take seconds, each command's own work
# about one. A decode step is not compiled, which takes a minute: test_static.py compiles one.
IN_ONE_PROCESS = """
import runpy, sys
from pathlib import Path
from benchmarks import gpu_suite
from wanda_kernels import static
static.one_graph = lambda step, device: step
parts, left_out = Path(sys.argv[1]), sys.argv[2:]
for stage in gpu_suite.plan(parts):
    if stage.name in left_out:
        continue
    _, module, name, *arguments = stage.dry
    assert module == "-m"
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    print(f"{stage.name}: {code}", flush=True)
"""


@pytest.mark.slow
def test_dry_run_of_a_clone_that_is_not_installed(tmp_path):
    """The whole plan on the CPU, on the PyTorch reference, with no package that a machine with a GPU may lack."""
    folder, interpreter = clone.make(tmp_path)
    lacking = "import importlib.util as u; print([n for n in ('gguf', 'datasets', 'lm_eval') if u.find_spec(n)])"
    shared = {"cwd": folder, "env": clone.environment(), "capture_output": True, "text": True}
    assert subprocess.run([interpreter, "-c", lacking], **shared).stdout == "[]\n"
    out = tmp_path / "out"
    suite = [interpreter, "-m", "benchmarks.gpu_suite", "--dry", "--out", out, "--only", ",".join(IN_THE_SUITE)]
    done = subprocess.run(suite, **shared)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{text(out, 'log.txt')[-5000:]}"
    summary = text(out, "summary.txt").splitlines()
    assert len(summary) == len(IN_THE_SUITE) + 2
    assert summary[-1] == "all passed"
    assert "the PyTorch reference: wanda_kernels._C is not built" in summary[2]
    assert not any(" skipped " in line for line in summary)
    assert any("tests collected" in line for line in summary)
    assert {row["suite"] for row in records.read(out / "rows.csv")} == {"select"}

    done = subprocess.run([interpreter, "-c", IN_ONE_PROCESS, tmp_path / "parts", *IN_THE_SUITE], **shared)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    others = [stage.name for stage in gpu_suite.plan(tmp_path) if stage.name not in IN_THE_SUITE]
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.rpartition(": ")[0] in others] == [f"{name}: 0" for name in others]
    suites = {row["suite"] for path in (tmp_path / "parts").glob("*.csv") for row in records.read(path)}
    assert suites == {"nm", "stats", "refine", "sparse", "scaling", "end-to-end"}
    figures = [json.loads(line.removeprefix("figures: ")) for line in lines if line.startswith("figures: ")]
    environment, *rest = figures
    assert [next(iter(figure)) for figure in rest] == ["ceilings", "random_llama", "decode_7b"]
    assert environment["environment"]["versions"]["gguf"] == "not installed"
    assert "circumstances" in environment["environment"]
    assert not list(folder.glob("wanda_kernels/*.so"))
