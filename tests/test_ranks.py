"""Several processes on the command line: what differs between them is refused by name; one that is gone ends all."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import saved
import streaming_child
import tiny
from test_streaming import one_thread, save_sharded  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("one_thread")
TOLD_S = 30.0


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_sharded(folder / "model")
    tiny.model(num_hidden_layers=2).save_pretrained(folder / "smaller")
    saved.tokenizer().save_pretrained(folder / "smaller")
    (folder / "text.txt").write_text(saved.text(3000))
    (folder / "other.txt").write_text(saved.text(3000, seed=1))
    return folder


class Ranks:
    """Commands that find each other as those of torchrun do. ``arguments``: of each."""

    def __init__(self, folder: Path, arguments: list[list]) -> None:
        port = streaming_child.free_port()
        self.said = [folder / f"said{rank}" for rank in range(len(arguments))]
        common = {"WORLD_SIZE": str(len(arguments)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= {"WANDA_KERNELS_START_S": "8"}  # less than by default: tests wait for it
        self.processes = [
            streaming_child.start_command(
                ["prune", *mine], self.said[rank], variables=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank, mine in enumerate(arguments)
        ]

    def finish(self) -> list[int | None]:
        """Exit codes; within the time that a loss may take."""
        end = time.monotonic() + TOLD_S
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hanging:
            self.processes[rank].kill()
        assert not hanging, f"ranks {hanging} went on for {TOLD_S:.0f} s"
        return [process.exitcode for process in self.processes]

    def error(self, rank: int) -> str:
        said = self.said[rank].read_text() if self.said[rank].exists() else ""  # killed before it spoke
        lines = [line for line in said.splitlines() if line.startswith("wanda-kernels: error: ")]
        return lines[-1] if lines else ""


def command(work: Path, out: Path, *more, model: str = "model", text: str = "text.txt", **changed) -> list:
    options = {"samples": 8, "length": 32, "batch_size": 1} | changed
    flat = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    return [work / model, "--out", out, "--calibration", work / text, *flat, *more]


MISMATCHES = {
    "MODEL": {"model": "smaller"}, "calibration": {"text": "other.txt"}, "seed": {"seed": 7}, "samples": {"samples": 9},
    "length": {"length": 24}, "sparsity": {"sparsity": 0.7}, "pattern": {"pattern": "2:4"}, "method": {"method": "ria"},
    "propagate": {"propagate": "dense"}, "batch_size": {"batch_size": 2}, "fuse_statistics": ("--no-fuse",),
    "stream": ("--stream",), "dtype": {"dtype": "bfloat16"}, "compress": ("--compress",), "group": {"group": "row"},
    "update": ("--update",),
}  # fmt: skip


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_differs_is_refused_by_name_on_every_rank(name, work, tmp_path):
    other = MISMATCHES[name]
    out = tmp_path / "out"
    second = command(work, out, **other) if isinstance(other, dict) else command(work, out, *other)
    ranks = Ranks(tmp_path, [command(work, out), second])
    assert ranks.finish() == [1, 1]
    for rank in (0, 1):
        assert f"rank {rank}: all processes must be given the same, but {name}: rank 0 has" in ranks.error(rank)
    assert {path.name for path in tmp_path.iterdir()} == {"said0", "said1"}


def test_another_output_is_refused(work, tmp_path):
    ranks = Ranks(tmp_path, [command(work, tmp_path / "a"), command(work, tmp_path / "b")])
    assert ranks.finish() == [1, 1]
    assert "but out: rank 0 has" in ranks.error(1)


@pytest.mark.slow
def test_one_that_never_comes_is_named(work, tmp_path, monkeypatch):
    port = streaming_child.free_port()
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WANDA_KERNELS_START_S": "2"}
    for rank in (0, 1):
        said = tmp_path / f"said{rank}"
        words = ["prune", *command(work, tmp_path / "out")]
        alone = streaming_child.start_command(words, said, variables=variables | {"RANK": str(rank)})
        alone.join(TOLD_S)
        assert alone.exitcode == 1
        assert "did not come in time (WANDA_KERNELS_START_S" in said.read_text()


# From the first import to the saving; the last are too late for most runs.
MOMENTS = {signal.SIGKILL: (0.0, 0.4, 0.8, 1.2, 2.0), signal.SIGTERM: (0.2, 0.9)}


@pytest.mark.slow
@pytest.mark.parametrize("sent", MOMENTS)
def test_one_that_is_killed_ends_the_others(sent, work, tmp_path):
    """Rank 1 and rank 0, which writes, in turns, with and without ``--stream``."""
    for number, moment in enumerate(MOMENTS[sent]):
        victim = (number + 1) % 2
        folder = tmp_path / f"{number}"
        folder.mkdir()
        more = ("--stream",) if number // 2 % 2 else ()
        ranks = Ranks(folder, [command(work, folder / "out", *more, samples=60) for _ in range(3)])
        time.sleep(moment)
        if ranks.processes[victim].is_alive():
            os.kill(ranks.processes[victim].pid or 0, sent)
        codes = ranks.finish()
        if codes[victim] == 0:  # too late
            assert codes == [0, 0, 0]
        if not (folder / "out").exists():
            assert all(codes), codes
            for other in {0, 1, 2} - {victim}:
                assert ranks.error(other), f"rank {other}: {codes}, {ranks.said[other].read_text()}"
