"""Some runs of the soak test, each fault at least once (`make soak` has 200), and what a red run leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soak
from test_streaming import one_thread  # noqa: F401  (a fixture)

RUNS = 24


@pytest.mark.slow
def test_soak():
    tally = soak.soak(range(RUNS), seed=1)
    assert not tally.red, "\n".join(tally.red.values())
    assert sum(tally.counts.values()) == RUNS
    assert {end.split(":")[0] for end in tally.counts} == set(soak.FAULTS)


def broken(run: soak.Run) -> None:
    run.save_model()
    run.outcome = "0 as drawn"
    raise AssertionError("the promise is broken")


def test_a_red_run_leaves_its_inputs_and_its_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(soak.FAULTS, "disk full", broken)
    monkeypatch.setitem(soak.FAULTS, "none", lambda run: None)
    monkeypatch.setitem(soak.FAULTS, "truncated", lambda run: {}["a fault of the test itself"])
    tally = soak.soak([0, 1, 2, 0], seed=5)
    assert list(tally.red) == [1, 2]
    assert sum(tally.counts.values()) == 2  # the others were gone through
    said = capsys.readouterr().err
    kept = Path(said.split("kept: ")[1].split()[0])
    assert "the promise is broken" in said
    assert "again: python tests/soak.py --seed 5 --only 1\n" in said
    assert "KeyError" in said
    drawn = json.loads((kept / "run.json").read_text())
    assert (kept / "model" / "config.json").is_file()
    assert drawn["outcome"] == "0 as drawn"
    assert "--calibration" in drawn["arguments"]
    assert len(list(tmp_path.iterdir())) == 2  # what was green is gone
    assert list(soak.soak([1, 0], seed=5, stop=True).red) == [1]


def test_a_run_is_drawn_from_its_number_and_seed_alone(tmp_path):
    for number in range(len(soak.TURNS)):
        one, same, other = (soak.Run(number, seed, tmp_path) for seed in (3, 3, 4))
        assert str(one) == str(same)
        assert one.draw.random() == same.draw.random() != other.draw.random()


@pytest.mark.slow
def test_the_command_names_what_was_red(tmp_path):
    """At the end once more, and by its exit code."""
    script = Path(soak.__file__)
    code = "import soak; soak.FAULTS['none'] = lambda run: 1 / 0; soak.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--only", "0", "--seed", "2"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(script.parent), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith("1 red\n    python tests/soak.py --seed 2 --only 0\n")
