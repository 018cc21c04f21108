"""Loading, and saving whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import saved
import tiny
import torch
from transformers import AutoModelForCausalLM

from wanda_kernels.distributed import join
from wanda_kernels.models import load_model, load_tokenizer, save_pretrained
from wanda_kernels.models.load import choose_device
from wanda_kernels.models.save import check_output, check_space
from wanda_kernels.pruning.stopwatch import Stopwatch


def test_round_trip(tmp_path):
    model = tiny.model("llama tied")
    save_pretrained(tmp_path / "out", model, saved.tokenizer(), extra={"note.json": "{}"})
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load_model(str(tmp_path / "out"))):
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert load_tokenizer(str(tmp_path / "out"))("w3 w5")["input_ids"] == [7, 9]
    assert (tmp_path / "out" / "note.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tmp_path, dtype):
    saved.save_model(tmp_path / "m")
    assert load_model(str(tmp_path / "m"), dtype).dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda p: None, FileNotFoundError, "does not exist"),
        (lambda p: p.mkdir(), FileNotFoundError, "holds no config.json"),
        (lambda p: p.write_text("x"), ValueError, "is neither a model folder nor a .gguf file"),
    ],
)
def test_missing_models(tmp_path, make, kind, message):
    make(tmp_path / "m")
    with pytest.raises(kind, match=message):
        load_model(str(tmp_path / "m"))


def test_truncated_weights(tmp_path):
    saved.save_model(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"could not be read \(incomplete or damaged\?\)"):
        load_model(str(tmp_path / "m"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00garbage", b"nonsense"])
def test_broken_gguf(tmp_path, content):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a GGUF file|could not be read \(incomplete or damaged\?\)"):
        load_model(str(path))


def test_wrong_names():
    with pytest.raises(ValueError, match=r"dtype must be one of auto, float32, .* got 'int8'"):
        load_model("x", dtype="int8")
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'tpu'"):
        load_model("x", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no CUDA device"):
            load_model("x", device="cuda")


def test_a_gpu_by_its_number(monkeypatch):
    for name in ("cuda:", "cuda:-1", "cuda:x", "cpu:0", "cuda:1 "):
        with pytest.raises(ValueError, match=f"device must be auto, cpu, cuda or cuda:N, got '{name}'"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cuda") == choose_device("auto") == torch.device("cuda")
    with pytest.raises(ValueError, match=r"device cuda:2 was asked for, but torch sees 2 CUDA device\(s\)"):
        load_model("x", device="cuda:2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'cuda:1'"):
        join("cuda:1")


def test_a_model_goes_straight_to_its_gpu(monkeypatch, tmp_path):
    """No second copy in the CPU's memory: from_pretrained is told the device, and nothing is moved after it."""
    model = tiny.model("llama tied")
    save_pretrained(tmp_path / "m", model, saved.tokenizer())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    load, asked, moved = AutoModelForCausalLM.from_pretrained, [], []

    def on_the_cpu(name, device_map=None, **options):
        asked.append(device_map)
        return load(name, device_map=device_map and {"": "cpu"}, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", on_the_cpu)
    monkeypatch.setattr(type(model), "to", lambda self, device: moved.append(device) or self)
    loaded = load_model(str(tmp_path / "m"), device="cuda:1")
    assert (asked, moved) == ([{"": torch.device("cuda", 1)}], [])
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    monkeypatch.setattr("wanda_kernels.models.load._has_accelerate", lambda: False)
    load_model(str(tmp_path / "m"), device="cuda:1")
    assert (asked[1:], moved) == ([None], [torch.device("cuda", 1)])


def test_the_stopwatch_records_on_the_device_that_it_follows(monkeypatch):
    """With a clock for each device; the current device's stands still."""
    clocks = {torch.device("cuda", 1): 0.0, torch.device("cuda", 2): 500.0}

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self, stream):
            self.at = clocks[stream]

        def synchronize(self):
            assert self.at is not None

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    first, second = clocks
    stopwatch = Stopwatch(first)
    with stopwatch.measure("forward"):
        clocks[first] += 2000
        with stopwatch.measure("statistics"):
            clocks[first] += 1000
        stopwatch.follow(second)
    with stopwatch.measure("forward"):
        clocks[second] += 4000
    assert stopwatch.seconds() == {"forward": 6.0, "statistics": 1.0}


def test_a_hub_id_that_cannot_be_had():
    with pytest.raises(FileNotFoundError, match="model nobody/nothing is no local path and could not be had"):
        load_model("nobody/nothing")


def test_output_that_is_there(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("keep")
    with pytest.raises(FileExistsError, match="is not empty: choose another, or pass overwrite=True"):
        save_pretrained(tmp_path / "full", tiny.model())
    with pytest.raises(FileExistsError, match=r"holds no model .* it is not overwritten"):
        save_pretrained(tmp_path / "full", tiny.model(), overwrite=True)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    (tmp_path / "full" / "config.json").write_text('{"model_type": "llama"}')
    save_pretrained(tmp_path / "full", tiny.model(), overwrite=True)
    assert not (tmp_path / "full" / "file").exists()
    assert (tmp_path / "full" / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    with pytest.raises(NotADirectoryError, match=r"config.json is a file"):
        check_output(tmp_path / "full" / "config.json" / "x", overwrite=True)


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    """Two commands into one folder: the later one says so, and its work is not lost."""
    model = tiny.model()
    write_weights = model.save_pretrained

    def another_is_faster(folder):
        write_weights(folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("keep")

    monkeypatch.setattr(model, "save_pretrained", another_is_faster)
    with pytest.raises(
        FileExistsError, match="written by another command meanwhile; what this run made is whole in"
    ) as e:
        save_pretrained(tmp_path / "out", model)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert load_model(str(e.value).rpartition(" ")[2]) is not None
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["file", "file/below", "n" * 250, "a/" + "n" * 250, "gone"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(name, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"output folder .*(is a file|name is too long|is a link to nothing)"):
        check_output(tmp_path / name, overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "gone"]


def test_the_model_is_not_written_over(tmp_path):
    saved.save_model(tmp_path / "m")
    for out in (tmp_path / "m", tmp_path / "m" / "out", tmp_path):
        with pytest.raises(ValueError, match="must not lie in each other"):
            check_output(out, overwrite=True, source=tmp_path / "m")
    check_output(tmp_path / "out", overwrite=True, source=tmp_path / "m")


@pytest.mark.parametrize("there_before", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, there_before):
    out = tmp_path / "out"
    if there_before:
        save_pretrained(out, tiny.model())
    before = {path.name: path.read_bytes() for path in out.iterdir()} if there_before else None
    model = tiny.model("opt")
    write_weights = model.save_pretrained

    def runs_full(folder):
        write_weights(folder)
        with (Path(folder) / "model.safetensors").open("r+b") as file:
            file.truncate(100)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", runs_full)
    with pytest.raises(OSError, match=r"output folder .*out could not be written: .*No space left"):
        save_pretrained(out, model, overwrite=True)
    assert out.exists() == there_before
    if before is not None:
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there_before else [])


def test_space_is_checked_before_the_work(tmp_path, monkeypatch):
    from collections import namedtuple

    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("usage", "total used free")(10, 10, 1 << 10))
    with pytest.raises(OSError, match="the model needs 0 MiB, the disk has 0 MiB left"):
        check_space(tmp_path / "a" / "b", tiny.model())
