"""prune --stream: the in-memory run's tensors bit for bit, the input's files, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import saved
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wanda_kernels import prune
from wanda_kernels.models import checkpoint as checkpoints
from wanda_kernels.streaming import stream_prune
from wanda_kernels.streaming.activations import SpilledActivations, TwoFiles


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from two, and lose much where the machine has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_sharded(folder: Path, family: str = "llama", dtype=torch.float32, shard: str = "60KB", **changes) -> Path:
    tiny.model(family, dtype, **changes).save_pretrained(folder, max_shard_size=shard)
    saved.tokenizer().save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_equals_in_memory(model: Path, out: Path, ids, **options) -> None:
    """Against from_pretrained, prune, save_pretrained; and against the input, byte for byte, outside the layers."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    report = prune(whole, ids, **options)
    expected = whole.state_dict()
    found, before = tensors(out), tensors(model)
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, expected[name]), name
    pruned = {f"{layer.name}.weight" for layer in report.layers}
    assert all(torch.equal(found[name], before[name]) for name in found if name not in pruned)
    assert all(not torch.equal(found[name], before[name]) for name in pruned)
    for path in model.glob("model*"):
        other = out / path.name
        assert other.stat().st_size == path.stat().st_size
        if path.suffix == ".json":
            assert other.read_bytes() == path.read_bytes()
    assert json.loads((out / "pruning_report.json").read_text()) == json.loads(
        json.dumps(report.to_dict(seconds=False))
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_the_run_in_memory_in_every_family(family, tmp_path):
    model = save_sharded(tmp_path / "model", family, torch.bfloat16)
    assert len(list(model.glob("*.safetensors"))) > 3
    stream_prune(model, tmp_path / "out", tiny.ids())
    assert_equals_in_memory(model, tmp_path / "out", tiny.ids())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("family", [*tiny.EXPERTS, "gpt2"])
def test_experts_equal_the_run_in_memory(family, tmp_path):
    """Files and model have other names, and other shapes."""
    model, out = save_sharded(tmp_path / "model", family, torch.bfloat16), tmp_path / "out"
    report = stream_prune(model, out, tiny.ids())
    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert prune(whole, tiny.ids()).to_dict(seconds=False) == report.to_dict(seconds=False)
    found, before = tensors(out), tensors(model)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in before.items()}
    expected = whole.state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


OPTIONS = [
    {"sparsity": 0.7, "batch_size": 2},
    {"pattern": "2:4", "propagate": "dense"},
    {"pattern": "2:4", "exact_error": True},
    {"propagate": "dense", "exact_error": True, "batch_size": 1},
    {"fuse_statistics": False, "pattern": "4:8"},
    {"method": "magnitude"},
    {"method": "magnitude", "pattern": "2:4"},
    {"method": "sparsegpt", "block_size": 32},
    {"method": "ria", "group": "column"},
    {"owl": True, "sparsity": 0.6, "batch_size": 2},
    {"refine": True, "refine_damping": 1.0},
    {"update": True, "update_steps": 3, "exact_error": True},
    {"refine": True, "update": True, "update_damping": 0.1, "pattern": "2:4"},
    {"refine": True, "values": "int4", "group_size": 32},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("family", "shard", "spilled"), [("llama tied", "60KB", False), ("gemma2", "50GB", True)], ids=str
)
def test_equals_the_run_in_memory_with_every_option(options, spilled, family, shard, tmp_path):
    ids = None if options.get("method") == "magnitude" else tiny.ids()
    model = save_sharded(tmp_path / "model", family, torch.float32, shard)
    (tmp_path / "offload").mkdir()
    places = {"activation_memory": 0, "offload": tmp_path / "offload"} if spilled else {}
    stream_prune(model, tmp_path / "out", ids, **options, **places)
    assert_equals_in_memory(model, tmp_path / "out", ids, **options)
    assert list((tmp_path / "offload").iterdir()) == []


def test_one_block(tmp_path):
    model = save_sharded(tmp_path / "model", num_hidden_layers=1)
    stream_prune(model, tmp_path / "out", tiny.ids())
    assert_equals_in_memory(model, tmp_path / "out", tiny.ids())


def test_tensors_that_the_model_does_not_know_are_copied(tmp_path):
    """LLaMA 1 checkpoints have inv_freq in each layer; some have a tied lm_head."""
    model = tmp_path / "model"
    tiny.model("llama tied").save_pretrained(model)
    held = load_file(model / "model.safetensors")
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, model / "model.safetensors", {"format": "pt"})
    stream_prune(model, tmp_path / "out", tiny.ids())
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(found[name], held[name])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_spilled_activations_read_what_was_written(tmp_path):
    files = TwoFiles(tmp_path, "x")
    waited = []
    hidden = SpilledActivations(files, lambda: waited.append(1), torch.device("cpu"))
    batches = [torch.randn(2, 3, 4).bfloat16(), torch.randn(1, 3, 4).bfloat16()]
    for batch in batches:
        hidden.append(batch)
    for index, batch in enumerate(batches):
        hidden[index] = batch * 2
        assert torch.equal(hidden[index], batch)  # until flip
    assert len(waited) == 1
    hidden.flip()
    assert all(torch.equal(found, batch * 2) for found, batch in zip(hidden, batches, strict=True))
    again = SpilledActivations(TwoFiles(tmp_path, "x"), lambda: None, torch.device("cpu"))
    again.restore(hidden.saver()())
    assert all(torch.equal(found, batch * 2) for found, batch in zip(again, batches, strict=True))
    files.remove()
    assert list(tmp_path.iterdir()) == []


def _truncate(model: Path) -> None:
    path = sorted(model.glob("*.safetensors"))[2]
    os.truncate(path, path.stat().st_size - 4)


def _remove_shard(model: Path) -> None:
    sorted(model.glob("*.safetensors"))[2].unlink()


def _index(change):
    def damage(model: Path) -> None:
        path = model / checkpoints.INDEX
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return damage


def _swap(index) -> None:
    names = sorted(index["weight_map"])
    index["weight_map"][names[0]] = index["weight_map"][names[-1]]


def _nan(model: Path) -> None:
    path = next(p for p in model.glob("*.safetensors") if "model.layers.1.mlp.up_proj.weight" in load_file(p))
    held = load_file(path)
    held["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(held, path, {"format": "pt"})


def _config(**changes):
    def damage(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


DAMAGE = {
    "truncated": (_truncate, ValueError, "is damaged or truncated"),
    "missing shard": (_remove_shard, FileNotFoundError, "names the shard model-00003-of-.* which is not there"),
    "swapped": (_index(_swap), ValueError, r"has lm_head.weight in model-\S+, it is in "),
    "unknown tensor": (_index(lambda i: i["weight_map"].update(x="model-00001-of-00009.safetensors")), Exception, "x"),
    "no map": (_index(lambda i: i.pop("weight_map")), ValueError, "is no index of a checkpoint"),
    "list": (_index(lambda i: i.update(weight_map=[1])), ValueError, "is no index of a checkpoint"),
    "elsewhere": (
        _index(lambda i: i["weight_map"].update(x="../a.safetensors")), ValueError, "must lie in the same folder"
    ),
    "NaN": (_nan, ValueError, r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or inf"),
    "no config": (lambda model: (model / "config.json").unlink(), FileNotFoundError, "holds no config.json"),
    "another shape": (_config(intermediate_size=128), ValueError, r"is F32 \[\d+, \d+\] in the checkpoint and"),
    "another dtype": (_config(dtype="bfloat16"), ValueError, "is F32 .* in the checkpoint and torch.bfloat16"),
    "more layers": (_config(num_hidden_layers=4), ValueError, r"has no tensor model\.layers\.3"),
    "quantised": (_config(quantization_config={"quant_method": "gptq", "bits": 4}), ValueError, "cannot be streamed"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_refused_and_nothing_is_left(damage, tmp_path):
    model = save_sharded(tmp_path / "model")
    change, kind, message = DAMAGE[damage]
    change(model)
    with pytest.raises(kind, match=message):
        stream_prune(model, tmp_path / "out", tiny.ids())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_wrong_arguments(tmp_path):
    model = save_sharded(tmp_path / "model")
    for options, message in [
        ({"dtype": "bfloat16"}, "keeps the checkpoint's dtype, float32, got 'bfloat16'"),
        ({"pattern": "2:5"}, "not a multiple of the pattern's M = 5"),
        ({"propagate": "x"}, "propagate must be one of"),
        ({"offload": tmp_path / "nowhere"}, "offload .*nowhere is no folder"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            stream_prune(model, tmp_path / "out", tiny.ids(), **options)
    with pytest.raises(ValueError, match="needs input_ids"):
        stream_prune(model, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="only safetensors checkpoints"):
        stream_prune(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_replaced_only_where_asked(tmp_path):
    model = save_sharded(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="holds no model"):
        stream_prune(model, tmp_path / "out", tiny.ids(), overwrite=True)
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileExistsError, match="is not empty"):
        stream_prune(model, tmp_path / "out", tiny.ids())
    stream_prune(model, tmp_path / "out", tiny.ids(), overwrite=True)
    assert_equals_in_memory(model, tmp_path / "out", tiny.ids())
    assert not (tmp_path / "out" / "mine").exists()
