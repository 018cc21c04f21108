"""How fast models generate: what is measured, not how fast it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import saved
import tiny
import torch

from wanda_kernels import compress, memory, prune, speed
from wanda_kernels.cli.app import main
from wanda_kernels.cli.speed import differences, short_names
from wanda_kernels.memory import added_peak
from wanda_kernels.models import save_pretrained
from wanda_kernels.packed.linear import PackedLinear
from wanda_kernels.static import CaptureError


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
    first, gaps, tokens = speed.time_generation(tiny.model(), tiny.ids(2, 7), 5)
    assert tokens.shape == (2, 5)
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


def test_rows_of_the_static_way(plain_steps):
    """Beside those of generate; ratios are to the dense model of the same way."""
    steps = []
    models = {"dense": tiny.model(hidden_size=128, intermediate_size=192), "packed": packed_model()}
    rows = speed.measure(models, (1, 3), 6, 4, rounds=1, on_step=lambda: steps.append(1), ways=speed.WAYS)
    assert len(steps) == 2 * 3 * 2 * 2
    names = [("generate", "dense"), ("generate", "packed"), ("static", "dense"), ("static", "packed")]
    assert [(row["way"], row["model"]) for row in rows] == names * 2
    for dense, packed in zip(rows[::2], rows[1::2], strict=True):
        assert dense["decode_ratio"] == 1
        assert packed["decode_ratio"] == pytest.approx(packed["decode_tokens_s"] / dense["decode_tokens_s"])
    assert [row.get("first_difference", "none") for row in rows[:4]] == ["none", "none", None, None]
    (row,) = speed.measure({"dense": models["dense"]}, (1,), 6, 4, rounds=1, ways=("static",))
    assert row["first_difference"] is None


def test_static_tokens_that_differ_are_told(plain_steps, monkeypatch):
    generate = speed.StaticDecoder.generate

    def wrong(self, prompt):
        tokens, times = generate(self, prompt)
        tokens[-1, 2:] += 1
        return tokens, times

    monkeypatch.setattr(speed.StaticDecoder, "generate", wrong)
    rows = speed.measure({"dense": tiny.model()}, (2,), 6, 4, rounds=1, ways=speed.WAYS)
    assert rows[1]["first_difference"] == 3
    assert differences(rows) == ["dense, static: its tokens are not generate's at batch 2 from token 3 on"]


def test_a_step_that_cannot_be_captured_ends_the_command(tmp_path, monkeypatch, capsys):
    def refuse(*_arguments):
        raise CaptureError("a decode step cannot be captured as a CUDA graph: no")

    monkeypatch.setattr(speed, "StaticDecoder", refuse)
    dense = str(saved.save_model(tmp_path / "dense"))
    assert run("speed", dense, "--batches", "1", "--prompt", "5", "--tokens", "3", "--static") == 1
    assert "--static: a decode step cannot be captured" in capsys.readouterr().err


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


@pytest.mark.slow
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


def test_large_weights_ask_for_huge_pages():
    maps = Path("/proc/self/smaps")
    if not maps.exists():
        pytest.skip("no /proc/self/smaps: this system does not say what was asked of it")
    large, small = torch.arange(3 << 20, dtype=torch.int32), torch.arange(9)
    held = memory.in_huge_pages(large)
    assert torch.equal(held, large)
    assert held.data_ptr() != large.data_ptr()
    middle, inside, flags = held.data_ptr() + held.nbytes // 2, False, ""
    for line in maps.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags"):
            flags = line
    assert " hg" in flags  # "huge page advise flag" of proc(5)
    for other in (small, large.to("meta")):
        assert memory.in_huge_pages(other) is other
    layer = torch.nn.Linear(2048, 4096, bias=False)
    layer.weight.data[:, ::2] = 0
    packed = PackedLinear.from_linear(layer, "bitmap")
    assert torch.equal(packed.unpacked(), layer.weight)


def test_shared_weights_count_once():
    tied = tiny.model("llama tied")
    assert speed.weight_bytes(tied) < speed.weight_bytes(tiny.model())
    assert speed.weight_bytes(torch.nn.Linear(3, 5)) == 4 * (15 + 5)


def test_names_in_the_table():
    assert short_names({"/a/dense", "b/packed"}) == {"/a/dense": "dense", "b/packed": "packed"}
    assert short_names({"a/model", "b/model"}) == {"a/model": "a/model", "b/model": "b/model"}


def test_command_line(plain_steps, tmp_path, capsys):
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
    ways = {name.startswith("dense "): set() for name in result["dispatch"]}
    for name, way in result["dispatch"].items():
        ways[name.startswith("dense ")].add(way)
    assert ways[False] <= {"packed", "unpack"}
    assert ways[True] <= {"own", "torch"}
    assert {row["way"] for row in result["rows"]} == {"generate"}
    assert run("speed", dense, packed, *options, "--static", "--json", str(out)) == 0
    shown = capsys.readouterr()
    assert shown.out.count("│ static") == shown.out.count("│ generate") == 4
    assert "is compiled first" in shown.out + shown.err
    assert "all tokens are those of generate" in shown.out + shown.err
    assert len(json.loads(out.read_text())["rows"]) == 8
    for arguments, code, message in (
        ([dense, "--batches", "1,0"], 2, "--batches must be numbers from 1 on, with commas between them, got '1,0'"),
        ([dense, dense], 2, "each model may be named once"),
        ([dense, "--json", str(tmp_path / "no" / "x.json")], 1, "its folder does not exist"),
        ([dense, "--json", str(tmp_path)], 1, "is a folder: name a file"),
        ([str(tmp_path / "none")], 1, "does not exist"),
    ):
        assert run("speed", *arguments) == code
        assert message in capsys.readouterr().err


LLAMA_BENCH = """#!{python}
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
if "broken" in options["-m"]:
    sys.exit("no such architecture")
speed = 0 if "odd" in options["-m"] else 50.0 if options["-n"] == "0" else 8.0
print("this is no JSON" if not speed else json.dumps([{{"avg_ts": speed, "model_size": 4096}}]))
"""


@pytest.fixture
def llama_bench(tmp_path, monkeypatch):
    """A program of that name on the path; the file that it writes its options to."""
    log, program = tmp_path / "log.txt", tmp_path / "bin" / "llama-bench"
    program.parent.mkdir()
    program.write_text(LLAMA_BENCH.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return log


def test_llama_cpp_takes_turns_with_the_models(tmp_path, llama_bench, capsys):
    dense = str(saved.save_model(tmp_path / "dense"))
    files = [tmp_path / f"{name}.gguf" for name in ("small", "broken", "odd")]
    for file in files:
        file.touch()
    options = ["--prompt", "5", "--tokens", "3", "--rounds", "2", "--device", "cpu"]
    out = tmp_path / "speed.json"
    given = ["--batches", "1,2", "--llama-bench", str(files[0]), "--json", str(out)]
    assert run("speed", dense, *options, *given) == 0
    shown = capsys.readouterr().out
    assert "llama.cpp" in shown
    rows = json.loads(out.read_text())["rows"]
    assert [(row["model"], row["way"], row["batch"]) for row in rows] == [
        (dense, "generate", 1), ("small", "llama.cpp", 1), (dense, "generate", 2),
    ]  # fmt: skip
    assert (rows[1]["prefill_tokens_s"], rows[1]["decode_tokens_s"], rows[1]["weight_bytes"]) == (50, 8, 4096)
    assert rows[1]["first_token_s"] == pytest.approx(0.1)
    assert rows[1]["decode_ratio"] == pytest.approx(8 / rows[0]["decode_tokens_s"])
    runs = llama_bench.read_text().splitlines()
    assert len(runs) == 2 * 3  # a warm-up and two rounds, for each the prompt and what follows it
    shared = f"-r 1 -o json -t {torch.get_num_threads()} -ngl 0"
    assert set(runs) == {f"-m {files[0]} -p 5 -n 0 {shared}", f"-m {files[0]} -p 0 -n 3 -d 5 {shared}"}
    for arguments, code, message in (
        (["--llama-bench", str(files[1])], 1, "llama-bench ended with 1 for"),
        (["--llama-bench", str(files[2])], 1, "llama-bench printed no result that is known for"),
        (["--llama-bench", str(tmp_path / "none.gguf")], 1, "none.gguf is no file"),
        (["--llama-bench", str(files[0]), "--batches", "4"], 2, "--llama-bench needs 1 among --batches, got 4"),
        (["--llama-bench", str(files[0]), "--llama-bench", str(files[0])], 2, "files of different names"),
    ):
        assert run("speed", dense, *options, *arguments) == code
        assert message in capsys.readouterr().err


def test_llama_bench_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("speed", str(saved.save_model(tmp_path / "dense")), "--llama-bench", str(tmp_path / "x.gguf")) == 1
    assert "llama-bench is not on the path" in capsys.readouterr().err
