"""What commands say and how they end: exit codes, checks before the work, names that are no markup, no foreign code."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import saved
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_cli import call
from typer.main import get_command

import wanda_kernels
from wanda_kernels.cli.app import app
from wanda_kernels.cli.options import of_options
from wanda_kernels.packed import weight as packed_weight

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = {"hidden_size": 128, "intermediate_size": 192}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    saved.save_model(folder / "model", **WIDE)
    (folder / "text.txt").write_text(saved.text(2000))
    return folder


def calibrated(work: Path) -> list:
    return ["--calibration", work / "text.txt", "--samples", 4, "--length", 32]


def test_version(capsys):
    assert call(capsys, "--version")[:2] == (0, f"wanda-kernels {wanda_kernels.__version__}\n")


def test_without_arguments_the_help_is_shown(capsys):
    code, stdout, stderr = call(capsys)
    assert code == 2
    assert "Usage" in stdout
    assert stderr == ""


def test_help_shows_the_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for command, default in (
        ("prune", "[default: 0.5]"),
        ("eval", "[default: wikitext2]"),
        ("study", "[default: 0.5,"),
    ):
        assert default in call(capsys, command, "--help")[1]


NAMES = ["run [v2]", "x [/y]", "[bold]b[/bold]", "[link=x]", ":smile:", "[/]", "a\\[b"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_never_markup(name, work, tmp_path, capsys):
    out = tmp_path / name / "deeper"
    code, stdout, stderr = call(capsys, "prune", work / "model", "--out", out, *calibrated(work))
    assert code == 0, stderr
    assert stdout.splitlines()[-1] == f"saved to {out}"
    assert f"saving to {out} ..." in stderr
    code, stdout, stderr = call(capsys, "eval", out, "--text", work / "text.txt", "--length", 64, "--windows", 2)
    assert code == 0, stderr
    assert f"loading {out} ..." in stderr
    code, _, stderr = call(capsys, "eval", tmp_path / name / "none")
    assert stderr.splitlines()[-1] == f"wanda-kernels: error: model {tmp_path / name / 'none'} does not exist"


BEFORE_LOADING = [
    (["eval", "MODEL", "--text", "TEXT", "--json", "FOLDER"], "is a folder: name a file"),
    (["eval", "MODEL", "--text", "TEXT", "--json", "FOLDER/no/x.json"], "its folder does not exist"),
    (["eval", "MODEL", "--text", "TEXT", "--text", "no.txt", "--length", "64"], "no.txt does not exist"),
    (["eval", "MODEL", "--text", "TEXT", "--length", "3000"], "--length 3000 is longer than the model's context"),
    (["speed", "MODEL", "--json", "FOLDER"], "is a folder: name a file"),
    (["prune", "MODEL", "--out", f"FOLDER/{'n' * 250}", "--method", "magnitude"], "the name is too long"),
    (["prune", "MODEL", "--out", "TEXT/out", "--method", "magnitude"], "is a file"),
    (["prune", "MODEL", "--out", "MODEL", "--overwrite", "--method", "magnitude"], "must not lie in each other"),
    (["prune", "MODEL", "--out", "MODEL/out", "--method", "magnitude"], "must not lie in each other"),
    (
        ["prune", "MODEL", "--out", "FOLDER/o", "--method", "magnitude", "--pattern", "2:5"],
        "not a multiple of the pattern",
    ),
    (["compress", "MODEL", "--out", "MODEL", "--overwrite"], "must not lie in each other"),
    (["decompress", "MODEL", "--out", "TEXT"], "is a file"),
    (["study", "MODEL", "--out", "TEXT"], "is a file"),
]


@pytest.mark.parametrize(("words", "message"), BEFORE_LOADING, ids=lambda value: str(value)[:40])
def test_what_cannot_end_well_is_found_before_a_model_is_loaded(words, message, work, tmp_path, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("wanda_kernels.models.load_model", never)
    places = {"MODEL": work / "model", "TEXT": work / "text.txt", "FOLDER": tmp_path}
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    code, _, stderr = call(capsys, *words)
    assert code == 1
    assert message in stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_what_stays_dense_is_listed_and_the_report_is_kept(work, tmp_path, capsys):
    saved.save_model(tmp_path / "m", hidden_size=128, intermediate_size=160)
    assert call(capsys, "prune", tmp_path / "m", "--out", tmp_path / "p", *calibrated(work))[0] == 0
    held = load_file(tmp_path / "p" / "model.safetensors")
    for name in (name for name in held if "down_proj" in name):
        held[name].fill_(0.5)
    save_file(held, tmp_path / "p" / "model.safetensors", {"format": "pt"})
    code, stdout, _ = call(capsys, "compress", tmp_path / "p", "--out", tmp_path / "c")
    assert code == 0
    assert "dense: down_proj (3 layers, the first is model.layers.0.mlp.down_proj): too few of its weights" in stdout
    assert call(capsys, "decompress", tmp_path / "c", "--out", tmp_path / "d")[0] == 0
    report = (tmp_path / "p" / "pruning_report.json").read_bytes()
    assert report == (tmp_path / "c" / "pruning_report.json").read_bytes()
    assert report == (tmp_path / "d" / "pruning_report.json").read_bytes()
    arguments = ("--batches", "1", "--prompt", "4", "--tokens", "2", "--rounds", "1")
    code, stdout, _ = call(capsys, "speed", tmp_path / "p", tmp_path / "c", *arguments)
    assert code == 0
    assert f"{tmp_path / 'c'}: dense: down_proj (3 layers" in stdout


def test_nan_is_said_and_written_as_such(work, tmp_path, capsys):
    saved.save_model(tmp_path / "m")
    held = load_file(tmp_path / "m" / "model.safetensors")
    held["lm_head.weight"][5, 0] = float("nan")
    save_file(held, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    out = tmp_path / "x.json"
    code, stdout, stderr = call(
        capsys, "eval", tmp_path / "m", "--text", work / "text.txt", "--length", 64, "--windows", 1, "--json", out
    )
    assert code == 0
    assert stdout.startswith("perplexity nan ")
    assert "gives NaN: its weights are broken" in stderr

    def strict(name):
        raise AssertionError(f"{name} is no JSON")

    assert math.isnan(float(json.loads(out.read_text(), parse_constant=strict)["perplexity"]))


@pytest.mark.parametrize("share", ["0.999", "0.001", "0.0005"])
def test_titles_do_not_round_to_lies(share, work, tmp_path, capsys):
    code, stdout, _ = call(
        capsys, "prune", work / "model", "--out", tmp_path / "o", *calibrated(work), "--sparsity", share
    )
    assert code == 0
    assert f"wanda {float(share) * 100:g}%:" in stdout


FOREIGN = """
from pathlib import Path
from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T
Path({ran!r}).write_text("ran")
"""
COMMANDS = [
    ["prune", "--out", "OUT", "--method", "magnitude"], ["prune", "--out", "OUT", "--method", "magnitude", "--stream"],
    ["plan"], ["eval", "--text", "TEXT"], ["compress", "--out", "OUT"], ["decompress", "--out", "OUT"], ["speed"],
    ["study", "--out", "OUT", "--calibration", "TEXT", "--text", "TEXT", "--methods", "magnitude"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words[:1] + words[3:]))
@pytest.mark.parametrize("where", ["model", "tokenizer"])
def test_a_models_own_code_never_runs(command, where, work, tmp_path, capfd, monkeypatch):
    """Whatever stands on stdin: transformers asks there."""
    ran = tmp_path / "ran"
    saved.save_model(tmp_path / "m")
    (tmp_path / "m" / "foreign.py").write_text(FOREIGN.format(ran=str(ran)))
    if where == "model":
        path = tmp_path / "m" / "config.json"
        change = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.C", "AutoModelForCausalLM": "foreign.M"}}
    else:
        path = tmp_path / "m" / "tokenizer_config.json"
        change = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["foreign.T", "foreign.T"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    read, write = os.pipe()
    os.write(write, b"y\n" * 20)
    os.close(write)
    before = os.dup(0)
    os.dup2(read, 0)
    monkeypatch.setattr(sys, "stdin", os.fdopen(read))
    try:
        places = {"OUT": tmp_path / "out", "TEXT": work / "text.txt"}
        words = [command[0], tmp_path / "m", *(places.get(word, word) for word in command[1:])]
        code, _, stderr = call(capfd, *words)
    finally:
        os.dup2(before, 0)
        os.close(before)
    assert not ran.exists()
    if where == "model":
        assert code == 1
        assert "needs code of its own (auto_map)" in stderr


def start(*arguments, **options) -> subprocess.Popen:
    words = [sys.executable, "-m", "wanda_kernels", *map(str, arguments)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def catches(number: int, process: subprocess.Popen) -> bool:
    """Whether the process has a handler of its own for the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.8, 1.8])
def test_a_signal_while_python_imports_is_one_sentence(sent, code, delay, work, tmp_path):
    running = start("prune", work / "model", "--out", tmp_path / "out", *calibrated(work), "--exact-error")
    # Python itself takes a moment to begin, a second on a busy machine
    while running.poll() is None and not catches(signal.SIGTERM, running):
        time.sleep(0.001)
    time.sleep(delay)
    running.send_signal(sent)
    _, stderr = running.communicate(timeout=60)
    if running.returncode == 0:  # it was done
        return
    assert running.returncode == code, stderr
    assert stderr.splitlines()[-1] == "wanda-kernels: error: interrupted; no output was written"
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


OF_THE_ENVIRONMENT = {
    "WANDA_KERNELS_ISA": "WANDA_KERNELS_ISA: instruction set must be scalar, avx2 or avx512, got 'foo'",
    "WANDA_KERNELS_REFERENCE": "WANDA_KERNELS_REFERENCE must be 0 or 1, got 'foo'",
}


@pytest.mark.parametrize(("name", "message"), OF_THE_ENVIRONMENT.items())
def test_what_the_environment_cannot_mean_is_one_sentence(name, message):
    running = start("info", env=os.environ | {name: "foo"})
    stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stdout, stderr) == (1, "", f"wanda-kernels: error: {message}\n")


def test_other_commands_are_for_one_process(work, capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, stderr = call(capsys, "eval", work / "model", "--text", work / "text.txt")
    assert code == 2
    assert "wanda-kernels eval is for one process, torchrun started 2" in stderr


COMMANDS_IN_TURN = """
import json, sys
from wanda_kernels.cli.app import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        print(f"{words[0]} ended with {end.code or 0}", file=sys.stderr, flush=True)
"""


@pytest.mark.slow
def test_every_command_says_that_the_slow_reference_runs(work):
    """In one process, whose imports take seconds; test_cli.py has that of prune."""
    commands = [
        ["eval", work / "model", "--text", work / "text.txt", "--length", 64, "--windows", 1],
        ["speed", work / "model", "--batches", 1, "--prompt", 4, "--tokens", 2, "--rounds", 1],
    ]
    said = subprocess.run(
        [sys.executable, "-c", COMMANDS_IN_TURN, json.dumps([[str(word) for word in words] for words in commands])],
        capture_output=True, text=True, check=True, timeout=300, env=os.environ | {"WANDA_KERNELS_REFERENCE": "1"},
    ).stderr  # fmt: skip
    parts = re.split(r"(\w+) ended with 0\n", said)
    assert parts[1::2] == ["eval", "speed"], said
    for part in parts[:-1:2]:
        assert "note: running on the PyTorch reference: WANDA_KERNELS_REFERENCE=1 is set" in part


@pytest.mark.parametrize(("has", "dtype"), [(False, "bfloat16"), (False, "float32"), (True, "bfloat16")])
def test_a_dtype_that_is_slow_here_is_told_once(work, tmp_path, capsys, monkeypatch, has, dtype):
    monkeypatch.setattr(packed_weight, "product_dtype", lambda dtype: dtype if has else torch.float32)
    line = "note: this processor has no products of bfloat16: --dtype float32 is faster, twice as large in "
    line += "memory and where it is saved\n"
    options = ["--text", work / "text.txt", "--length", 64, "--windows", 1]
    pruned, packed, other = tmp_path / "pruned", tmp_path / "packed", tmp_path / "other.txt"
    other.write_text(saved.text(2000))
    commands = (
        ["eval", work / "model", *options, "--text", other, "--dtype", dtype],
        ["prune", work / "model", "--out", pruned, *calibrated(work), "--dtype", dtype],
    )
    for command in commands:
        code, _, stderr = call(capsys, *command)
        assert (code, stderr.count(line)) == (0, int(not has and dtype == "bfloat16")), stderr
    assert call(capsys, "compress", pruned, "--out", packed)[0] == 0
    code, _, stderr = call(capsys, "eval", packed, *options)
    assert (code, "has no products" in stderr) == (0, False), stderr


@pytest.mark.slow
def test_the_library_loads_its_parts_at_the_first_use():
    """So that importing it takes a moment, and packed models load all the same."""
    code = "import sys, wanda_kernels; assert 'torch' not in sys.modules; print(wanda_kernels.prune.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "prune\n"
    assert torch.equal(tiny.ids(), tiny.ids())


def test_errors_of_the_library_speak_of_options():
    """And only there: a Python user never saw an option."""
    assert of_options("batch_size must be a whole number, got 0") == "--batch-size must be a whole number, got 0"
    assert of_options("drop_experts must be larger: 0.1 of") == "--drop-experts must be larger: 0.1 of"
    assert of_options("share must be smaller: 0.9 leaves") == "--share must be smaller: 0.9 leaves"
    assert of_options("a group needs weight_update=False") == "a group needs --no-weight-update"
    assert of_options("out: pass resume=True to go on") == "out: pass --resume to go on"
    assert of_options("sparsity must be in [0, 1), got 2.0") == "--sparsity must be in [0, 1), got 2.0"
    for other in ("/tmp/batch_size/x is missing", "but batch_size: rank 0 has 1", "model a has no method"):
        assert of_options(other) == other
    commands = get_command(app).commands.values()
    options = {o for command in commands for parameter in command.params for o in parameter.opts if o[:2] == "--"}
    library = [path for path in Path(wanda_kernels.__file__).parent.rglob("*.py") if path.parent.name != "cli"]
    lines = [line for path in library if path.name != "official.py" for line in path.read_text().splitlines()]
    named = [line for line in lines if options & set(re.findall(r"--[a-z-]+", line)) and "``" not in line]
    assert named == []
