"""Mutated model folders: some of what ``make soak`` runs 2,500 of; and faults that were found so, by name."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import struct
import time
from pathlib import Path

import mutations
import pytest
import tiny
import torch
from mutators_tensors import load_json, put, read, tensors, write
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from wanda_kernels.models import load_model
from wanda_kernels.models.checkpoint import Checkpoint
from wanda_kernels.packed import dispatch

FILE = "model.safetensors"


def check(packed: int, plain: int, seed: int) -> None:
    verbosity = logging.get_verbosity()
    good, red = mutations.run(mutations.cases_of(packed, plain, seed))
    logging.set_verbosity(verbosity)
    assert not red, "\n".join(red)
    ends = [line[3].split(":")[0] for line in good]
    assert len(ends) == packed + plain
    assert min(ends.count("loaded"), ends.count("refused")) > len(ends) / 6  # neither all nor nothing is refused


@pytest.mark.slow
def test_some():
    check(110, 40, seed=1)


@pytest.mark.slow
def test_many():
    check(240, 60, seed=2)


@pytest.mark.slow
def test_a_crash_and_a_hang_are_told(monkeypatch):
    """By the processes that run the mutations: what dies is red, the others go on."""

    def judge(case, bases, folder):
        if case.number == 1:
            faulthandler.disable()  # pytest's: its words in a green run would look like a fault
            os.kill(os.getpid(), signal.SIGSEGV)
        if case.number == 2:
            time.sleep(60)
        return "nothing", "loaded", ""

    monkeypatch.setattr(mutations, "judge", judge)
    monkeypatch.setattr(mutations, "HANGS_S", 2)
    good, red = mutations.run(mutations.cases_of(4, 0, 0), jobs=1)
    assert sorted(line[0] for line in good) == [0, 3]
    assert sorted(red) == ["1: the process died: exit code -11", "2: hangs"]


def set_config(folder: Path, **fields: object) -> None:
    config = load_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | fields))


def change(folder: Path, name: str, **entry: object) -> None:
    """What the header says of a tensor."""
    header, data = read(folder / FILE)
    header[name] |= entry
    write(folder / FILE, header, data)


def header_twice(folder: Path) -> None:
    header, data = read(folder / FILE)
    name = "model.layers.0.mlp.up_proj.weight"
    other = json.dumps(header[name] | {"shape": header[name]["shape"][::-1]})
    write(folder / FILE, f'{{"{name}": {other}, {json.dumps(header)[1:]}', data)


def without_prefix(folder: Path) -> None:
    held = tensors(folder / FILE)
    held["layers.0.mlp.up_proj.weight"] = held["model.layers.0.mlp.up_proj.weight"]
    put(folder / FILE, held)


def an_index_too(folder: Path) -> None:
    (folder / "other.safetensors").write_bytes((folder / FILE).read_bytes())
    places = dict.fromkeys(tensors(folder / FILE), "other.safetensors")
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (header_twice, "model.safetensors is damaged: it has model.layers.0.mlp.up_proj.weight twice"),
        (without_prefix, "holds model.layers.0.mlp.up_proj.weight twice: as layers.0.mlp.up_proj.weight and as model"),
        (an_index_too, r"holds model.safetensors and also .*index.json of other files"),
        (lambda f: change(f, "model.norm.weight", dtype="I32"), "model.norm.weight is I32 in its files, float32 in"),
        (lambda f: set_config(f, num_hidden_layers=10**12), "num_hidden_layers is 1000000000000, the files hold"),
        (lambda f: set_config(f, vocab_size=2**31), "does not fit its config.json, which describes 27.* weights"),
        (lambda f: set_config(f, vocab_size=130), r"embed_tokens.weight is \[128, 64\], not \[130, 64\]"),
        (lambda f: set_config(f, hidden_size="64"), "cannot be made from its config.json: .*'hidden_size'"),
        (lambda f: set_config(f, dtype="float99"), "cannot be made from its config.json: .*float99"),
        (lambda f: set_config(f, dtype="int8"), "its dtype is torch.int8, not a floating-point type"),
        (lambda f: set_config(f, transformers_weights="x.safetensors"), "takes the weights from other files"),
        (lambda f: set_config(f, quantization_config=[]), "quantization_config must be an object"),
        (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json is damaged: it is nested too deeply"),
        (lambda f: (f / "generation_config.json").write_text("[]"), "generation_config.json is damaged"),
    ],
)
def test_what_was_let_through_or_said_badly(damage, message, tmp_path):
    mutations.make_base(tmp_path, "llama,float32,1,plain")
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))


def starts_of_another_type(folder: Path) -> None:
    held = load_file(folder / FILE)
    name = "model.layers.0.mlp.up_proj.weight_starts"
    save_file(held | {name: held[name].long()}, folder / FILE, {"format": "pt"})


def tensors_too_many(folder: Path) -> None:
    held = load_file(folder / FILE)
    save_file(held | {"model.layers.7.mlp.up_proj.weight": torch.ones(3)}, folder / FILE, {"format": "pt"})


def described(folder: Path, **layer: object) -> None:
    config = load_json(folder / "config.json")["quantization_config"]
    config["layers"]["model.layers.0.mlp.up_proj"] |= layer
    set_config(folder, quantization_config=config)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (starts_of_another_type, r"weight_starts is I64 \[129\], it must be int32 \[129\]"),
        (tensors_too_many, "no place for: model.layers.7.mlp.up_proj.weight"),
        (lambda f: described(f, kept=True), "quantization_config: model.layers.0.mlp.up_proj is described as"),
        (lambda f: described(f, kept=2**31 - 1), r"up_proj of \[128, 64\] cannot be packed as"),
        (lambda f: described(f, kept=5), r"weight is F32 \[\d+\], it must be float32 \[37\]"),
        (lambda f: set_config(f, quantization_config={"quant_method": "wanda_packed"}), "its layers must be an object"),
    ],
)
def test_packed_folders_are_refused_by_transformers_too(damage, message, tmp_path):
    mutations.make_base(tmp_path, "llama,float32,1,bitmap")
    damage(tmp_path)
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path))


def test_a_tied_model_with_two_different_tensors_holds_both(tmp_path):
    mutations.make_base(tmp_path, "llama tied,float32,1,plain")
    held = load_file(tmp_path / FILE)
    head = held["model.embed_tokens.weight"] + 1
    save_file(held | {"lm_head.weight": head}, tmp_path / FILE, {"format": "pt"})
    model = load_model(str(tmp_path))
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.model.embed_tokens.weight, held["model.embed_tokens.weight"])


def test_a_tensor_of_a_type_that_nothing_here_reads(tmp_path):
    entry = {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}
    write(tmp_path / FILE, {"x": entry}, bytes(4))
    with pytest.raises(ValueError, match=r"x is F8_E8M0 in model.safetensors, it must be one of F64, F32"):
        Checkpoint(tmp_path).load("x")


def test_a_header_that_is_longer_than_its_file(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    path = tmp_path / FILE
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or truncated"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("junk", ['{"a": []}', '{"a": {}}', '{"a": "fast"}', "[]", "5", "[" * 10**5])
def test_junk_in_a_dispatch_file(junk, tmp_path):
    (tmp_path / "choices.json").write_text(junk)
    with pytest.raises(ValueError, match=r"dispatch file .*(must map shapes to packed, unpack|could not be read)"):
        dispatch.load(tmp_path / "choices.json")
