"""Prunes a checkpoint that need not fit in memory, from folder to folder, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from .._words import to_json
from ..distributed import Processes
from ..models.checkpoint import Checkpoint
from ..models.load import choose_device
from ..models.placement import Placement
from ..models.save import DROP_REPORT, REPORT, check_bytes, check_output
from ..packed.model import Packing
from ..pruning.blocks import Block, find_blocks, matrices_of
from ..pruning.driver import check_blocks, check_input_ids
from ..pruning.loop import Loop, default_batch_size
from ..pruning.report import Progress, PruningReport
from ..pruning.source import Done
from ..pruning.spec import PruneSpec, SpecArguments
from ..pruning.stopwatch import Stopwatch
from .activations import FiledActivations, SavedActivations, SpilledActivations, Stored, TwoFiles
from .blocks import Commit, StreamedBlocks
from .output import Output, PackedShards, SameFiles, copy_files
from .skeleton import build, refuse_other_dtypes
from .workfolder import WorkFolder, done_of, identity, path_for, read_state, refuse_other_run

ACTIVATION_MEMORY = 4 * 2**30


def stream_prune(
    model: str | Path,
    out: str | Path,
    input_ids: Tensor | None = None,
    *,
    spec: PruneSpec | None = None,
    dtype: str = "auto",
    device: str = "auto",
    offload: str | Path | None = None,
    activation_memory: int = ACTIVATION_MEMORY,
    resume: bool = False,
    overwrite: bool = False,
    tokenizer: Any = None,
    packing: Packing | None = None,
    keep_reports: bool = False,
    processes: Processes | None = None,
    progress: Progress | None = None,
    **arguments: Unpack[SpecArguments],
) -> PruningReport:
    """Prune a safetensors checkpoint to another folder with two blocks in memory.

    The pruned tensors are, bit for bit, those of :func:`wanda_kernels.prune`; the others are copied byte for byte.
    The output has the input's files, but with ``packing``: same shards, same index, same names and shapes. After each
    block the state is kept in ``.OUT.partial`` beside ``out``; a run that ended there goes on with ``resume``, to the
    same files.

    Args:
        model: a folder with config.json and ``model.safetensors``, or shards and their index.
        out: folder to write, whole or not at all.
        input_ids, spec, arguments, processes, progress: as for :func:`wanda_kernels.prune`. The first of several
            processes writes; none keeps a state.
        dtype: ``auto``, or the checkpoint's own.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        offload: folder for activations; beside ``out`` if None.
        activation_memory: bytes that the activations may take in memory; beyond, one batch at a time is in memory.
        resume: go on with the run that ended before its end, if there is one.
        overwrite: replace ``out``, and what an unfinished run left.
        tokenizer: saved with the model.
        packing: a :class:`wanda_kernels.packed.Packing`: also pack the weights of each block when it is pruned, as
            :func:`wanda_kernels.compress` does in memory, bit for bit. Then the output has a shard for each block, with
            the names that ``save_pretrained`` gives a packed model, and all is in the model's dtype.
        keep_reports: what pruning said of ``model`` goes with it, in place of what this run says.

    Returns:
        A :class:`PruningReport`; its ``packed`` is a :class:`wanda_kernels.packed.PackedReport` of what was packed.

    Raises:
        ValueError, TypeError: bad arguments, a model that cannot be streamed or pruned, the state of another run.
        FileExistsError: ``out``, or an unfinished run, is there. RuntimeError: another process writes to ``out``.
        OSError: reading or writing failed; the state is kept.
    """
    model, out = Path(model).expanduser(), Path(out)
    spec = PruneSpec.of(spec, arguments)
    if packing is not None:
        packing.check_chosen(spec.values)
    alone = processes is None or processes.size == 1
    if resume and not alone:
        raise ValueError("resuming is for one process: several keep no state")
    out = out.resolve() if out.is_symlink() else out
    check_leftovers(out, resume, overwrite, model)
    if offload is not None and not Path(offload).is_dir():
        raise NotADirectoryError(f"offload {offload} is no folder")
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"model folder {model} holds no config.json: only folders can be streamed")
    place = choose_device(device)
    checkpoint = Checkpoint(model)
    skeleton, placement = build(model, checkpoint, dtype)
    blocks = find_blocks(skeleton, meta=True)
    check_blocks(blocks, spec)
    refuse_other_dtypes(blocks, placement)
    ids = check_input_ids(skeleton, input_ids, spec)
    if ids is not None and spec.batch_size is None:  # what a run begins with decides
        spec = spec.with_batch_size(default_batch_size(place, ids.shape[1]))
    job = _Job(
        spec, skeleton, blocks, placement, ids, place, activation_memory, packing, processes, progress or Progress()
    )
    begun_with = identity(spec.to_dict(), ids, checkpoint, place)
    if processes is not None:
        processes.refuse_differences(begun_with)
    begun_with["option"]["packing"] = None if packing is None else asdict(packing)
    begun_with["option"]["offload"] = None if offload is None else str(Path(offload).resolve())
    if processes is None or processes.is_first:
        with _work_folder(out, job, resume, begun_with, offload) as (work, state, output):

            def commit(done: dict[str, Any]) -> None:
                work.commit({"begun_with": begun_with, "blocks": len(blocks)} | done)

            report = job.work_through(state, work.files, output, commit if alone else None)
            output.add_small_files()
            if tokenizer is not None:
                tokenizer.save_pretrained(work.folder)
            if keep_reports:
                copy_files((REPORT, DROP_REPORT), checkpoint.folder, work.folder)
            else:  # without the seconds, so that the same command gives the same bytes
                (work.folder / REPORT).write_text(to_json(report.to_dict(seconds=False)))
            work.publish(overwrite)
        return report
    own = path_for(out).with_suffix(f".rank{processes.rank}")
    files = TwoFiles.beside(own, offload or out.parent, nameless=True)
    try:
        return job.work_through(None, files, None, None)
    finally:
        files.remove()


@dataclass
class _Job:
    """What is pruned, and how."""

    spec: PruneSpec
    skeleton: Any
    blocks: list[Block]
    placement: Placement
    ids: Tensor | None
    device: torch.device
    activation_memory: int
    packing: Packing | None
    processes: Processes | None
    progress: Progress

    def output_to(self, work: WorkFolder) -> Output:
        if self.packing is None:
            return SameFiles(work.folder, self.blocks, self.placement)
        shard = work.path / "shard"
        return PackedShards(work.folder, shard, self.skeleton, self.blocks, self.placement, self.packing)

    def work_through(
        self, state: dict[str, Any] | None, files: TwoFiles, output: Output | None, commit: Commit | None
    ) -> PruningReport:
        """All blocks that ``state`` does not have, to ``output``."""
        stopwatch = Stopwatch(self.device)
        source = StreamedBlocks(self.skeleton, self.blocks, self.placement, output, commit, self.device, stopwatch)
        try:
            done, stored = _go_on_from(state)
            hidden = None
            if self.ids is not None:
                hidden = self._activations(self.ids, files, source)
                if stored is not None:
                    hidden.restore(stored)
            loop = Loop(self.spec, self.skeleton, source, self.device, stopwatch, self.progress, self.processes, done)
            loop.run(self.ids, hidden)
            source.finish()
            report = loop.report()
            if output is not None:
                output.check_whole()
                report.packed = output.report
            return report
        finally:
            source.close()
            files.close()
            self.placement.checkpoint.close()
            if output is not None:
                output.close()

    def check_state(self, state: dict[str, Any], output: Output, files: TwoFiles) -> None:
        """Raises ValueError where ``state`` cannot be gone on from: another model's, or not what the files hold."""
        if state["blocks"] != len(self.blocks):
            raise ValueError(f"it is of {state['blocks']} blocks, the model has {len(self.blocks)}")
        done, stored = _go_on_from(state)
        blocks = self.blocks[: done.blocks]
        layers = {name: tuple(matrix.weight.shape) for name, matrix in matrices_of(blocks).items()}
        reported = {layer.name: layer.shape for layer in done.layers}
        known = [name for name in layers if name in reported]  # no input came to the others: they stayed dense
        silent = [block.name for block in blocks if not any(name.startswith(f"{block.name}.") for name in known)]
        if silent or list(reported) != known or any(layers[name] != reported[name] for name in known):
            raise ValueError(f"it reports on {len(done.layers)} layers, {len(layers)} are done, or on others")
        if (None if done.sparsities is None else len(done.sparsities)) != (len(self.blocks) if self.spec.owl else None):
            raise ValueError(f"it has the sparsities {str(done.sparsities)[:100]}")
        if (stored is None) != (self.ids is None or done.blocks == len(self.blocks)):
            raise ValueError("its activations do not fit the number of blocks that are done")
        if stored is not None:
            assert self.ids is not None
            assert self.spec.batch_size is not None
            stored.check(done.blocks, self.ids.split(self.spec.batch_size), self.skeleton.dtype)
            files.check(stored)
        output.restore(done.blocks, state["packed"])

    def _activations(self, ids: Tensor, files: TwoFiles, source: StreamedBlocks) -> FiledActivations:
        width = self.skeleton.config.get_text_config().hidden_size
        ranks = 1 if self.processes is None else self.processes.size
        if ids.numel() * width * self.skeleton.dtype.itemsize // ranks > self.activation_memory:
            return SpilledActivations(files, source.wait, self.device)
        keep = self.spec.exact_error and self.spec.propagate == "dense"
        return SavedActivations(files, source.wait, self.device, keep)


def _go_on_from(state: dict[str, Any] | None) -> tuple[Done, Stored | None]:
    if state is None:
        return Done(), None
    return done_of(state), None if state["activations"] is None else Stored.from_dict(state["activations"])


def check_leftovers(out: Path, resume: bool, overwrite: bool, source: str | Path | None = None) -> None:
    """Raises FileExistsError where ``out`` may not be written, or an unfinished run to it is there and neither
    ``resume`` nor ``overwrite`` says what to do with it. ``source``: the model."""
    check_output(out, overwrite, source)
    if overwrite and not resume:
        return
    if read_state(out) is not None and not resume:
        raise FileExistsError(f"{describe(out)}: pass resume=True to go on, or overwrite=True to start anew")


def describe(out: Path) -> str | None:
    """What an unfinished run to ``out`` left, in words; None if nothing that can be gone on with."""
    try:
        state = read_state(out)
    except (ValueError, OSError):
        return None
    if state is None:
        return None
    return f"{path_for(out)} holds an unfinished run, {state['done']} of {state['blocks']} blocks done"


@contextmanager
def _work_folder(
    out: Path, job: _Job, resume: bool, begun_with: dict[str, Any], offload: str | Path | None
) -> Iterator[tuple[WorkFolder, dict[str, Any] | None, Output]]:
    """The folder, the state to go on from, and where the weights go. What is worth going on with stays there after an
    error."""
    work = WorkFolder(out, offload)
    try:
        output = job.output_to(work)
        state = read_state(out) if resume else None
        if state is not None:
            refuse_other_run(state["begun_with"], begun_with, out)
            try:
                job.check_state(state, output, work.files)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"the unfinished run to {out} cannot be gone on with: {error}; pass overwrite=True "
                    "without resume=True to start anew"
                ) from error
            work.keep_only(output.files(state["done"]))
        there = sum(path.stat().st_size for path in work.folder.iterdir()) if state is not None else 0
        check_bytes(work.path, output.size - there)
    except BaseException:
        _leave(work)
        raise
    if state is None:
        work.begin()
    try:
        yield work, state, output
    except (ValueError, TypeError):  # of the input: it would end the same way again
        work.remove()
        raise
    except BaseException:
        _leave(work)
        raise


def _leave(work: WorkFolder) -> None:
    """What is there stays where there is something to go on with, or to look at."""
    try:
        is_empty = read_state(work.out) is None
    except (ValueError, OSError):  # damaged: told where it is read to be gone on with
        is_empty = False
    work.remove() if is_empty else work.release()
