"""The pruning loop: block by block, statistics before selection, then on with the pruned block's outputs.

Source: Wanda (arXiv 2306.11695), algorithm 1, and its reference loop: all statistics of a block come from the block
before it is pruned, then every linear layer in it is pruned, then it runs again to give the next block's inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Unpack

import torch
from torch import Tensor, nn

from ..distributed import Processes, has_independent_rows, prune_rows_in_shares_
from .activations import Activations
from .blocks import Block, count_zeros, find_blocks, refuse_non_finite
from .exact_error import exact_errors, mean_threshold
from .fusion import Plan, kind_of, observe, plans_from_list, plans_to_list
from .methods.apply import Outcome, prune_layer_
from .methods.inputs import LayerInputs
from .methods.options import OptionArguments
from .methods.owl import Owl, outlier_ratio
from .progress import Progress
from .recording import Call, Recording, record_calls, run_block
from .report import LayerReport, PruningReport, relative_error
from .residence import Residence
from .selection import Pattern, Target
from .statistics import BlockStatistics
from .stopwatch import Stopwatch

PROPAGATE = ("pruned", "dense")

# Tokens a batch: on two CPU cores 1024 was the fastest (512: +25 %, 4096: +50 %, cache); a GPU wants more.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


def prune(
    model: nn.Module,
    input_ids: Tensor | None = None,
    *,
    sparsity: float | None = None,
    pattern: str | Pattern | None = None,
    method: str = "wanda",
    propagate: str = "pruned",
    batch_size: int | None = None,
    exact_error: bool = False,
    fuse_statistics: bool = True,
    processes: Processes | None = None,
    progress: Progress | None = None,
    **options: Unpack[OptionArguments],
) -> PruningReport:
    """Prune the linear layers of a transformers decoder in place.

    Embeddings and ``lm_head`` are never pruned. The model stays on its device and in its dtype.

    Args:
        model: a causal language model of transformers whose blocks hold ``nn.Linear``.
        input_ids: [samples, length], int64: the calibration sequences. Not needed for ``magnitude``.
        sparsity: share of each row to prune, in [0, 1); 0.5 where neither it nor ``pattern`` is given.
        pattern: ``"N:M"``: keep N of every M consecutive inputs.
        method: ``"wanda"`` (``|W| * ||X||_2`` within each row), ``"magnitude"`` (``|W|``, one threshold per
            matrix as in the official code), ``"sparsegpt"`` (blocks of columns, with its weight update), ``"ria"``
            (one threshold per matrix), or an ablation of the official code, ``"ablate_mag_seq"``,
            ``"ablate_wanda_seq"``, ``"ablate_mag_iter"``, ``"ablate_wanda_iter"``: the mask of magnitude or Wanda
            with SparseGPT's update, chosen at once or block of columns by block.
        propagate: ``"pruned"``: each block sees the outputs of the pruned blocks before it, as in the paper;
            ``"dense"``: all statistics come from one forward pass of the dense model, about half the time.
        batch_size: sequences per forward pass; None chooses by device. It does not change the masks where it
            does not change the activations.
        exact_error: also measure each layer's relative output error on the calibration data (a pass more).
        fuse_statistics: let RMSNorm and gated MLPs add up the statistics of what they make, where a fused operator
            gives what they give (on the CPU the same bits; on CUDA to rounding). False: a pass of its own for each
            distinct input.
        processes: that share the work (:mod:`wanda_kernels.distributed`): each calls this with the same arguments
            and has the same pruned model at the end. Not for SparseGPT's Hessians, OWL and ``exact_error``.
        progress: told about each step and block.
        group: (wanda, magnitude, ria, sparsegpt without update) what weights are compared with: ``"row"``,
            ``"layer"``, ``"column"``, or ``"row:N"``, ``"column:N"`` for N neighbours together.
        variant: (wanda) the appendix's variant: rows lose what carries the least of their score.
        weight_update: (sparsegpt) False: prune by its metric and leave the other weights alone.
        block_size: (sparsegpt, ablate) columns in a block, 128.
        damping: (sparsegpt, ablate) of the Hessian, as a share of its mean diagonal, 0.01. Where it cannot be
            factorised, ten times as much; the layer's report says so.
        ria_power: (ria) exponent of the norm, 0.5.
        owl: an :class:`Owl`, or True for its defaults: blocks with more outliers keep more (a dense pass more).

    Returns:
        A :class:`PruningReport`.

    Raises:
        ValueError, TypeError: bad arguments or a model that cannot be pruned, before anything is changed. Inputs
            that hold NaN or inf are found when their block is reached: the blocks before are pruned by then.
    """
    target = Target.resolve(method, sparsity, pattern, **options)
    check_options(propagate, batch_size)
    refuse_in_shares(processes, exact_error, target)
    blocks = find_blocks(model)
    for block in blocks:
        for name, linear in block.linears.items():
            target.check(f"{block.name}.{name}", linear.weight)
    refuse_non_finite(blocks)
    device = next(iter(blocks[0].linears.values())).weight.device
    run = Run(target, Stopwatch(device), progress or Progress(), processes=processes)
    with torch.no_grad(), evaluating(model):
        if not target.needs_calibration:
            run.without_calibration(blocks)
            samples, length = 0, 0
        else:
            input_ids = check_input_ids(model, input_ids, target)
            samples, length = input_ids.shape
            batches = input_ids.to(device).split(batch_size or default_batch_size(device, length))
            run.with_calibration(model, blocks, list(batches), propagate, exact_error, fuse_statistics)
    return PruningReport(
        method=method,
        sparsity=target.sparsity,
        pattern=str(target.pattern) if target.pattern else None,
        propagate=propagate,
        samples=samples,
        length=length,
        options=target.options.to_dict(),
        layers=run.layers,
        seconds=run.stopwatch.seconds(),
    )


def check_options(propagate: str, batch_size: int | None) -> None:
    """Raises ValueError for options that fit no model."""
    if propagate not in PROPAGATE:
        raise ValueError(f"propagate must be one of {', '.join(PROPAGATE)}, got '{propagate}'")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def refuse_in_shares(processes: Processes | None, exact_error: bool, target: Target) -> None:
    """Raises ValueError for what several processes do not do."""
    if processes is None or processes.size == 1:
        return
    refused = {"exact_error": exact_error, "owl": target.options.owl, f"method '{target.method}'": target.needs_hessian}
    for name, wanted in refused.items():
        if wanted:
            raise ValueError(f"{name} is for one process, there are {processes.size}")


def default_batch_size(device: torch.device, length: int) -> int:
    """Sequences a forward pass."""
    return max(1, BATCH_TOKENS.get(device.type, 1024) // length)


def check_input_ids(model: nn.Module, input_ids: Tensor | None, target: Target) -> Tensor:
    if input_ids is None:
        owl = " with owl" if target.options.owl else ""
        raise ValueError(f"method '{target.method}'{owl} needs input_ids: [samples, length], int64")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64, got {input_ids.dtype}")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be [samples, length] and not empty, got {list(input_ids.shape)}")
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"input_ids must be in [0, {vocabulary}), the model's vocabulary, got values from {low} to {high}"
        )
    return input_ids.long()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off while pruning; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Run:
    """One pruning run: what is pruned how, where the weights are, the seconds so far, the layers so far.

    A run that goes on where another one ended has its ``layers`` and ``plans``, and begins at block ``first``.
    """

    def __init__(
        self,
        target: Target,
        stopwatch: Stopwatch,
        progress: Progress,
        residence: Residence | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.target = target
        self.stopwatch = stopwatch
        self.progress = progress
        self.residence = residence or Residence()
        self.processes = processes
        self.first = 0
        self.samples = [range(0)]  # of each process
        self.layers: list[LayerReport] = []
        self.plans: dict[tuple, Plan] = {}  # by the kind of block

    def without_calibration(self, blocks: list[Block]) -> None:
        self.progress.start(len(blocks) - self.first)
        for index, block in list(enumerate(blocks))[self.first :]:
            with self.residence.holding(index):
                self.prune_block(block, self.target, None, None)
            self.residence.finished(index, self, None)
            self.progress.advance()

    def with_calibration(
        self,
        model: nn.Module,
        blocks: list[Block],
        batches: list[Tensor],
        propagate: str,
        exact_error: bool,
        fuse_statistics: bool,
        hidden: Activations | None = None,
    ) -> None:
        """``batches`` of input ids. ``hidden``: where activations go; where ``first`` is not 0, block ``first``'s."""
        if hidden is None:
            hidden = Activations(keep=exact_error and propagate == "dense")
        batches = self.share(batches)
        with self.stopwatch.measure("forward"):
            recording = record_calls(model, blocks, batches, hidden.append if self.first == 0 else lambda _: None)
        owl = self.target.options.owl
        targets = [self.target] * len(blocks)
        self.progress.start(self._steps(len(blocks) - self.first, len(batches), propagate, exact_error))
        if owl:
            targets = self.owl_targets(owl, blocks, hidden, recording, fuse_statistics)
        for index, block in list(enumerate(blocks))[self.first :]:
            calls = recording.calls[index]
            last = index == len(blocks) - 1
            with self.residence.holding(index):
                self.work_on(block, targets[index], hidden, calls, propagate, last, exact_error, fuse_statistics)
            if not last:
                hidden.flip()
            calls.clear()
            self.residence.finished(index, self, hidden)

    def share(self, batches: list[Tensor]) -> list[Tensor]:
        """This process's of all ``batches``. Batches stay whole, so that activations do not depend on the number of
        processes."""
        begins = [0, *itertools.accumulate(len(batch) for batch in batches)]
        if self.processes is None:
            self.samples = [range(begins[-1])]
            return batches
        mine = self.processes.my_share(len(batches), "batches of sequences (see --batch-size)")
        self.samples = [range(begins[s.start], begins[s.stop]) for s in self.processes.shares(len(batches))]
        return batches[mine.start : mine.stop]

    def plan(self, block: Block, hidden: Activations, calls: list[Call], fuse_statistics: bool) -> Plan:
        """The plan for blocks of this kind; the first process's where there are several."""
        kind = kind_of(block)
        if kind not in self.plans:
            with self.stopwatch.measure("forward"):
                self.plans[kind] = observe(block, hidden[0], calls[0], fuse_statistics)
            if self.processes is not None:
                agreed = self.processes.agree_on(plans_to_list({kind: self.plans[kind]}))
                self.plans |= plans_from_list(agreed, [kind])
        return self.plans[kind]

    def _steps(self, blocks: int, batches: int, propagate: str, exact_error: bool) -> int:
        passes = blocks * (2 if propagate == "pruned" else 1) - (propagate == "pruned")
        passes += blocks if self.target.options.owl else 0
        return batches * (passes + exact_error * blocks)

    def statistics_of(
        self, block: Block, hidden: Activations, calls: list[Call], fuse_statistics: bool, hessians: bool
    ) -> BlockStatistics:
        plan = self.plan(block, hidden, calls, fuse_statistics)
        return BlockStatistics(block, self.samples[-1].stop, plan, self.stopwatch, hessians)

    def work_on(
        self,
        block: Block,
        target: Target,
        hidden: Activations,
        calls: list[Call],
        propagate: str,
        last: bool,
        exact_error: bool,
        fuse_statistics: bool,
    ) -> None:
        """Statistics, selection, and the next block's inputs."""
        statistics = self.statistics_of(block, hidden, calls, fuse_statistics, self.target.needs_hessian)
        self.collect(statistics, hidden, calls, whole=propagate == "dense" and not last)
        if self.processes is not None:
            statistics.exchange(self.processes, self.samples)
        dense = {n: linear.weight.clone() for n, linear in block.linears.items()} if exact_error else {}
        inputs = statistics.inputs()
        self.prune_block(block, target, inputs, statistics)
        if exact_error:
            self.measure_errors(block, hidden, calls, dense, inputs)
        if propagate == "pruned" and not last:
            self.advance_hidden(block, hidden, calls)

    def owl_targets(
        self, owl: Owl, blocks: list[Block], hidden: Activations, recording: Recording, fuse_statistics: bool
    ) -> list[Target]:
        """A pass of the dense model over all blocks, and the target that its outliers give each of them."""
        passing = Activations()
        for batch in hidden:
            passing.append(batch)
        ratios = []
        for block, calls in zip(blocks, recording.calls, strict=True):
            statistics = self.statistics_of(block, passing, calls, fuse_statistics, hessians=False)
            last = block is blocks[-1]
            self.collect(statistics, passing, calls, whole=not last)
            weights = {name: linear.weight.data for name, linear in block.linears.items()}
            with self.stopwatch.measure("selection"):
                ratios.append(outlier_ratio(weights, statistics.inputs(), owl.outlier))
            if not last:
                passing.flip()
        shares = owl.sparsities(ratios, self.target.sparsity)
        return [dataclasses.replace(self.target, sparsity=share) for share in shares]

    def collect(self, statistics: BlockStatistics, hidden: Activations, calls: list[Call], whole: bool) -> None:
        """All statistics of a block; where it runs ``whole``, its outputs are the next block's inputs."""
        sample = self.samples[0 if self.processes is None else self.processes.rank].start
        for batch, call in enumerate(calls):
            x = hidden[batch]
            with self.stopwatch.measure("forward"):
                output = statistics.run(x, call, sample, whole)
            if output is not None:
                hidden[batch] = output
            sample += x.shape[0]
            self.progress.advance()

    def advance_hidden(self, block: Block, hidden: Activations, calls: list[Call]) -> None:
        for batch, call in enumerate(calls):
            with self.stopwatch.measure("forward"):
                hidden[batch] = run_block(block, hidden[batch], call)
            self.progress.advance()

    def measure_errors(
        self,
        block: Block,
        hidden: Activations,
        calls: list[Call],
        dense: dict[str, Tensor],
        inputs: dict[str, LayerInputs],
    ) -> None:
        with self.stopwatch.measure("exact error"):
            errors = exact_errors(block, hidden, calls, dense, self.progress)
        for layer in self.layers[-len(errors) :]:
            name = layer.name.removeprefix(f"{block.name}.")
            layer.exact_error = errors[name]
            layer.threshold = mean_threshold(dense[name], block.linears[name].weight.data, inputs[name].norm)

    def prune_weight(self, weight: Tensor, inputs: LayerInputs | None, target: Target) -> Outcome:
        if self.processes is None or not has_independent_rows(target):
            return prune_layer_(weight, inputs, target)
        return prune_rows_in_shares_(weight, None if inputs is None else inputs.norm, target, self.processes)

    def prune_block(
        self,
        block: Block,
        target: Target,
        inputs: dict[str, LayerInputs] | None,
        statistics: BlockStatistics | None,
    ) -> None:
        reports = []
        for name, linear in block.linears.items():
            weight = linear.weight.data
            start = time.perf_counter()
            with self.stopwatch.measure("selection"):
                outcome = self.prune_weight(weight, None if inputs is None else inputs[name], target)
                zeros = count_zeros(weight)
            reports.append(
                LayerReport(
                    name=f"{block.name}.{name}",
                    shape=(weight.shape[0], weight.shape[1]),
                    sparsity=zeros / max(1, weight.numel()),
                    seconds=time.perf_counter() - start,
                    estimated_error=relative_error(outcome.pruned, outcome.total),
                    input_of=None if statistics is None else f"{block.name}.{statistics.source[name]}",
                    statistics=None if statistics is None else statistics.path(name),
                    damping=outcome.damping,
                )
            )
        self.layers += reports
        self.progress.block(block.name, reports)
