"""One pruning run over the blocks: statistics before selection, then on with the pruned block's outputs.

Source: Wanda (arXiv 2306.11695), algorithm 1, and its reference loop: all statistics of a block come from the block
before it is pruned, then every linear layer in it is pruned, then it runs again to give the next block's inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
import time

from torch import Tensor, nn

from ..distributed import Processes
from ..identity import of_weights
from .activations import Activations
from .blocks import Block, count_zeros
from .exact_error import exact_errors, mean_threshold
from .fusion import Plan, kind_of, observe, plans_from_list, plans_to_list
from .methods.apply import Outcome, prune_layer_
from .methods.inputs import LayerInputs
from .methods.owl import Owl, outlier_ratio
from .progress import Progress
from .recording import Call, Recording, record_calls, run_block
from .report import LayerReport, relative_error
from .residence import Residence
from .selection import Target
from .shares import has_independent_rows, prune_rows_in_shares_
from .statistics import BlockStatistics
from .stopwatch import Stopwatch


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
        self.can_resume = True
        self.samples = [range(0)]  # of each process
        self.layers: list[LayerReport] = []
        self.plans: dict[tuple, Plan] = {}  # by the kind of block

    def without_calibration(self, blocks: list[Block]) -> None:
        self.progress.start(len(blocks) - self.first)
        for index, block in list(enumerate(blocks))[self.first :]:
            with self.residence.holding(index):
                self.compare(block.name, block.module)
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
        self.compare("", model, without=tuple(f"{block.name}." for block in blocks))
        with self.stopwatch.measure("forward"):
            recording = record_calls(model, blocks, batches, hidden.append if self.first == 0 else lambda _: None)
        self.can_resume = not recording.blocks_hand_on_more()
        if not self.can_resume and self.first:
            raise ValueError(
                f"{type(model).__name__} hands more than hidden states from block to block (shared keys and values): a "
                "run of it cannot be gone on with"
            )
        owl = self.target.options.owl
        targets = [self.target] * len(blocks)
        self.progress.start(self._steps(len(blocks) - self.first, len(batches), propagate, exact_error))
        if owl:
            targets = self.owl_targets(owl, blocks, hidden, recording, fuse_statistics)
        for index, block in list(enumerate(blocks))[self.first :]:
            calls = recording.calls[index]
            last = index == len(blocks) - 1
            with self.residence.holding(index):
                self.compare(block.name, block.module)
                self.work_on(block, targets[index], hidden, calls, propagate, last, exact_error, fuse_statistics)
            if not last:
                hidden.flip()
            calls.clear()
            self.residence.finished(index, self, hidden)

    def compare(self, name: str, module: nn.Module, without: tuple[str, ...] = ()) -> None:
        """Raises ValueError where another process has other weights here. ``without``: what names begin with that are
        compared later."""
        if self.processes is not None:
            with self.stopwatch.measure("exchange"):
                held = [(f"{name} {key}".strip(), t) for key, t in module.state_dict().items()]
                self.processes.refuse_differences(
                    of_weights((key, t) for key, t in held if not key.startswith(without))
                )

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
