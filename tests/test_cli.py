"""The command line, as a user runs it: in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import saved
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wanda_kernels import load_calibration
from wanda_kernels.cli import ranks
from wanda_kernels.cli.app import main


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    saved.save_model(folder / "model")
    (folder / "text.txt").write_text(saved.text(2000))
    return folder


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def calibrated(work: Path) -> list[str]:
    return ["--calibration", str(work / "text.txt"), "--samples", "8", "--length", "32"]


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_identity_of_calibration_sources(work, tmp_path):
    one, two = (str(tmp_path / name) for name in ("one.txt", "two=0.5.txt"))
    for number, name in enumerate((one, two)):
        Path(name).write_text(saved.text(50, seed=number))
    found = [
        ranks.fingerprint_of_sources(sources)
        for sources in ([one], [two], [one, two], [two, one], [f"{one}=0.75", two], [one, "c4"], [one, two, "c4"])
    ]
    assert len(set(found)) == len(found)
    assert found[0] == ranks.fingerprint(one) == ranks.fingerprint_of_sources([f"{one}=1"])
    assert found[2] == ranks.fingerprint_of_sources([one, f"{two}=0.5"])
    Path(two).write_text("w1")
    assert ranks.fingerprint_of_sources([one, two]) != found[2]


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["in memory", "streamed"])
def test_mixed_calibration(work, tmp_path, capsys, stream):
    """As token ids that are the sources' own, one after the other."""
    other = tmp_path / "other=1.txt"
    other.write_text(saved.text(2000, seed=1))
    parts = [load_calibration(str(path), saved.tokenizer(), n, 32) for path, n in ((work / "text.txt", 6), (other, 2))]
    save_file({"input_ids": torch.cat(parts)}, tmp_path / "ids.safetensors")
    mixture = ["--calibration", f"{work / 'text.txt'}=0.75", "--calibration", other]
    for out, how in (("mixed", [*mixture, "--samples", 8]), ("ids", ["--calibration", tmp_path / "ids.safetensors"])):
        code, _, stderr = call(
            capsys, "prune", work / "model", "--out", tmp_path / out, "--length", 32, *how, *stream
        )  # fmt: skip
        assert code == 0, stderr
    assert digest(tmp_path / "mixed") == digest(tmp_path / "ids")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["TEXT=0.5", "TEXT"], "--calibration must name each source once"),
        (["TEXT", "c4=0"], "--calibration must give c4 a share above 0 and at most 1, got 0"),
        (["TEXT", "c4=1.5"], "--calibration must give c4 a share above 0 and at most 1, got 1.5"),
        (["TEXT=0.9", "c4=0.2"], "--calibration must have shares that add up to 1, got 1.1"),
        (["TEXT", "c4", "wikitext2"], "--samples must be enough for each calibration source, got 2"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "drop-experts"])
def test_mixtures_that_make_no_sense(work, tmp_path, capsys, command, options, message):
    given = [word for one in options for word in ("--calibration", one.replace("TEXT", str(work / "text.txt")))]
    code, _, stderr = call(capsys, command, work / "model", "--out", tmp_path / "out", "--samples", 2, *given)
    assert code == 2
    assert message in " ".join(stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_a_text_twice(work, capsys):
    code, _, stderr = call(capsys, "eval", work / "model", "--text", work / "text.txt", "--text", work / "text.txt")
    assert code == 2
    assert "--text must name each text once, got" in stderr


def test_prune_then_eval(work, tmp_path, capsys):
    out = tmp_path / "pruned"
    code, stdout, stderr = call(capsys, "prune", work / "model", "--out", out, *calibrated(work))
    assert code == 0, stderr
    assert "sparsity 50.00%" in stdout
    assert all(part in stdout for part in ("load", "forward", "statistics", "selection", "saving"))
    assert stderr.count("estimated error") == 3  # a line per block
    model = AutoModelForCausalLM.from_pretrained(out)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert ((weight == 0).sum(dim=1) == 32).all()
    report = json.loads((out / "pruning_report.json").read_text())
    assert report["achieved_sparsity"] == 0.5

    code, stdout, stderr = call(capsys, "eval", out, "--text", work / "text.txt", "--length", 64)
    assert code == 0, stderr
    assert stdout.startswith("perplexity ")
    assert "(31 windows of 64 tokens" in stdout


@pytest.mark.slow
def test_same_command_same_bytes_in_new_processes(work, tmp_path):
    for name, threads in (("first", "1"), ("second", "2")):
        subprocess.run(
            [sys.executable, "-m", "wanda_kernels", "prune", str(work / "model"), "--out", str(tmp_path / name)]
            + ["--pattern", "2:4", *calibrated(work)],
            check=True,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        )
    assert digest(tmp_path / "first") == digest(tmp_path / "second")


@pytest.mark.parametrize("options", [["--method", "magnitude"], ["--propagate", "dense"], ["--pattern", "4:8"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variants(work, tmp_path, capsys, options, dtype):
    out = tmp_path / "out"
    code, _, stderr = call(capsys, "prune", work / "model", "--out", out, "--dtype", dtype, *options, *calibrated(work))
    assert code == 0, stderr
    weights = load_file(out / "model.safetensors")
    weight = weights["model.layers.2.mlp.down_proj.weight"]
    assert weight.dtype == getattr(torch, dtype)
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert not (weights["model.embed_tokens.weight"] == 0).all()


METHODS = [
    ["--variant"],
    ["--method", "sparsegpt", "--block-size", "32", "--damping", "0.1"],
    ["--method", "sparsegpt", "--no-weight-update", "--group", "column"],
    ["--method", "ria", "--ria-power", "1", "--owl", "--owl-outlier", "3"],
    ["--method", "ablate_wanda_seq", "--pattern", "2:4"],
]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: " ".join(options))
def test_methods(work, tmp_path, capsys, options):
    out = tmp_path / "out"
    code, _, stderr = call(capsys, "prune", work / "model", "--out", out, *options, *calibrated(work))
    assert code == 0, stderr
    report = json.loads((out / "pruning_report.json").read_text())
    assert report["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert report["options"] or "ablate_wanda_seq" in options


def test_ready_token_ids(work, tmp_path, capsys):
    save_file({"input_ids": torch.randint(3, 120, (4, 16))}, tmp_path / "ids.safetensors")
    arguments = ("prune", work / "model", "--out", tmp_path / "out", "--calibration", tmp_path / "ids.safetensors")
    assert call(capsys, *arguments)[0] == 0
    assert json.loads((tmp_path / "out" / "pruning_report.json").read_text())["samples"] == 4


BAD = [
    (["--sparsity", "1.5"], 2, "sparsity must be in [0, 1), got 1.5"),
    (["--sparsity", "1"], 2, "sparsity must be in [0, 1), got 1.0"),
    (["--sparsity", "half"], 2, "Invalid value for '--sparsity'"),
    (["--pattern", "4:2"], 2, "pattern must be N:M with 0 < N < M, for instance 2:4, got '4:2'"),
    (["--pattern", "2:5"], 1, "has 64 input columns, not a multiple of the pattern's M = 5"),
    (["--pattern", "2:4", "--sparsity", "0.5"], 2, "give sparsity or pattern, not both"),
    (
        ["--method", "magic"],
        2,
        "method must be one of wanda, magnitude, sparsegpt, ria, ablate_mag_seq",
    ),
    (["--group", "rows"], 2, "group must be row, layer or column, or row:N or column:N, got 'rows'"),
    (["--owl-lambda", "0.1"], 2, "--owl-limit 0.1 needs --owl"),
    (["--damping", "0.1"], 2, "damping is an option of sparsegpt"),
    (["--propagate", "x"], 2, "propagate must be one of pruned, dense, got 'x'"),
    (["--dtype", "int8"], 2, "dtype must be one of"),
    (["--device", "tpu"], 2, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    (["--samples", "0"], 2, "--samples"),
    (["--samples", "5000"], 1, "5000 samples are required"),
    (["--length", "512"], 1, "--length 512 is longer than the model's context of 256 tokens"),
    (["--calibration", "nowhere.txt"], 1, "nowhere.txt does not exist"),
    (["--calibration", "c4=0.5"], 2, "--calibration must have shares that add up to 1, got 0.5"),
    (["--calibration", "c4=2"], 2, "--calibration must give c4 a share above 0 and at most 1, got 2"),
    (["--sparsty", "0.5"], 2, "--sparsty"),
]


@pytest.mark.parametrize(("options", "expected", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_options_say_so_in_one_line_and_write_nothing(work, tmp_path, capsys, options, expected, message):
    arguments = {"--calibration": str(work / "text.txt"), "--samples": "2", "--length": "32"}
    arguments |= dict(zip(options[::2], options[1::2], strict=True))
    flat = [part for pair in arguments.items() for part in pair]
    code, stdout, stderr = call(capsys, "prune", work / "model", "--out", tmp_path / "out", *flat)
    assert code == expected
    assert stdout == ""
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("wanda-kernels: error: ")
    assert message in last
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(work, tmp_path, capsys):
    code, _, stderr = call(capsys, "prune", tmp_path / "no", "--out", tmp_path / "out", "--debug")
    assert code == 1
    assert "Traceback" in stderr
    assert stderr.strip().splitlines()[-1].startswith("wanda-kernels: error: model ")
    code, _, stderr = call(capsys, "prune", tmp_path / "no", "--out", tmp_path / "out")
    assert "Traceback" not in stderr


def test_existing_output(work, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    arguments = ["prune", work / "model", "--out", out, "--method", "magnitude"]
    code, _, stderr = call(capsys, *arguments)
    assert code == 1
    assert "is not empty: choose another, or pass --overwrite" in stderr
    code, _, stderr = call(capsys, *arguments, "--overwrite")
    assert code == 1
    assert "holds no model" in stderr
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "config.json").write_text('{"model_type": "llama"}')
    assert call(capsys, *arguments, "--overwrite")[0] == 0
    assert not (out / "mine").exists()


@pytest.mark.parametrize("command", [[], ["prune"], ["eval"], ["info"]])
def test_help(capsys, command):
    code, stdout, _ = call(capsys, *command, "--help")
    assert code == 0
    assert "Usage" in stdout


def test_info(capsys):
    code, stdout, _ = call(capsys, "info")
    assert code == 0
    assert torch.__version__.split("+")[0] in stdout
    assert "backends" in stdout


@pytest.mark.slow
def test_the_reference_says_that_it_runs(work, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "wanda_kernels", "prune", str(work / "model"), "--out", str(tmp_path / "out")]
        + ["--method", "magnitude", "--pattern", "2:4"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"WANDA_KERNELS_REFERENCE": "1"},
    )
    assert "note: running on the PyTorch reference: WANDA_KERNELS_REFERENCE=1 is set" in done.stderr


@pytest.mark.slow
def test_a_file_that_cannot_grow_leaves_nothing(work, tmp_path):
    """A real failure to write, in a process whose files may not pass 64 KiB."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "wanda_kernels", "prune", str(work / "model"), "--out", str(out)]
        + ["--method", "magnitude"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
    )
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])
def test_ctrl_c_says_so_and_leaves_nothing(work, tmp_path_factory, tmp_path, delay):
    text = tmp_path_factory.mktemp("long") / "text.txt"
    text.write_text(saved.text(40_000))  # seconds of calibration: the signal comes before the end on any machine
    running = subprocess.Popen(
        [sys.executable, "-m", "wanda_kernels", "prune", str(work / "model"), "--out", str(tmp_path / "out")]
        + ["--calibration", str(text), "--samples", "1200", "--length", "32", "--batch-size", "1"]
        + ["--exact-error"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    assert any("loading" in line for line in running.stderr)  # reads up to that line
    time.sleep(delay)  # into imports, where a KeyboardInterrupt may be swallowed, or beyond
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130, stderr
    assert "wanda-kernels: error: interrupted; no output was written" in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_swallowed_ctrl_c_is_remembered():
    from wanda_kernels.cli import interrupt

    with interrupt.remembered():
        interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert interrupt.received() == signal.SIGINT
    interrupt.check()  # the command has ended: what runs next in this process is not interrupted


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl_moe"])
def test_a_model_that_takes_images_keeps_what_prepares_them(family, work, tmp_path, capsys):
    """In memory, streamed, packed and unpacked."""
    from transformers import AutoModelForImageTextToText

    from benchmarks.tiny_configs import tiny_config

    model, beside = tmp_path / "model", {"preprocessor_config.json": '{"a": 1}', "processor_config.json": '{"b": 2}'}
    AutoModelForImageTextToText.from_config(tiny_config(family)).save_pretrained(model)
    saved.tokenizer().save_pretrained(model)
    for name, text in beside.items():
        (model / name).write_text(text)
    for out, command in {
        "pruned": ["prune", model, *calibrated(work)],
        "streamed": ["prune", model, "--stream", *calibrated(work)],
        "packed": ["compress", tmp_path / "pruned"],
        "unpacked": ["decompress", tmp_path / "packed"],
    }.items():
        code, _, stderr = call(capsys, *command, "--out", tmp_path / out)
        assert code == 0, stderr
        assert {name: (tmp_path / out / name).read_text() for name in beside} == beside
        assert not (tmp_path / out / "video_preprocessor_config.json").exists()


def test_a_log_hears_of_long_work(work, tmp_path, capsys, monkeypatch):
    """Where stderr is no terminal there is no bar: a line now and then."""
    from wanda_kernels.cli import display

    options = ["compress", tmp_path / "pruned", "--values", "int4", "--calibrate", *calibrated(work)]
    assert call(capsys, "prune", work / "model", "--out", tmp_path / "pruned", "--method", "magnitude")[0] == 0
    _, _, stderr = call(capsys, *options, "--out", tmp_path / "quiet")
    assert "choosing values" not in stderr
    monkeypatch.setattr(display, "LOG_EVERY_S", 0.0)
    code, _, stderr = call(capsys, *options, "--out", tmp_path / "told")
    assert code == 0
    assert re.search(r"^choosing values: [1-9]\d* of \d+$", stderr, re.MULTILINE)
