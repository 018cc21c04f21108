"""What lies beside the output of a streamed run is believed only as far as it can be checked."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import streaming_child
import tiny
from test_resume import BLOCKS, EndsAt, digest, model, unfinished  # noqa: F401  (fixtures)
from test_streaming import one_thread, save_sharded  # noqa: F401  (a fixture)

from wanda_kernels.models.checkpoint import write_at
from wanda_kernels.streaming import stream_prune, workfolder
from wanda_kernels.streaming.activations import TwoFiles
from wanda_kernels.streaming.run import describe
from wanda_kernels.streaming.workfolder import done_of


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> dict[str, str]:  # noqa: F811
    """The files that a run gives which nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    stream_prune(model, out, tiny.ids())
    return digest(out)


@pytest.mark.slow
@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_at_any_step_of_publishing(replaces, model, whole, tmp_path):  # noqa: F811
    """From the first small file to the removal of the work folder. Whatever is at the output's place is whole; going on
    ends in the right files, and leaves nothing else."""
    before = {}
    if replaces:
        stream_prune(model, tmp_path / "before", tiny.ids(), pattern="2:4")
        before = digest(tmp_path / "before")
    ended, renamed = 0, 0
    for step in range(200):
        folder = tmp_path / f"{step}"
        folder.mkdir()
        out = folder / "out"
        if replaces:
            shutil.copytree(tmp_path / "before", out)
        process = streaming_child.start_and_die(model, out, step, overwrite=replaces)
        process.join(120)
        if process.exitcode == 0:
            break
        ended += 1
        assert process.exitcode == -signal.SIGKILL
        assert (digest(out) if out.exists() else {}) in (before, whole)
        if out.exists() and digest(out) == whole:
            renamed += 1
            assert describe(out) is None  # nothing to go on with
            if not replaces:
                with pytest.raises(FileExistsError, match="is not empty"):
                    stream_prune(model, out, tiny.ids(), resume=True)
        else:
            assert f"{BLOCKS} of {BLOCKS} blocks done" in describe(out)
        stream_prune(model, out, tiny.ids(), resume=True, overwrite=replaces or out.exists())
        assert digest(out) == whole
        assert [path.name for path in folder.iterdir()] == ["out"]
    assert ended > 10
    assert renamed > 3


def test_an_output_that_was_moved_away_is_made_again(model, whole, tmp_path):  # noqa: F811
    for step in range(200):
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
        streaming_child.start_and_die(model, tmp_path / "out", step).join(120)
        if (tmp_path / "out").exists():
            break
    assert (tmp_path / ".out.partial" / "state.json").exists()
    (tmp_path / "out").rename(tmp_path / "moved")
    stream_prune(model, tmp_path / "out", tiny.ids(), resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "moved") == whole


def state_of(folder: Path) -> Path:
    return folder / ".out.partial" / "state.json"


def rewritten(state: dict) -> str:
    """As one who knows how states are written would write it."""
    content = {key: value for key, value in state.items() if key != "digest"}
    return json.dumps(content | {"digest": workfolder._digest(content)})


def attempt(folder: Path, **options) -> str:
    """What a run says that fails, or nothing."""
    try:
        stream_prune(folder / "model", folder / "out", tiny.ids(), **options)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


CHANGES = {
    "done": [-1, 0, 1, 3, BLOCKS, BLOCKS + 1, 10**6, True, "2", None, 2.0],
    "blocks": [1, 2, BLOCKS - 1, 10**6, None],
    "layers": [None, [], {}, [{"a": 1}], [[]]],
    "activations": [
        None, {}, [], {"turn": 5}, {"turn": 0, "dtype": "nn", "shapes": [[1, 24, 64]]},
        {"turn": 0, "dtype": "float32", "shapes": [[2**40, 2**10]]},
        {"turn": 0, "dtype": "float32", "shapes": [[5, -24, 64]]}, {"file": "/etc/passwd"},
    ],
    "sparsities": [[0.5] * BLOCKS, [], {}, "xxxxx", 0.5, [1.5] * BLOCKS],
    "packed": [{}, [], 0, {"layers": {}, "dense": {}}],
    "begun_with": [None, {}, {"option": {}}],
    "folder": [None, [0, 0], []],
    "version": [1, 2, None, "3"],
    "digest": ["", None],
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
@pytest.mark.parametrize("knows_how", [False, True])
def test_a_state_with_a_wrong_field_gives_no_wrong_output(field, knows_how, unfinished, whole, tmp_path):  # noqa: F811
    """It is refused in words; where what was changed decides nothing, the files are the right ones."""
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / ".out.partial", kept)
    before = json.loads(state_of(tmp_path).read_text())
    assert before["done"] == 2
    for value in CHANGES[field]:
        state = before | {field: value}
        state_of(tmp_path).write_text(rewritten(state) if knows_how else json.dumps(state))
        said = attempt(tmp_path, resume=True)
        if said:
            assert "start anew" in said
            assert not (tmp_path / "out").exists()
            stream_prune(tmp_path / "model", tmp_path / "out", tiny.ids(), overwrite=True)
        else:
            assert knows_how or state == before, f"{field} {value} was believed"
        assert digest(tmp_path / "out") == whole, f"{field} {value}"
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
        shutil.copytree(kept, tmp_path / ".out.partial")
        before = json.loads(state_of(tmp_path).read_text())
        before["folder"] = workfolder._inode(tmp_path / ".out.partial" / "folder")
        state_of(tmp_path).write_text(rewritten(before))


LIES = [
    lambda state: state["activations"].update(turn=1 - state["activations"]["turn"]),
    lambda state: state["activations"].update(dtype="bfloat16"),
    lambda state: state["activations"].update(dtype="float64"),
    lambda state: state["activations"].update(shapes=[[5, 64, 24]]),
    lambda state: state["activations"].update(shapes=[[4, 24, 64], [1, 24, 64]]),
    lambda state: state["activations"].update(shapes=[[5, 24, 8, 8]]),
    lambda state: state["layers"][3].update(damping=[]),
    lambda state: state["layers"][3].update(sparsity="half"),
    lambda state: state["layers"][3].update(estimated_error=True),
    lambda state: state["layers"][3].update(shape=[64, 65]),
    lambda state: state["layers"][3].update(statistics=3),
    lambda state: state["layers"][3].pop("threshold"),
]


@pytest.mark.parametrize("lie", range(len(LIES)))
def test_a_state_that_could_be_true_is_held_against_the_run(lie, unfinished, whole):  # noqa: F811
    """Written by one who knows how: the other file's activations, say, would give other weights without a word."""
    state = json.loads(state_of(unfinished).read_text())
    LIES[lie](state)
    state_of(unfinished).write_text(rewritten(state))
    assert "cannot be gone on with" in attempt(unfinished, resume=True)
    assert not (unfinished / "out").exists()
    stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), overwrite=True)
    assert digest(unfinished / "out") == whole


def test_a_state_holds_no_plans(unfinished, whole):  # noqa: F811
    """How statistics are added up is seen anew by each run: believed, a changed plan would change the weights."""
    state = json.loads(state_of(unfinished).read_text())
    assert sorted(state) == sorted(CHANGES)
    stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), resume=True)
    assert digest(unfinished / "out") == whole


def test_a_report_with_numbers_that_json_has_not():
    layer = {"name": "a", "shape": [2, 3], "sparsity": 0.5, "seconds": 1, "estimated_error": "nan"}
    layer |= {"exact_error": "inf", "input_of": None, "statistics": None, "threshold": None, "damping": None}
    layer |= {"tokens": None, "pooled": None, "swaps": 3, "gram_errors": [0.5, "inf"]}
    read = done_of({"done": 1, "layers": [layer], "sparsities": None}).layers[0]
    assert math.isnan(read.estimated_error)
    assert read.exact_error == math.inf
    assert read.shape == (2, 3)
    assert read.gram_errors == [0.5, math.inf]


def test_nameless_activations_leave_nothing(tmp_path):
    files = TwoFiles.beside(tmp_path / "work", tmp_path, nameless=True)
    write_at(files.fd(1), b"abc", 0, "activations")
    assert list(tmp_path.iterdir()) == []
    assert os.pread(files.fd(1), 3, 0) == b"abc"
    files.remove()


def test_a_state_that_is_not_one(unfinished):  # noqa: F811
    for text in ("", "{", "[]", "null", '"x"', "\0" * 100, '{"version": 2}'):
        state_of(unfinished).write_text(text)
        with pytest.raises(ValueError, match=r"state\.json (is damaged|was written by another version).*start anew"):
            stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), resume=True)
    stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), overwrite=True)


def test_a_folder_that_was_taken_away_or_replaced(unfinished):  # noqa: F811
    folder = unfinished / ".out.partial" / "folder"
    folder.rename(unfinished / "taken")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"taken away or replaced since"):
            stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), resume=True)
        shutil.copytree(unfinished / "taken", folder, dirs_exist_ok=True)


def test_shards_that_vanish_or_shrink_between_runs(unfinished, whole):  # noqa: F811
    folder = unfinished / ".out.partial" / "folder"
    first = sorted(folder.glob("*.safetensors"))[1]
    content = first.read_bytes()
    for damage in (lambda: first.unlink(), lambda: first.write_bytes(content[:-4]), lambda: first.write_bytes(b"")):
        damage()
        with pytest.raises(ValueError, match=rf"cannot be gone on with: .*{first.name} (is gone|has \d+ bytes)"):
            stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), resume=True)
        first.write_bytes(content)
    stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), resume=True)
    assert digest(unfinished / "out") == whole


class Damages(EndsAt):
    """Takes a shard away, or cuts it, while the run goes on."""

    def __init__(self, folder: Path, damage) -> None:
        super().__init__(KeyboardInterrupt())
        self.folder, self.damage = folder, damage

    def block(self, name, layers) -> None:
        if name.endswith(".2"):
            self.damage(sorted(self.folder.glob("*.safetensors"))[0])


def cut(path: Path) -> None:
    """It would grow again with the next write, and have the right size."""
    os.truncate(path, 200)


@pytest.mark.parametrize("damage", [Path.unlink, cut])
@pytest.mark.parametrize("shard", ["60KB", "50GB"])
def test_a_shard_that_vanishes_or_shrinks_during_a_run(damage, shard, tmp_path):
    source = save_sharded(tmp_path / "model", num_hidden_layers=BLOCKS, shard=shard)
    folder = tmp_path / ".out.partial" / "folder"
    with pytest.raises(OSError, match=r"was (removed|shortened) while it was written|No such file"):
        stream_prune(source, tmp_path / "out", tiny.ids(), progress=Damages(folder, damage))
    assert not (tmp_path / "out").exists()


def linked(path: Path, victim: Path) -> None:
    path.unlink()
    path.symlink_to(victim)


def hard_linked(path: Path, victim: Path) -> None:
    path.unlink()
    os.link(victim, path)


@pytest.mark.parametrize("link", [linked, hard_linked])
@pytest.mark.parametrize(
    "name", ["state.json", "lock", "folder/shard", "activations", "state.new", "folder/config.json"]
)
def test_no_link_is_written_through(name, link, unfinished, whole, tmp_path):  # noqa: F811
    work = tmp_path / ".out.partial"
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious" * 100_000)
    if name == "folder/shard":
        path = sorted((work / "folder").glob("*.safetensors"))[1]
    elif name == "activations":
        turn = json.loads(state_of(tmp_path).read_text())["activations"]["turn"]
        path = work / f"activations-{turn}.bin"
    else:
        path = work / name
        path.touch()
    link(path, victim)
    for options in ({"resume": True}, {"overwrite": True}):
        said = attempt(tmp_path, **options)
        assert victim.read_bytes() == b"precious" * 100_000
        if not said:
            assert digest(tmp_path / "out") == whole
            break
        assert "link" in said or "plain file" in said
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [".out.partial", ".out.partial/folder"])
def test_a_work_folder_that_is_a_link(name, model, tmp_path):  # noqa: F811
    victim = tmp_path / "victim"
    (victim / "folder").mkdir(parents=True)
    (victim / "folder" / "mine").write_text("keep")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(victim)
    if name == ".out.partial":
        with pytest.raises(OSError, match="is a link, or not a folder of this user's"):
            stream_prune(model, tmp_path / "out", tiny.ids())
    else:
        stream_prune(model, tmp_path / "out", tiny.ids())
    assert (victim / "folder" / "mine").read_text() == "keep"


def test_a_prepared_state_deletes_nothing_elsewhere(model, tmp_path):  # noqa: F811
    (tmp_path / "elsewhere").mkdir()
    for turn in (0, 1):
        (tmp_path / "elsewhere" / f"model-{turn}.bin").write_text("keep")
    (tmp_path / ".out.partial" / "folder").mkdir(parents=True)
    state = {"version": 1, "done": 1, "blocks": 3, "activations": {"file": str(tmp_path / "elsewhere" / "model-0.bin")}}
    state_of(tmp_path).write_text(json.dumps(state))
    stream_prune(model, tmp_path / "out", tiny.ids(), overwrite=True)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


def test_offloaded_activations_are_found_where_they_were_asked_for(model, whole, tmp_path):  # noqa: F811
    (tmp_path / "offload").mkdir()
    options = {"activation_memory": 0, "offload": tmp_path / "offload"}
    with pytest.raises(KeyboardInterrupt):
        stream_prune(model, tmp_path / "out", tiny.ids(), **options, progress=EndsAt(KeyboardInterrupt(), block=2))
    with pytest.raises(ValueError, match=r"option offload was .*offload, now it is None"):
        stream_prune(model, tmp_path / "out", tiny.ids(), activation_memory=0, resume=True)
    stream_prune(model, tmp_path / "out", tiny.ids(), **options, resume=True)
    assert digest(tmp_path / "out") == whole
    assert list((tmp_path / "offload").iterdir()) == []


def test_blocks_that_share_keys_and_values_keep_no_state(tmp_path):
    """Gemma 4: later blocks use what earlier ones left; a run that begins in the middle has none of it."""
    changes = {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 16}
    changes |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "sliding_window": 8}
    changes |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    tiny.model("gemma4_text", **changes).save_pretrained(tmp_path / "model")
    stream_prune(tmp_path / "model", tmp_path / "whole", tiny.ids(), batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        stream_prune(
            tmp_path / "model", tmp_path / "out", tiny.ids(), batch_size=2,
            progress=EndsAt(KeyboardInterrupt(), block=2),
        )  # fmt: skip
    assert describe(tmp_path / "out") is None
    stream_prune(tmp_path / "model", tmp_path / "out", tiny.ids(), batch_size=2, resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
