"""Several processes (gloo): the same masks for any number of them; a failure of one ends all, with its message."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import saved
import streaming_child
import tiny
import torch
from safetensors.torch import load_file
from test_cli import call
from test_streaming import one_thread, save_sharded, tensors  # noqa: F401  (one_thread: a fixture)

from wanda_kernels import prune
from wanda_kernels.models import load_model
from wanda_kernels.streaming import stream_prune

SAMPLES = 7

RUNS = [
    {"batch_size": 2},
    {"batch_size": 1, "pattern": "2:4", "propagate": "dense"},
    {"batch_size": 2, "sparsity": 0.3, "fuse_statistics": False, "family": "gemma2", "dtype": "bfloat16"},
    {"method": "magnitude"},
    {"method": "magnitude", "pattern": "4:8", "dtype": "float16"},
    {"method": "ria", "batch_size": 1},
    {"method": "sparsegpt", "batch_size": 1, "block_size": 32},
    {"method": "ablate_wanda_seq", "batch_size": 2, "propagate": "dense", "exact_error": True},
    {"batch_size": 1, "owl": True, "exact_error": True},
    *({"family": family, "batch_size": 2} for family in tiny.EXPERTS),
    {"family": "mixtral", "method": "sparsegpt", "batch_size": 1, "min_tokens": 60, "exact_error": True},
    {"family": "gpt_oss", "method": "ria", "batch_size": 2, "experts": "all", "propagate": "dense"},
    {"family": "gpt2", "batch_size": 2},
    {"batch_size": 1, "refine": True, "pattern": "2:4"},
    {"family": "mixtral", "batch_size": 2, "refine": True, "method": "ria"},
    {"batch_size": 1, "update": True, "exact_error": True, "changes": {"intermediate_size": 1088}},  # 5 tiles
    {"family": "mixtral", "batch_size": 2, "refine": True, "update": True, "pattern": "2:4", "dtype": "bfloat16"},
    {"family": "gpt2", "batch_size": 2, "update": True, "update_damping": 0.1, "owl": True},
    {"batch_size": 1, "update": True, "values": "int4", "group_size": 32, "changes": {"intermediate_size": 1088}},
    {"family": "mixtral", "batch_size": 2, "method": "sparsegpt", "values": "int4", "dtype": "bfloat16"},
]


def finish(ranks) -> list[int | None]:
    for process in ranks:
        process.join(120)
        assert not process.is_alive(), "hangs"
    return [process.exitcode for process in ranks]


@pytest.mark.parametrize(
    "options", [RUNS[0], *(pytest.param(run, marks=pytest.mark.slow) for run in RUNS[1:])], ids=str
)
def test_the_same_for_any_number_of_processes(options, tmp_path):
    options = {"family": "llama", "dtype": "float32"} | options
    groups = {
        size: streaming_child.start_ranks(size, tmp_path / f"{size}", samples=SAMPLES, **options) for size in (1, 2, 3)
    }
    model = tiny.model(options.pop("family"), getattr(torch, options.pop("dtype")), **options.pop("changes", {}))
    report = prune(model, tiny.ids(SAMPLES), **options)
    expected = model.state_dict()
    for size, ranks in groups.items():
        assert finish(ranks) == [0] * size
        for rank in range(size):
            found = load_file(tmp_path / f"{size}" / f"rank{rank}.safetensors")
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
            assert_same_report(json.loads((tmp_path / f"{size}" / f"rank{rank}.json").read_text()), report)


def assert_same_report(said: dict, report) -> None:
    expected = json.loads(json.dumps(report.to_dict(seconds=False)))
    for ours, layer in zip(said["layers"], expected["layers"], strict=True):
        # a row's float32 sums depend, in their last bits, on where its share of the rows begins
        assert ours.pop("estimated_error") == pytest.approx(layer.pop("estimated_error"), rel=1e-6)
    assert said == expected


OPTIONS = {"family": "llama", "dtype": "float32", "samples": 6, "batch_size": 2}


def error_of(folder: Path, rank: int) -> str:
    return (folder / f"rank{rank}.error").read_text()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_of_any_process_is_told_by_all(failing, tmp_path):
    folder = tmp_path / "run"
    ranks = streaming_child.start_ranks(3, folder, **OPTIONS, fails=(failing, "raise"))
    assert finish(ranks) == [1, 1, 1]
    assert error_of(folder, failing) == "no space left on device"
    for other in {0, 1, 2} - {failing}:
        assert error_of(folder, other) == f"stopped, because rank {failing} failed: no space left on device"


@pytest.mark.slow
def test_a_killed_process_ends_all(tmp_path):
    ranks = streaming_child.start_ranks(3, tmp_path / "run", **OPTIONS, fails=(1, "kill"))
    assert finish(ranks) == [1, -9, 1]
    for other in (0, 2):
        assert error_of(tmp_path / "run", other) == "stopped, because rank 1 is gone (killed?)"


@pytest.mark.slow
def test_one_that_is_killed_while_they_connect_ends_all(tmp_path):
    port = streaming_child.free_port()
    ranks = streaming_child.start_ranks(3, tmp_path / "run", **OPTIONS, port=port, fails=(1, "kill while connecting"))
    assert finish(ranks) == [1, -9, 1]
    for other in (0, 2):
        assert error_of(tmp_path / "run", other) == "stopped, because rank 1 is gone (killed?)"


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others(tmp_path):
    ranks = streaming_child.start_ranks(2, tmp_path / "run", **OPTIONS, fails=(1, "hang"), timeout_s=3.0)
    assert finish(ranks[:1]) == [1]
    ranks[1].kill()
    said = error_of(tmp_path / "run", 0)  # whichever they were at: comparing a block's weights, or exchanging its rows
    assert "an exchange with the other processes failed" in said or "did not say within 3 s what it runs" in said


def test_what_processes_do_not_do_is_refused(tmp_path):
    finish(streaming_child.start_ranks(2, tmp_path / "a", **OPTIONS | {"samples": 2}))
    assert "2 processes need at least as many batches of sequences (see batch_size), there are 1" in error_of(
        tmp_path / "a", 0
    )


def torchrun(size: int, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size]
    command += ["-m", "wanda_kernels", "prune", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_torchrun(tmp_path, capsys):
    model = save_sharded(tmp_path / "model")
    (tmp_path / "text.txt").write_text(saved.text(2000))
    options = [model, "--calibration", tmp_path / "text.txt", "--samples", "6", "--length", "32", "--batch-size", "1"]
    code, stdout, stderr = call(capsys, "prune", *options, "--out", tmp_path / "one")
    assert code == 0, stderr
    assert "sparsity 50.00%" in stdout
    done = torchrun(2, *options, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == 1
    done = torchrun(2, *options, "--out", tmp_path / "streamed", "--stream", "--activation-memory", "0")
    assert done.returncode == 0, done.stderr
    expected = tensors(tmp_path / "one")
    for name in ("two", "streamed"):
        found = tensors(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "streamed", "text.txt", "two"]

    done = torchrun(2, *options, "--out", tmp_path / "three", "--pattern", "2:5")
    assert done.returncode != 0
    assert re.search(r"error: rank [01]: model\.layers\.0\.self_attn\.q_proj has 64 input columns, not", done.stderr)
    assert not (tmp_path / "three").exists()


def test_several_processes_do_not_resume(tmp_path):
    processes = SimpleNamespace(size=2, rank=0, is_first=True)
    with pytest.raises(ValueError, match="resuming is for one process: several keep no state"):
        stream_prune(tmp_path, tmp_path / "out", resume=True, processes=processes)


def test_a_device_map_changes_nothing(tmp_path):
    """On CPUs it says only that accelerate's hooks are no obstacle; several GPUs: not measured."""
    from accelerate import dispatch_model

    plain, mapped = tiny.model(), tiny.model()
    devices = {name: "cpu" for name, _ in mapped.model.named_children() if name != "layers"} | {"lm_head": "cpu"}
    names = {f"model.{name}" if name != "lm_head" else name: place for name, place in devices.items()}
    names |= {f"model.layers.{index}": "cpu" for index in range(3)}
    mapped = dispatch_model(mapped, names, force_hooks=True)
    assert hasattr(mapped.model.layers[1], "_hf_hook")
    prune(plain, tiny.ids())
    prune(mapped, tiny.ids())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), mapped.parameters(), strict=True))
    assert load_model(str(save_sharded(tmp_path / "model")), device_map="cpu").model.layers[0] is not None
