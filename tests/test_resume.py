"""A streamed run that ended early goes on to the same files; what it may not go on with is refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import streaming_child
import tiny
from safetensors.torch import load_file, save_file
from strategies import MORE
from test_streaming import one_thread, save_sharded  # noqa: F401  (a fixture)

from wanda_kernels.pruning.report import Progress
from wanda_kernels.streaming import stream_prune
from wanda_kernels.streaming.run import describe
from wanda_kernels.streaming.workfolder import WorkFolder

BLOCKS = 5


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_sharded(tmp_path_factory.mktemp("resume") / "model", num_hidden_layers=BLOCKS)


class EndsAt(Progress):
    """Ends a run with ``error`` at a step, or once a block is pruned."""

    def __init__(self, error: BaseException, step: int | None = None, block: int | None = None) -> None:
        self.error, self.step, self.at_block = error, step, block

    def advance(self) -> None:
        if self.step is not None:
            self.step -= 1
            if self.step < 0:
                raise self.error

    def block(self, name, layers) -> None:
        if self.at_block is not None and name.endswith(f".{self.at_block}"):
            raise self.error


RUNS = [
    {},
    {"pattern": "2:4", "propagate": "dense", "batch_size": 2},
    {"activation_memory": 0, "batch_size": 2},
    {"activation_memory": 0, "propagate": "dense", "batch_size": 2},
    {"exact_error": True, "propagate": "dense"},
    {"method": "magnitude"},
    {"owl": True, "sparsity": 0.6, "batch_size": 2},
    {"refine": True, "update": True, "update_steps": 3},
    {"values": "int4", "group_size": 64},
]


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_goes_on_to_the_same_files(options, model, tmp_path):
    ids = None if options.get("method") == "magnitude" else tiny.ids()
    stream_prune(model, tmp_path / "whole", ids, **options)
    out = tmp_path / "out"
    for block, error in [(1, KeyboardInterrupt()), (2, OSError("no space left")), (4, RuntimeError("out of memory"))]:
        with pytest.raises(type(error)):
            stream_prune(model, out, ids, **options, resume=True, progress=EndsAt(error, block=block))
        assert f"{block} of {BLOCKS} blocks done" in describe(out)
        assert not out.exists()
    report = stream_prune(model, out, ids, **options, resume=True)
    assert len(report.layers) == 7 * BLOCKS
    assert digest(out) == digest(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("step", range(0, 27, 2))
def test_an_end_in_the_middle_of_a_pass_over_spilled_activations(step, model, tmp_path):
    """3 batches, 27 steps: also between the first and the last batch of the next block's inputs."""
    options = {"activation_memory": 0, "batch_size": 2}
    stream_prune(model, tmp_path / "whole", tiny.ids(), **options)
    with pytest.raises(KeyboardInterrupt):
        stream_prune(model, tmp_path / "out", tiny.ids(), **options, progress=EndsAt(KeyboardInterrupt(), step))
    stream_prune(model, tmp_path / "out", tiny.ids(), **options, resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_it_ends_before_the_first_block_and_leaves_nothing(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stream_prune(model, tmp_path / "out", tiny.ids(), progress=EndsAt(KeyboardInterrupt(), 0))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def unfinished(model, tmp_path) -> Path:
    """A copy of the model, and ``out`` beside it with two blocks done."""
    shutil.copytree(model, tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        stream_prune(tmp_path / "model", tmp_path / "out", tiny.ids(), progress=EndsAt(KeyboardInterrupt(), block=2))
    return tmp_path


def test_without_resume_it_is_refused_or_begun_anew(unfinished):
    with pytest.raises(
        FileExistsError, match="2 of 5 blocks done: pass resume=True to go on, or overwrite=True to start"
    ):
        stream_prune(unfinished / "model", unfinished / "out", tiny.ids())
    stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), sparsity=0.7, overwrite=True)
    assert json.loads((unfinished / "out" / "pruning_report.json").read_text())["sparsity"] == 0.7
    assert sorted(path.name for path in unfinished.iterdir()) == ["model", "out"]


CHANGES = [
    ({"sparsity": 0.7}, r"option sparsity was 0\.5, now it is 0\.7"),
    ({"pattern": "2:4"}, "option pattern was None, now it is 2:4"),
    ({"method": "magnitude"}, "option method was wanda, now it is magnitude"),
    ({"propagate": "dense", "batch_size": 1}, "propagate was pruned, now it is dense; option batch_size was 42, now"),
    ({"refine": True}, r"option refine was False, now it is True; option refine_damping was None, now it is 0\.3"),
    (
        {"update": True, "update_steps": 7},
        r"option update_damping was None, now it is 0\.3; option update_steps was None, now it is 7",
    ),
    ({"input_ids": tiny.ids(4)}, r"calibration shape was \[5, 24\], now it is \[4, 24\]"),
    ({"input_ids": tiny.ids() % 100 + 3}, "calibration tokens was"),
]


@pytest.mark.parametrize(("changed", "message"), CHANGES, ids=lambda value: str(value)[:30])
def test_changed_options_are_refused_by_name_and_the_state_stays(changed, message, unfinished):
    with pytest.raises(ValueError, match=message):
        stream_prune(unfinished / "model", unfinished / "out", **{"input_ids": tiny.ids(), "resume": True} | changed)
    assert "2 of 5 blocks done" in describe(unfinished / "out")


def test_a_changed_model_is_refused_by_name(unfinished):
    path = next(p for p in (unfinished / "model").glob("*.safetensors") if "model.norm.weight" in load_file(p))
    held = load_file(path)
    held["model.norm.weight"] += 1
    save_file(held, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"was another one: model tensor model\.norm\.weight was"):
        stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), resume=True)
    config = unfinished / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 5.0}))
    with pytest.raises(ValueError, match=r"model config\.json was"):
        stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), resume=True)


def test_a_damaged_state_is_refused(unfinished):
    (unfinished / ".out.partial" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json is damaged: .* to start anew"):
        stream_prune(unfinished / "model", unfinished / "out", tiny.ids(), resume=True)


def test_two_runs_do_not_write_to_one_folder(model, tmp_path):
    work = WorkFolder(tmp_path / "out")
    with pytest.raises(RuntimeError, match=f"out is being written by process {os.getpid()}"):
        stream_prune(model, tmp_path / "out", tiny.ids(), overwrite=True)
    work.remove()
    stream_prune(model, tmp_path / "out", tiny.ids())


@pytest.fixture
def in_memory(tmp_path) -> Iterator[Path]:
    """A folder on a file system in memory, where there is one: each state waits for the disk a few times."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else tmp_path))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"batch_size": 3}, {"batch_size": 3, "activation_memory": 0, "propagate": "dense"}], ids=str
)
def test_killed_at_random_points(options, in_memory):
    """SIGKILL at eight random moments of a run, and once more in the run that goes on: the same files at the end.
    `make soak` kills at ten times as many."""
    tmp_path = in_memory
    model = save_sharded(tmp_path / "model", num_hidden_layers=6)
    streaming_child.start(model, tmp_path / "warm", **options).join()
    begun = time.perf_counter()
    streaming_child.start(model, tmp_path / "whole", **options).join()
    whole = time.perf_counter() - begun
    draw = random.Random(0)
    killed = done = 0
    while killed < 8 * MORE:
        out = tmp_path / f"out{killed}"
        for resume in (False, True):
            process = streaming_child.start(model, out, **options, resume=resume)
            if killed % 2:  # at any moment, or at any moment after the first state
                while describe(out) is None and process.is_alive():
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, whole / 2))
            else:
                time.sleep(draw.uniform(0, whole))
            process.kill()
            process.join()
            if out.exists():  # too late
                break
            done += describe(out) is not None
        if out.exists():
            assert digest(out) == digest(tmp_path / "whole")
            shutil.rmtree(out)
            continue
        killed += 1
        last = streaming_child.start(model, out, **options, resume=True)
        last.join()
        assert last.exitcode == 0
        assert digest(out) == digest(tmp_path / "whole")
    assert done > 2 * MORE  # most kills came after a state was written
    assert not list(tmp_path.glob(".*"))


def test_killed_once(model, tmp_path):
    process = streaming_child.start(model, tmp_path / "out", batch_size=1)
    while describe(tmp_path / "out") is None and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    stream_prune(model, tmp_path / "out", tiny.ids(), batch_size=1, resume=True)
    stream_prune(model, tmp_path / "whole", tiny.ids(), batch_size=1)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_an_output_that_is_a_link_has_one_work_folder(model, tmp_path):
    """The command line and the run look at the same one."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/out")
    with pytest.raises(OSError, match="full"):
        stream_prune(model, tmp_path / "link", tiny.ids(), progress=EndsAt(OSError("full"), 2))
    assert describe(tmp_path / "link") == describe(tmp_path / "real" / "out")
    assert "holds an unfinished run" in (describe(tmp_path / "link") or "")
