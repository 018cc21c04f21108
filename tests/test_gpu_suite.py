"""`make gpu`, as far as it goes without a GPU: the plan, time limits, failures, what is written."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks import gpu_suite, records
from benchmarks.gpu_suite import Stage


def plan_of(monkeypatch, *stages: Stage) -> None:
    monkeypatch.setattr(gpu_suite, "plan", lambda parts: list(stages))


def python(name: str, code: str, seconds: float = 30.0) -> Stage:
    return Stage(name, seconds, ["never"], [sys.executable, "-c", code])


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
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert lines[1].split()[:2] == ["broken", "failed"]
    assert lines[1].endswith("2 of 3 are wrong")
    assert lines[2].startswith("hangs             out of time")
    assert lines[3].endswith("all well")
    assert "compute-sanitizer --tool memcheck" in lines[4]
    assert lines[-1] == "2 stages failed: see log.txt"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "==== broken\nfirst" in log
    assert "begun" in log  # what was printed before it was ended
    assert json.loads((tmp_path / "out" / "figures.jsonl").read_text()) == {"ceilings": {"copy": 3}}


def test_no_time_is_left(tmp_path, monkeypatch):
    plan_of(monkeypatch, python("late", "print(1)"))
    assert gpu_suite.run(tmp_path / "out", 0.01, dry=True) == 0
    assert "no time left" in (tmp_path / "out" / "summary.txt").read_text()


def test_what_is_written_is_small(tmp_path, monkeypatch):
    many = "print('x' * 3_000_000)"
    plan_of(monkeypatch, *(python(f"stage {number}", many) for number in range(2)))
    gpu_suite.run(tmp_path / "out", 9, dry=True)
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert all(path.stat().st_size < gpu_suite.FILE_BYTES for path in files)
    assert "2200001 characters cut" in (tmp_path / "out" / "log.txt").read_text()


def test_the_plan():
    stages = gpu_suite.plan(gpu_suite.Path("parts"))
    names = [stage.name for stage in stages]
    assert names[:8] == [
        "environment", "build", "smoke", "tests", "memcheck", "racecheck", "synccheck", "repeats",
    ]  # fmt: skip
    assert names.index("ceilings") < names.index("bench select") < names.index("llama-7b") < names.index("ncu")
    assert len(names) + 2 <= 24  # the summary fits one screen
    assert gpu_suite.LOG_BYTES * len(names) < gpu_suite.FILE_BYTES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "smok"], "--only must be of environment, build"),
        (["--out", "."], "is not empty: name a new folder"),
        (["--record", "."], "rows.csv does not exist"),
    ],
)
def test_wrong_use(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "something").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--dry", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main()
    assert message in str(ended.value.code)


def test_rows_of_a_card_are_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "RESULTS", tmp_path / "results")
    row = {"suite": "select", "operator": "prune_rows_", "device": "Some Card 80GB", "device_type": "cuda"}
    with records.writer(tmp_path / "rows.csv") as write:
        write(row)
        write(row | {"suite": "nm"})
    assert {path.name for path in gpu_suite.record(tmp_path)} == {"select.csv", "nm.csv"}
    assert records.read(tmp_path / "results" / "some-card-80gb" / "nm.csv")[0]["operator"] == "prune_rows_"
    with records.writer(tmp_path / "rows.csv") as write:
        write(row | {"device_type": "cpu"})
    with pytest.raises(ValueError, match="holds no rows of a GPU"):
        gpu_suite.record(tmp_path)


@pytest.mark.slow
def test_dry_run(tmp_path, capsys):
    """The whole plan, on the CPU."""
    assert gpu_suite.run(tmp_path / "out", 9, dry=True) == 0
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert len(summary) <= 24
    assert summary[-1] == "all passed"
    rows = records.read(tmp_path / "out" / "rows.csv")
    assert {row["suite"] for row in rows} == {"select", "nm", "stats", "sparse", "scaling", "end-to-end"}
    figures = [json.loads(line) for line in (tmp_path / "out" / "figures.jsonl").read_text().splitlines()]
    assert [next(iter(figure)) for figure in figures] == ["ceilings", "random_llama"]
    assert "circumstances" in json.loads((tmp_path / "out" / "environment.json").read_text())
    assert not (tmp_path / "out" / gpu_suite.PARTS).exists()
