"""How fast models generate: what is measured, not how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import saved
import tiny
import torch

from wanda_kernels import compress, memory, prune, speed
from wanda_kernels.cli.app import main
from wanda_kernels.memory import added_peak
from wanda_kernels.models import save_pretrained


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    return exit_.value.code


def packed_model():
    model = tiny.model(hidden_size=128, intermediate_size=192)
    prune(model, tiny.ids(), pattern="2:4")
    compress(model)
    return model


def test_generation_is_timed_token_by_token():
    first, gaps = speed.time_generation(tiny.model(), tiny.ids(2, 7), 5)
    assert first > 0
    assert len(gaps) == 4
    assert all(gap > 0 for gap in gaps)


def test_rows():
    steps = []
    models = {"dense": tiny.model(hidden_size=128, intermediate_size=192), "packed": packed_model()}
    rows = speed.measure(models, (1, 3), prompt=6, tokens=3, rounds=2, on_step=lambda: steps.append(1))
    assert len(steps) == 2 * 4 * 2
    assert [(row["model"], row["batch"]) for row in rows] == [("dense", 1), ("packed", 1), ("dense", 3), ("packed", 3)]
    for row in rows:
        assert row["prefill_tokens_s"] == pytest.approx(row["batch"] * 6 / row["first_token_s"])
        assert row["peak_bytes"] is None or row["peak_bytes"] >= row["weight_bytes"] > 0
    assert rows[0]["decode_ratio"] == 1
    assert rows[1]["decode_ratio"] == pytest.approx(rows[1]["decode_tokens_s"] / rows[0]["decode_tokens_s"])
    assert rows[1]["weight_bytes"] < rows[0]["weight_bytes"]


PEAKS = """
import torch
from wanda_kernels.memory import added_peak
size, cpu = 64 << 20, torch.device("cpu")

def work(times):
    for _ in range(times):
        torch.ones(size, dtype=torch.uint8)

work(1)
if added_peak(lambda: None, cpu) is not None:
    kept = torch.ones(2 * size, dtype=torch.uint8)  # there before: does not count
    print(added_peak(lambda: work(3), cpu), added_peak(lambda: kept.add_(1), cpu), added_peak(lambda: work(1), cpu))
"""


def test_peak_memory_of_a_piece_of_work():
    """In a process of its own: malloc is as it comes, and nothing else allocates."""
    run = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    if not run.stdout:
        pytest.skip("this system does not tell the peak of a part of a run")
    size, near, some = 64 << 20, 1 << 20, 16 << 20  # the kernel counts pages in batches
    three, none, one = map(int, run.stdout.split())
    assert size - near <= three < size + some  # one after the other: the peak is one of them
    assert none < some
    assert size - near <= one < size + some


def test_peak_memory_that_cannot_be_told(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "such")
    assert added_peak(lambda: None, torch.device("cpu")) is None
    (row,) = speed.measure({"dense": tiny.model()}, (1,), prompt=6, tokens=3, rounds=1)
    assert row["peak_bytes"] is None


def test_shared_weights_count_once():
    tied = tiny.model("llama tied")
    assert speed.weight_bytes(tied) < speed.weight_bytes(tiny.model())
    assert speed.weight_bytes(torch.nn.Linear(3, 5)) == 4 * (15 + 5)


def test_command_line(tmp_path, capsys):
    dense = str(saved.save_model(tmp_path / "dense", hidden_size=128, intermediate_size=192))
    packed = str(tmp_path / "packed")
    save_pretrained(tmp_path / "packed", packed_model(), saved.tokenizer())
    out = tmp_path / "speed.json"
    options = ["--batches", "1,2", "--prompt", "5", "--tokens", "3", "--rounds", "1"]
    assert run("speed", dense, packed, *options, "--json", str(out)) == 0
    shown = capsys.readouterr().out
    assert "3 generated" in shown
    assert "2:4 float32" in shown  # which way the products went
    result = json.loads(out.read_text())
    assert [row["batch"] for row in result["rows"]] == [1, 1, 2, 2]
    assert set(result["dispatch"].values()) <= {"packed", "unpack"}
    for arguments, code, message in (
        ([dense, "--batches", "1,0"], 2, "--batches must be numbers from 1 on, with commas between them, got '1,0'"),
        ([dense, dense], 2, "each model may be named once"),
        ([dense, "--json", str(tmp_path / "no" / "x.json")], 1, "its folder does not exist"),
        ([dense, "--json", str(tmp_path)], 1, "is a folder: name a file"),
        ([str(tmp_path / "none")], 1, "does not exist"),
    ):
        assert run("speed", *arguments) == code
        assert message in capsys.readouterr().err
