"""prune --stream --compress: bit for bit what prune and compress make of the model in memory; kills, refusals."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import saved
import streaming_child
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_cli import call
from test_ranks import Ranks, command
from test_resume import BLOCKS, EndsAt, digest
from test_streaming import save_sharded, tensors
from test_work_folder import attempt, rewritten, state_of
from transformers import AutoModelForCausalLM

from wanda_kernels import compress, prune
from wanda_kernels.memory import added_peak
from wanda_kernels.models import load_model, save_pretrained
from wanda_kernels.models.checkpoint import INDEX, Checkpoint
from wanda_kernels.packed import PackedLinear
from wanda_kernels.packed.model import Packing
from wanda_kernels.streaming import stream_prune
from wanda_kernels.streaming.run import describe

pytestmark = pytest.mark.usefixtures("one_thread")

INT4 = {"values": "int4", "group_size": 32}
FLOAT, INT8, CALIBRATED = Packing(), Packing(values="int8", head="int8"), Packing(**INT4)


def in_memory(model: Path, out: Path, packing: Packing, ids, **options):
    """load_model, prune, compress, save: what both reports say."""
    whole = load_model(str(model), device="cpu")
    report = prune(whole, ids, **options)
    packed = compress(whole, **asdict(packing))
    save_pretrained(out, whole)
    return report, packed


def assert_equal_folders(out: Path, expected: Path) -> None:
    """All tensors under the same names, and the same words beside them."""
    found, wanted = tensors(out), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    for name in ("config.json", "generation_config.json"):
        assert (out / name).exists() == (expected / name).exists()
        if (expected / name).exists():
            assert (out / name).read_bytes() == (expected / name).read_bytes()


def assert_equals_in_memory(model: Path, folder: Path, packing: Packing, ids, **options) -> None:
    expected, packed = in_memory(model, folder / "memory", packing, ids, **options)
    report = stream_prune(model, folder / "out", ids, packing=packing, **options)
    assert_equal_folders(folder / "out", folder / "memory")
    assert report.to_dict(seconds=False) == expected.to_dict(seconds=False)
    assert report.packed == packed
    assert list(report.packed.formats.items()) == list(packed.formats.items())
    load_model(str(folder / "out"), device="cpu")  # checked by the quantizer
    assert sorted(path.name for path in folder.iterdir()) == ["memory", "model", "out"]


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.EXPERTS])
def test_equals_the_model_in_memory_in_every_family(family, tmp_path):
    model = save_sharded(tmp_path / "model", family, torch.bfloat16)
    assert_equals_in_memory(model, tmp_path, FLOAT, tiny.ids())


WAYS = [
    (FLOAT, {"pattern": "2:4"}),
    (Packing(format="bitmap"), {"pattern": "2:4", "propagate": "dense"}),
    (INT8, {"pattern": "2:4"}),
    (INT8, {"sparsity": 0.6, "owl": True, "batch_size": 2}),
    (Packing(values="int8", group_size=64), {"method": "magnitude"}),
    (CALIBRATED, {"update": True, **INT4}),
    (CALIBRATED, {"pattern": "2:4", "refine": True, "update": True, **INT4}),
    (CALIBRATED, {"method": "sparsegpt", "block_size": 32}),
    (Packing(**INT4, head="int8"), {"sparsity": 0.7}),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("llama tied", torch.bfloat16), ("mixtral", torch.bfloat16)]
)
def test_equals_the_model_in_memory_with_every_option(family, dtype, way, tmp_path):
    packing, options = way
    model = save_sharded(tmp_path / "model", family, dtype)
    ids = None if options.get("method") == "magnitude" else tiny.ids()
    assert_equals_in_memory(model, tmp_path, packing, ids, **options)


def test_where_nothing_shrinks_it_is_refused(tmp_path):
    model = save_sharded(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no linear layer of the model can be packed: .*: prune it first"):
        stream_prune(model, tmp_path / "out", tiny.ids(), sparsity=0.01, packing=FLOAT)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_shards_and_their_index(tmp_path):
    """One for each block, one for what lies outside, one for an output layer of its own; of one file, too."""
    model = save_sharded(tmp_path / "model", shard="50GB")
    stream_prune(model, tmp_path / "out", tiny.ids(), packing=FLOAT)
    made = Checkpoint(tmp_path / "out")
    assert made.index == INDEX
    shards = [f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)]
    assert list(made.files) == shards
    for number, shard in enumerate(shards[:3]):
        assert all(name.startswith(f"model.layers.{number}.") for name, e in made.entries.items() if e.file == shard)
    assert {n for n, e in made.entries.items() if e.file == shards[3]} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }
    assert {n for n, e in made.entries.items() if e.file == shards[4]} == {"lm_head.weight"}
    size = sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values())
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"] == {"total_size": size}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.model.layers[2].mlp.down_proj, PackedLinear)


def test_tensors_that_the_model_does_not_know_are_left_out(tmp_path):
    model = tmp_path / "model"
    tiny.model("llama tied").save_pretrained(model)
    held = load_file(model / "model.safetensors")
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, model / "model.safetensors", {"format": "pt"})
    assert_equals_in_memory(model, tmp_path, FLOAT, tiny.ids())


@pytest.mark.parametrize("family", ["mixtral", "jetmoe", "llama"])
def test_files_of_transformers_own_names(family, tmp_path):
    """What was saved under other names than the hub's is packed under those, too."""
    tiny.model(family, torch.bfloat16).save_pretrained(tmp_path / "model", save_original_format=False)
    assert_equals_in_memory(tmp_path / "model", tmp_path, FLOAT, tiny.ids())


def test_generation_options_go_along(tmp_path):
    model = save_sharded(tmp_path / "model")
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "top_p": 0.7}))
    assert_equals_in_memory(model, tmp_path, FLOAT, tiny.ids())
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["top_p"] == 0.7


RUNS = [
    ("llama", INT8, {"pattern": "2:4"}),
    ("llama tied", Packing(**INT4, head="int8"), {"update": True, "update_steps": 3, **INT4}),
    ("llama", FLOAT, {"activation_memory": 0, "batch_size": 2}),
    ("llama", FLOAT, {"method": "magnitude"}),
    ("mixtral", FLOAT, {"owl": True, "sparsity": 0.6, "batch_size": 2}),
    ("gemma3", FLOAT, {}),
]


@pytest.mark.parametrize(("family", "packing", "options"), RUNS, ids=str)
def test_goes_on_to_the_same_files(family, packing, options, tmp_path):
    model = save_sharded(tmp_path / "model", family, torch.bfloat16, num_hidden_layers=BLOCKS)
    options = {"packing": packing, **options}
    ids = None if options.get("method") == "magnitude" else tiny.ids()
    report = stream_prune(model, tmp_path / "whole", ids, **options)
    out = tmp_path / "out"
    for block, error in [(1, KeyboardInterrupt()), (2, OSError("no space left")), (4, RuntimeError("out of memory"))]:
        with pytest.raises(type(error)):
            stream_prune(model, out, ids, **options, resume=True, progress=EndsAt(error, block=block))
        assert f"{block} of {BLOCKS} blocks done" in describe(out)
        assert not out.exists()
    again = stream_prune(model, out, ids, **options, resume=True)
    assert digest(out) == digest(tmp_path / "whole")
    assert again.packed == report.packed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]


@pytest.mark.slow
def test_killed_just_before_a_state(tmp_path):
    """Its block's shard is there, and no state speaks of it yet; after the last one, what lies outside is missing."""
    model = saved.save_model(tmp_path / "model", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text(saved.text(2000))
    how = ["prune", model, "--stream", "--compress", "--values", "int8", "--head", "int8", "--calibration",
           tmp_path / "text.txt", "--samples", "4", "--length", "32"]  # fmt: skip

    def run(out: Path, *more, **options) -> int | None:
        process = streaming_child.start_command([*how, "--out", out, *more], tmp_path / "said", **options)
        process.join(120)
        return process.exitcode

    assert run(tmp_path / "whole") == 0
    for at in (1, 2, 3):
        out = tmp_path / f"out{at}"
        assert run(out, state=(at, streaming_child.die, ())) == -signal.SIGKILL
        assert len(list((tmp_path / f".out{at}.partial" / "folder").glob("*.safetensors"))) == at
        assert run(out, "--resume") == 0
        assert digest(out) == digest(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_ends_in_words_and_can_be_gone_on_from(tmp_path):
    """The shard of what lies outside the blocks is larger than theirs, and finds no room."""
    model = saved.save_model(tmp_path / "model", vocab_size=2048)
    how = ["prune", model, "--method", "magnitude", "--stream", "--compress"]
    for name in ("whole", "out"):
        shards = sorted((tmp_path / "whole").glob("*.safetensors"), key=lambda path: path.stat().st_size)
        limit = None if name == "whole" else shards[-1].stat().st_size - 8
        process = streaming_child.start_command([*how, "--out", tmp_path / name], tmp_path / "said", file_limit=limit)
        process.join(120)
        assert process.exitcode == (0 if name == "whole" else 1)
    said = (tmp_path / "said").read_text()
    assert f"{shards[-1].name} could not be written: " in said
    assert "3 of 3 blocks done: --resume goes on with it" in said
    process = streaming_child.start_command([*how, "--out", tmp_path / "out", "--resume"], tmp_path / "said")
    process.join(120)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_while_publishing(tmp_path):
    """From the first config.json on, which is that of the first block's shard."""
    model = save_sharded(tmp_path / "model", num_hidden_layers=2)
    stream_prune(model, tmp_path / "whole", tiny.ids(), packing=INT8)
    whole = digest(tmp_path / "whole")
    ended = 0
    for step in range(0, 400, 7):
        out = tmp_path / f"{step}" / "out"
        out.parent.mkdir()
        process = streaming_child.start_and_die(model, out, step, packing=INT8)
        process.join(120)
        if process.exitcode == 0:
            break
        ended += 1
        assert (digest(out) if out.exists() else whole) == whole
        stream_prune(model, out, tiny.ids(), packing=INT8, resume=True, overwrite=out.exists())
        assert digest(out) == whole
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert ended > 5


@pytest.fixture
def unfinished(tmp_path) -> Path:
    """Two blocks done."""
    model = save_sharded(tmp_path / "model", num_hidden_layers=BLOCKS)
    with pytest.raises(KeyboardInterrupt):
        stream_prune(model, tmp_path / "out", tiny.ids(), packing=INT8, progress=EndsAt(KeyboardInterrupt(), block=2))
    return tmp_path


CHANGES = {
    "packing": (Packing(values="int8"), "option packing head was int8, now it is float"),
    "format": (Packing("bitmap", "int8", None, "int8"), "option packing format was auto, now it is bitmap"),
    "not packed": (None, "option packing was {.*}, now it is None"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_options_are_refused_by_name(change, unfinished):
    packing, message = CHANGES[change]
    with pytest.raises(ValueError, match=message):
        stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), packing=packing, resume=True)
    assert "2 of 5 blocks done" in describe(unfinished / "out")


Q = "model.layers.0.self_attn.q_proj"
LIES = [
    lambda packed: None,
    lambda packed: {},
    lambda packed: [],
    lambda packed: packed | {"layers": {}},
    lambda packed: packed | {"layers": packed["layers"] | {"lm_head": packed["layers"][Q]}},
    lambda packed: packed | {"layers": packed["layers"] | {Q: {}}},
    lambda packed: packed | {"layers": packed["layers"] | {Q: packed["layers"][Q] | {"kept": 3}}},
    lambda packed: packed | {"layers": packed["layers"] | {Q: packed["layers"][Q] | {"kept": 10**9}}},
    lambda packed: packed | {"layers": packed["layers"] | {Q: packed["layers"][Q] | {"values": "int4"}}},
    lambda packed: packed | {"dense": {Q: "it is said so"}},
    lambda packed: packed | {"dense": {Q: 3}, "layers": {n: one for n, one in packed["layers"].items() if n != Q}},
]


@pytest.mark.parametrize("lie", range(len(LIES)))
def test_a_state_that_lies_about_the_shards_is_refused(lie, unfinished):
    state = json.loads(state_of(unfinished).read_text())
    state["packed"] = LIES[lie](state["packed"])
    state_of(unfinished).write_text(rewritten(state))
    assert "cannot be gone on with" in attempt(unfinished, resume=True, packing=INT8)
    assert not (unfinished / "out").exists()


def test_shards_that_vanish_or_change_between_runs(unfinished):
    shard = unfinished / ".out.partial" / "folder" / "model-00002-of-00007.safetensors"
    content = shard.read_bytes()
    other = (shard.parent / "model-00001-of-00007.safetensors").read_bytes()
    for damage in (shard.unlink, lambda: shard.write_bytes(content[:-4]), lambda: shard.write_bytes(b"")):
        damage()
        assert f"{shard.name} is" in attempt(unfinished, resume=True, packing=INT8)
        shard.write_bytes(content)
    shard.unlink()
    os.link(unfinished / "model" / "config.json", shard)
    assert "not a plain file" in attempt(unfinished, resume=True, packing=INT8)
    shard.unlink()
    shard.write_bytes(other + b"x")
    assert "cannot be gone on with" in attempt(unfinished, resume=True, packing=INT8)
    shard.write_bytes(content)
    (shard.parent / "config.json").unlink()
    (shard.parent / "config.json").symlink_to(unfinished / "model" / "config.json")
    before = (unfinished / "model" / "config.json").read_bytes()
    stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), packing=INT8, resume=True)
    assert (unfinished / "model" / "config.json").read_bytes() == before
    assert not (unfinished / "out" / "config.json").is_symlink()


@pytest.mark.slow
def test_two_blocks_are_in_memory(tmp_path):
    """Of a model of 20 blocks of 13 MB: two, what they are packed to, and what packing a matrix takes."""
    width = {"hidden_size": 512, "intermediate_size": 1408, "num_key_value_heads": 4}
    for name, blocks in (("small", 1), ("model", 20)):
        made = tiny.model("llama", **width, num_hidden_layers=blocks)
        block = sum(parameter.nbytes for parameter in made.model.layers[0].parameters())
        made.save_pretrained(tmp_path / name)
    del made
    how = {"method": "magnitude", "packing": FLOAT}
    stream_prune(tmp_path / "small", tmp_path / "warm", **how)
    peak = added_peak(lambda: stream_prune(tmp_path / "model", tmp_path / "out", **how), torch.device("cpu"))
    assert peak is None or peak < 8 * block  # of 20; packed they are 11


def test_on_the_command_line(tmp_path, capsys):
    saved.save_model(tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "text.txt").write_text(saved.text(4000))
    command = ["prune", tmp_path / "model", "--calibration", tmp_path / "text.txt", "--samples", "8", "--length", "32",
               "--update", "--compress", "--values", "int4", "--group-size", "64", "--head", "int8"]  # fmt: skip
    said = {}
    for name, how in (("memory", []), ("out", ["--stream"])):
        code, told, error = call(capsys, *command, *how, "--out", tmp_path / name)
        assert code == 0, error
        said[name] = [line for line in told.splitlines() if line.startswith(("packed ", "rounded "))]
    assert said["out"] == said["memory"]
    assert len(said["out"]) == 2
    assert_equal_folders(tmp_path / "out", tmp_path / "memory")
    beside = [{p.name for p in (tmp_path / name).iterdir() if "safetensors" not in p.name} for name in said]
    assert beside[0] == beside[1]
    for name in sorted(beside[0]):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()


def test_two_processes(tmp_path):
    """As torchrun starts them; the first one packs."""
    save_sharded(tmp_path / "model")
    (tmp_path / "text.txt").write_text(saved.text(3000))
    how = ["--compress", "--values", "int8", "--head", "int8"]
    alone = streaming_child.start_command(["prune", *command(tmp_path, tmp_path / "memory", *how)], tmp_path / "said")
    ranks = Ranks(tmp_path, [command(tmp_path, tmp_path / "out", "--stream", *how)] * 2)
    assert ranks.finish() == [0, 0], [ranks.error(rank) for rank in (0, 1)]
    alone.join(120)
    assert_equal_folders(tmp_path / "out", tmp_path / "memory")


REFUSED = [
    (["--stream", "--values", "int8"], "--values, --group-size and --head need --compress"),
    (["--stream", "--compress", "--values", "int5"], "values must be float, int8 or int4, got 'int5'"),
    (["--stream", "--compress", "--head", "int4"], "head must be float or int8, got 'int4'"),
    (["--compress", "--resume"], "--resume needs --stream"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_refusals(options, message, tmp_path, capsys):
    saved.save_model(tmp_path / "model")
    words = ["prune", tmp_path / "model", "--method", "magnitude", *options, "--out", tmp_path / "out"]
    code, _, error = call(capsys, *words)
    assert code == 2
    assert message in error


def test_a_head_that_cannot_be_packed_is_refused_before_the_work(tmp_path):
    model = save_sharded(tmp_path / "model")
    path = next(p for p in model.glob("*.safetensors") if "lm_head.weight" in load_file(p))
    held = load_file(path)
    held["lm_head.weight"][3, 5] = float("inf")
    save_file(held, path, {"format": "pt"})
    with pytest.raises(ValueError, match="lm_head holds NaN or inf: it cannot be rounded to 8 or 4 bits"):
        stream_prune(model, tmp_path / "out", tiny.ids(), packing=INT8, progress=EndsAt(AssertionError("late"), 0))
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


HOW = [["--values", "int8", "--head", "int8"], ["--format", "bitmap"], ["--values", "int4", "--calibrate"]]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("family", ["llama tied", "mixtral"])
def test_compress_from_folder_to_folder(family, how, tmp_path, capsys):
    """What is pruned already: as compress does it in memory, the reports too."""
    saved.save_model(tmp_path / "dense", family, dtype=torch.bfloat16)
    (tmp_path / "text.txt").write_text(saved.text(4000))
    data = ["--calibration", tmp_path / "text.txt", "--samples", "8", "--length", "32"]
    assert call(capsys, "prune", tmp_path / "dense", *data, "--out", tmp_path / "pruned")[0] == 0
    (tmp_path / "pruned" / "dropped_experts.json").write_text("{}")
    command = ["compress", tmp_path / "pruned", *how, *(data if "--calibrate" in how else [])]
    said = {}
    for name, streamed in (("memory", []), ("out", ["--stream"])):
        code, told, error = call(capsys, *command, *streamed, "--out", tmp_path / name)
        assert code == 0, error
        said[name] = told.replace(str(tmp_path / name), "DIR")
    assert said["out"] == said["memory"]
    assert_equal_folders(tmp_path / "out", tmp_path / "memory")
    beside = [{p.name for p in (tmp_path / name).iterdir() if "safetensors" not in p.name} for name in said]
    assert beside[0] == beside[1] >= {"pruning_report.json", "dropped_experts.json"}
    for name in sorted(beside[0]):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()


def test_compress_goes_on_where_it_was_killed(tmp_path, capsys):
    saved.save_model(tmp_path / "dense", num_hidden_layers=4)
    prune_it = ["prune", tmp_path / "dense", "--method", "magnitude", "--out", tmp_path / "pruned"]
    assert call(capsys, *prune_it)[0] == 0
    command = ["compress", tmp_path / "pruned", "--stream", "--values", "int8"]
    assert call(capsys, *command, "--out", tmp_path / "whole")[0] == 0
    process = streaming_child.start_command(
        [*command, "--out", tmp_path / "out"], tmp_path / "said", state=(3, streaming_child.die, ())
    )
    process.join(120)
    assert process.exitcode not in (0, None)
    assert "2 of 4 blocks done" in describe(tmp_path / "out")
    code, _, error = call(capsys, *command, "--out", tmp_path / "out")
    assert (code, "holds an unfinished run" in error) == (1, True)
    code, _, error = call(capsys, *command[:-1], "int4", "--out", tmp_path / "out", "--resume")
    assert (code, "packing values was int8, now it is int4" in error) == (1, True)
    assert call(capsys, *command, "--out", tmp_path / "out", "--resume")[0] == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_compress_refusals(tmp_path, capsys):
    saved.save_model(tmp_path / "model")
    for how, source, message in (
        (["--resume"], "model", "--resume needs --stream"),
        (["--stream"], "nowhere", "--stream needs a local folder with safetensors files"),
    ):
        code, _, error = call(capsys, "compress", tmp_path / source, *how, "--out", tmp_path / "out")
        assert code == 2
        assert message in error
    code, _, error = call(capsys, "compress", tmp_path / "model", "--stream", "--out", tmp_path / "out")
    assert code == 1
    assert "no linear layer of the model can be packed: " in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
