"""The pruning loop: block by block, statistics before selection, then on with the pruned block's outputs.

Source: Wanda (arXiv 2306.11695), algorithm 1, and its reference loop: all statistics of a block come from the block
before it is pruned, then every linear layer in it is pruned, then it runs again to give the next block's inputs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Unpack

import torch
from torch import Tensor, nn

from .blocks import Block, find_blocks, refuse_non_finite
from .exact_error import exact_errors, mean_threshold
from .fusion import Plan, kind_of, observe
from .methods.apply import prune_layer_
from .methods.inputs import LayerInputs
from .methods.options import OptionArguments
from .methods.owl import Owl, outlier_ratio
from .progress import Progress
from .recording import Call, Recording, record_calls, run_block
from .report import LayerReport, PruningReport, relative_error
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
    if propagate not in PROPAGATE:
        raise ValueError(f"propagate must be one of {', '.join(PROPAGATE)}, got '{propagate}'")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    blocks = find_blocks(model)
    for block in blocks:
        for name, linear in block.linears.items():
            target.check(f"{block.name}.{name}", linear.weight)
    refuse_non_finite(blocks)
    device = next(iter(blocks[0].linears.values())).weight.device
    run = _Run(target, Stopwatch(device), progress or Progress())
    with torch.no_grad(), _evaluating(model):
        if not target.needs_calibration:
            run.without_calibration(blocks)
            samples, length = 0, 0
        else:
            input_ids = _check_input_ids(model, input_ids, target)
            samples, length = input_ids.shape
            size = batch_size or max(1, BATCH_TOKENS.get(device.type, 1024) // length)
            run.with_calibration(model, blocks, input_ids.to(device), size, propagate, exact_error, fuse_statistics)
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


def _check_input_ids(model: nn.Module, input_ids: Tensor | None, target: Target) -> Tensor:
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off while pruning; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Run:
    """One pruning run: what is pruned how, the seconds so far, the layers so far."""

    def __init__(self, target: Target, stopwatch: Stopwatch, progress: Progress) -> None:
        self.target = target
        self.stopwatch = stopwatch
        self.progress = progress
        self.layers: list[LayerReport] = []

    def without_calibration(self, blocks: list[Block]) -> None:
        self.progress.start(len(blocks))
        for block in blocks:
            self.prune_block(block, self.target, None, None)
            self.progress.advance()

    def with_calibration(
        self,
        model: nn.Module,
        blocks: list[Block],
        input_ids: Tensor,
        batch_size: int,
        propagate: str,
        exact_error: bool,
        fuse_statistics: bool,
    ) -> None:
        batches = list(input_ids.split(batch_size))
        passes = len(blocks) * (2 if propagate == "pruned" else 1) - (propagate == "pruned")
        passes += len(blocks) if self.target.options.owl else 0
        self.progress.start(len(batches) * (passes + exact_error * len(blocks)))
        with self.stopwatch.measure("forward"):
            recording = record_calls(model, blocks, batches)
        plans: dict[tuple, Plan] = {}

        def statistics_of(index: int, hessians: bool) -> BlockStatistics:
            kind = kind_of(blocks[index])
            if kind not in plans:
                with self.stopwatch.measure("forward"):
                    first = recording.calls[index][0]
                    plans[kind] = observe(blocks[index], recording.hidden[0], first, fuse_statistics)
            return BlockStatistics(blocks[index], len(input_ids), plans[kind], self.stopwatch, hessians)

        targets = [self.target] * len(blocks)
        if self.target.options.owl:
            targets = self.owl_targets(self.target.options.owl, blocks, recording, statistics_of)
        for index, block in enumerate(blocks):
            calls = recording.calls[index]
            last = index == len(blocks) - 1
            statistics = statistics_of(index, self.target.needs_hessian)
            dense_outputs = self.collect(statistics, recording, calls, whole=propagate == "dense" and not last)
            dense = {n: linear.weight.clone() for n, linear in block.linears.items()} if exact_error else {}
            inputs = statistics.inputs()
            self.prune_block(block, targets[index], inputs, statistics)
            if exact_error:
                self.measure_errors(block, recording.hidden, calls, dense, inputs)
            if dense_outputs:
                recording.hidden = dense_outputs
            elif not last:
                self.advance_hidden(block, recording.hidden, calls)
            calls.clear()

    def owl_targets(
        self,
        owl: Owl,
        blocks: list[Block],
        recording: Recording,
        statistics_of: Callable[[int, bool], BlockStatistics],
    ) -> list[Target]:
        """A pass of the dense model over all blocks, and the target that its outliers give each of them."""
        hidden = recording.hidden
        ratios = []
        for index, block in enumerate(blocks):
            statistics = statistics_of(index, False)
            outputs = self.collect(statistics, recording, recording.calls[index], whole=index < len(blocks) - 1)
            weights = {name: linear.weight.data for name, linear in block.linears.items()}
            with self.stopwatch.measure("selection"):
                ratios.append(outlier_ratio(weights, statistics.inputs(), owl.outlier))
            recording.hidden = outputs or recording.hidden
        recording.hidden = hidden
        shares = owl.sparsities(ratios, self.target.sparsity)
        return [dataclasses.replace(self.target, sparsity=share) for share in shares]

    def collect(
        self, statistics: BlockStatistics, recording: Recording, calls: list[Call], whole: bool
    ) -> list[Tensor]:
        outputs = []
        sample = 0
        for hidden, call in zip(recording.hidden, calls, strict=True):
            with self.stopwatch.measure("forward"):
                output = statistics.run(hidden, call, sample, whole)
            if output is not None:
                outputs.append(output)
            sample += hidden.shape[0]
            self.progress.advance()
        return outputs

    def advance_hidden(self, block: Block, hidden: list[Tensor], calls: list[Call]) -> None:
        for batch, call in enumerate(calls):
            with self.stopwatch.measure("forward"):
                hidden[batch] = run_block(block, hidden[batch], call)
            self.progress.advance()

    def measure_errors(
        self,
        block: Block,
        hidden: list[Tensor],
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
                outcome = prune_layer_(weight, None if inputs is None else inputs[name], target)
                zeros = weight.numel() - int(torch.count_nonzero(weight))
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
