"""The loop over the blocks: statistics before selection, then on with the pruned block's outputs.

Source: Wanda (arXiv 2306.11695), algorithm 1, and its reference loop: all statistics of a block come from the block
before it is pruned, then every linear layer in it is pruned, then it runs again to give the next block's inputs.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .._words import percent
from ..distributed import Processes
from ..identity import of_weights
from ..methods import LayerInputs, Method, Needs, Outcome, Pattern
from ..methods.owl import outlier_ratio
from ..models import evaluating
from ..ops.solve import rows_of_tile
from .blocks import MOST_DENSE, count_zeros, unwrapped
from .exact_error import exact_errors, mean_threshold
from .fusion import Plan, kind_of, observe
from .grams import Grams
from .matrices import Block, Matrix
from .recording import Call, Recording, record_calls, run_block
from .refine import FOUND, improve_
from .report import LayerReport, Progress, PruningReport, relative_error
from .source import Activations, BlockSource, Done
from .spec import PruneSpec
from .statistics import BlockStatistics
from .stopwatch import Stopwatch

# Tokens a batch: on two CPU cores 1024 was the fastest (512: +25 %, 4096: +50 %, cache); a GPU wants more.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


@dataclass
class Loop:
    """One pruning run.

    Args:
        spec: what is pruned how.
        model: whose blocks the source gives.
        device: to compute on.
        progress: told about each step and block.
        processes: that share the work.
        done: by a run that this one goes on with.
    """

    spec: PruneSpec
    model: nn.Module
    source: BlockSource
    device: torch.device
    stopwatch: Stopwatch
    progress: Progress
    processes: Processes | None = None
    done: Done = field(default_factory=Done)

    def __post_init__(self) -> None:
        self.rank, self.ranks = (0, 1) if self.processes is None else (self.processes.rank, self.processes.size)
        self.shape = (0, 0)  # of the calibration sequences
        self.batches = self.samples = [range(0)]  # of each process
        self.plans: dict[tuple, Plan] = {}  # by the kind of block

    def run(self, input_ids: Tensor | None, hidden: Activations | None = None) -> None:
        """Prune all blocks that are not done.

        Args:
            input_ids: [samples, length], int64; None where nothing has to be known of the inputs.
            hidden: where activations go; of a run that is gone on with, the next block's inputs.
        """
        if input_ids is not None:
            self.shape = (input_ids.shape[0], input_ids.shape[1])
        if self.done.blocks < len(self.source.blocks):
            with torch.no_grad(), evaluating(self.model):
                self._run(input_ids, hidden)

    def report(self) -> PruningReport:
        """Of the run so far."""
        samples, length = self.shape
        pruned = {layer.name for layer in self.done.layers}
        dense = {
            name: share
            for block in self.source.blocks[: self.done.blocks]
            for name, share in dense_shares(block, pruned).items()
        }
        return PruningReport(self.spec, samples, length, self.done.layers, self.stopwatch.seconds(), dense)

    def _left(self) -> list[tuple[int, Block]]:
        return list(enumerate(self.source.blocks))[self.done.blocks :]

    def _run(self, input_ids: Tensor | None, hidden: Activations | None) -> None:
        recording = None
        if input_ids is None:
            self.progress.start(len(self._left()))
        else:
            if hidden is None:
                hidden = Activations(keep=self.spec.exact_error and self.spec.propagate == "dense")
            recording = self._prepare(input_ids, hidden)
        self.source.begin(self.done.blocks)
        for index, block in self._left():
            last = block is self.source.blocks[-1]
            with self.source.holding(index):
                self._compare(block.name, block.module)
                sparsity = self.done.sparsities[index] if self.done.sparsities else self.spec.sparsity
                if recording is None or hidden is None:
                    self._prune_block(block, sparsity)
                    self.progress.advance()
                else:
                    self._work_on(block, sparsity, hidden, recording.calls[index], last)
                    recording.calls[index].clear()
            if hidden is not None and not last:
                hidden.flip()
            self.done.blocks = index + 1
            self.source.finished(index, self.done, hidden)

    def _prepare(self, input_ids: Tensor, hidden: Activations) -> Recording:
        """How the blocks are called; the next one's inputs are in ``hidden``, and OWL's sparsities are chosen."""
        size = self.spec.batch_size or default_batch_size(self.device, input_ids.shape[1])
        batches = self._share(list(input_ids.to(self.device).split(size)))
        recording = self._record(batches, hidden, first=True)
        self.done.can_resume = not recording.blocks_hand_on_more()
        if not self.done.can_resume and self.done.blocks:
            raise ValueError(
                f"{type(self.model).__name__} hands more than hidden states from block to block (shared keys and "
                "values): a run of it cannot be gone on with"
            )
        is_to_allocate = self.spec.owl is not None and self.done.sparsities is None
        self.progress.start(self._steps(len(self._left()), len(batches), is_to_allocate))
        if is_to_allocate:
            self.done.sparsities = self._allocate(hidden, recording)
            hidden.clear()
            recording = self._record(batches, hidden)
        return recording

    def _record(self, batches: list[Tensor], hidden: Activations, first: bool = False) -> Recording:
        """How the blocks are called; the first one's inputs go to ``hidden``, where no run is gone on with.
        ``first``: processes also compare the weights outside the blocks."""
        blocks = self.source.blocks
        with self.source.outside():
            if first:
                self._compare("", self.model, without=tuple(f"{block.name}." for block in blocks))
            with self.stopwatch.measure("forward"):
                keep = (lambda _: None) if self.done.blocks else hidden.append
                return record_calls(self.model, blocks, batches, keep)

    def _compare(self, name: str, module: nn.Module, without: tuple[str, ...] = ()) -> None:
        """Raises ValueError where another process has other weights here. ``without``: what names begin with that are
        compared later."""
        if self.processes is not None:
            with self.stopwatch.measure("exchange"):
                held = [(f"{name} {key}".strip(), t) for key, t in module.state_dict().items()]
                self.processes.refuse_differences(
                    of_weights((key, t) for key, t in held if not key.startswith(without))
                )

    def _share(self, batches: list[Tensor]) -> list[Tensor]:
        """This process's of all ``batches``. Batches stay whole, so that activations do not depend on the number of
        processes."""
        begins = [0, *itertools.accumulate(len(batch) for batch in batches)]
        mine = range(len(batches))
        self.batches = [mine]
        if self.processes is not None:
            mine = self.processes.my_share(len(batches), "batches of sequences (see batch_size)")
            self.batches = self.processes.shares(len(batches))
        self.samples = [range(begins[share.start], begins[share.stop]) for share in self.batches]
        return batches[mine.start : mine.stop]

    def _plan(self, block: Block, hidden: Activations, calls: list[Call]) -> Plan:
        """The plan for blocks of this kind; the first process's where there are several."""
        kind = kind_of(block)
        if kind not in self.plans:
            with self.stopwatch.measure("forward"):
                self.plans[kind] = observe(block, hidden[0], calls[0], self.spec.fuse_statistics)
            if self.processes is not None:
                self.plans[kind] = Plan.from_data(self.processes.agree_on(self.plans[kind].to_data()))
            self._refuse_large_silent(block, self.plans[kind])
        return self.plans[kind]

    def _refuse_large_silent(self, block: Block, plan: Plan) -> None:
        if not plan.silent:
            return
        shares = {name: block.share(block.matrices[name].stored) for name in plan.silent}
        dense = sum(shares.values()) + sum(map(block.share, block.dense.values()))
        if dense > MOST_DENSE or self.spec.require_all:
            name = max(shares, key=lambda name: shares[name])
            raise ValueError(
                f"{block.name}.{name} received no input during calibration (its weight is used outside its forward, "
                f"or for other inputs than text): it cannot be pruned, and would leave {percent(shares[name], 1)} of "
                f"its block's weights dense (with what else is none, {percent(dense, 1)})"
            )

    def _steps(self, blocks: int, batches: int, is_to_allocate: bool) -> int:
        passes = blocks * (2 if self.spec.propagate == "pruned" else 1) - (self.spec.propagate == "pruned")
        return batches * (passes + (is_to_allocate + self.spec.exact_error) * blocks)

    def _work_on(self, block: Block, sparsity: float, hidden: Activations, calls: list[Call], last: bool) -> None:
        """Statistics, selection, and the next block's inputs."""
        dense_outputs = self.spec.propagate == "dense" and not last
        statistics = self._statistics(block, hidden, calls, dense_outputs, self.spec.needs >= Needs.GRAM)
        is_exact = self.spec.exact_error
        inputs = statistics.inputs()
        dense = {name: block.matrices[name].stored.detach().clone() for name in inputs} if is_exact else {}
        self._prune_block(block, sparsity, inputs, statistics)
        if is_exact:
            self._measure_errors(block, hidden, calls, dense, inputs)
        if self.spec.propagate == "pruned" and not last:
            for batch, call in enumerate(calls):
                with self.stopwatch.measure("forward"):
                    hidden[batch] = run_block(block, hidden[batch], call)
                self.progress.advance()

    def _allocate(self, hidden: Activations, recording: Recording) -> list[float]:
        """A pass of the dense model over all blocks, and the sparsity that its outliers give each of them."""
        owl, blocks = self.spec.owl, self.source.blocks
        assert owl is not None
        ratios, sizes = [], []
        self.source.begin(0)
        for index, (block, calls) in enumerate(zip(blocks, recording.calls, strict=True)):
            last = block is blocks[-1]
            with self.source.holding(index):
                statistics = self._statistics(block, hidden, calls, whole=not last)
                inputs = statistics.inputs()
                weights = {name: block.matrices[name].weight.detach() for name in inputs}
                with self.stopwatch.measure("selection"):
                    ratios.append(outlier_ratio(weights, inputs, owl.outlier))
                sizes.append(sum(weight.numel() for weight in weights.values()))
            if not last:
                hidden.flip()
            self.source.passed(index)
        if self.processes is not None:
            ratios = self.processes.agree_on(ratios)
        return owl.sparsities(ratios, self.spec.sparsity, sizes)

    def _statistics(
        self, block: Block, hidden: Activations, calls: list[Call], whole: bool, grams: bool = False
    ) -> BlockStatistics:
        """All statistics of a block, of all processes' sequences; where it runs ``whole``, its outputs are the next
        block's inputs."""
        plan = self._plan(block, hidden, calls)
        every, least, samples = self.spec.experts == "all", self.spec.min_tokens, self.samples[-1].stop
        sums = Grams(samples, lambda name: block.matrices[name].experts, self.processes) if grams else None
        statistics = BlockStatistics(block, samples, plan, self.stopwatch, sums, every, least)
        self._collect(statistics, hidden, calls, whole)
        if self.processes is not None:
            statistics.exchange(self.processes, self.samples)
        return statistics

    def _collect(self, statistics: BlockStatistics, hidden: Activations, calls: list[Call], whole: bool) -> None:
        sample = self.samples[self.rank].start
        for batch, call in enumerate(calls):
            x = hidden[batch]
            with self.stopwatch.measure("forward"):
                output = statistics.run(x, call, sample, whole)
            if output is not None:
                hidden[batch] = output
            sample += call.sequences
            self.progress.advance()

    def _measure_errors(
        self,
        block: Block,
        hidden: Activations,
        calls: list[Call],
        dense: dict[str, Tensor],
        inputs: dict[str, LayerInputs],
    ) -> None:
        mine = self.batches[self.rank]
        sums = torch.zeros(self.batches[-1].stop, 2 * len(dense), dtype=torch.float64, device=self.device)
        with self.stopwatch.measure("exact error"):
            sums[mine.start : mine.stop] = exact_errors(block, hidden, calls, dense, self.progress).to(self.device)
            if self.processes is not None:
                self.processes.exchange_rows_(sums, self.batches)
        added = [0.0] * sums.shape[1]
        for row in sums.tolist():  # in order, so that the sums are the same for any number of processes
            added = [a + b for a, b in zip(added, row, strict=True)]
        errors = {name: relative_error(*added[2 * i : 2 * i + 2]) for i, name in enumerate(dense)}
        for layer in self.done.layers[-len(errors) :]:
            name = layer.name.removeprefix(f"{block.name}.")
            layer.exact_error = errors[name]
            matrix = block.matrices[name]
            layer.threshold = mean_threshold(matrix.view(dense[name]), matrix.weight.detach(), inputs[name].norm)

    def _prune_block(
        self,
        block: Block,
        sparsity: float,
        inputs: dict[str, LayerInputs] | None = None,
        statistics: BlockStatistics | None = None,
    ) -> None:
        reports = []
        to_come = Counter(map(id, (inputs or {}).values()))
        for name, matrix in block.matrices.items():
            if inputs is not None and name not in inputs:  # silent
                continue
            known = None if inputs is None else inputs[name]
            start = time.perf_counter()
            swaps = errors = None
            with self.stopwatch.measure("selection"):
                is_to_improve = self.spec.improves and (sparsity > 0 or self.spec.values is not None)
                dense = matrix.stored.detach().clone() if is_to_improve else None
                outcome = self._prune(matrix, known, sparsity)
                pruned, total = outcome.sums.double().sum(dim=0).tolist()
            if dense is not None and known is not None:
                swaps, errors = self._improve(f"{block.name}.{name}", matrix, dense, known)
            to_come[id(known)] -= 1
            if known is not None and not to_come[id(known)]:
                known.let_go()
            weight = matrix.weight.detach()
            zeros = count_zeros(weight)
            tokens = None if known is None or known.tokens is None else known.tokens.tolist()
            reports.append(
                LayerReport(
                    name=f"{block.name}.{name}",
                    shape=tuple(weight.shape),
                    sparsity=zeros / max(1, weight.numel()),
                    seconds=time.perf_counter() - start,
                    estimated_error=relative_error(pruned, total),
                    input_of=None if statistics is None else f"{block.name}.{statistics.source[name]}",
                    statistics=None if statistics is None else statistics.path(name),
                    damping=outcome.damping,
                    tokens=tokens,
                    pooled=None if known is None or tokens is None else known.pooled,
                    swaps=swaps,
                    gram_errors=errors,
                )
            )
        self.done.layers += reports
        self.progress.block(block.name, reports)

    def _prune(self, matrix: Matrix, inputs: LayerInputs | None, sparsity: float) -> Outcome:
        """In shares, of what is independent: experts, or rows; else each process prunes the whole matrix, and the first
        one's is taken."""
        weight, method, pattern = matrix.weight.data, self.spec.method, self.spec.pattern
        if sparsity == 0:
            return Outcome.of(0.0, 1.0)
        has_rows = method.has_independent_rows(pattern)
        if self.processes is None:
            mine = range(len(weight))
        elif matrix.experts is not None or (has_rows and not matrix.is_transposed):
            mine = self.processes.shares(len(weight))[self.rank]
        else:
            outcome = method.prune_(weight, inputs, sparsity, pattern)
            self.processes.exchange_rows_(matrix.stored.data, self.processes.all_from_first(len(matrix.stored)))
            return outcome
        part = weight[mine.start : mine.stop]
        if matrix.experts is None:
            outcomes = [method.prune_(part, inputs, sparsity, pattern)] if len(mine) else []
        else:
            known = None if inputs is None else inputs.of_experts(mine)
            outcomes = prune_experts_(method, part, known, sparsity, pattern)
        sums = torch.cat([one.sums.double() for one in outcomes]) if outcomes else torch.zeros(0, 2)
        if matrix.experts is not None and len(mine):  # in the same groups for any number of processes
            sums = sums.view(len(mine), -1, 2).sum(dim=1)
        damping = max((one.damping for one in outcomes if one.damping is not None), default=None)
        outcome = Outcome(sums, damping)
        return outcome if self.processes is None else self._exchange(matrix, mine, outcome, self.processes)

    def _improve(
        self, name: str, matrix: Matrix, stored: Tensor, inputs: LayerInputs
    ) -> tuple[int | None, list[float]]:
        """A better mask and better weights for a matrix that was pruned, in shares of experts, or of rows by tiles;
        ``stored``: as it was before. Returns the swaps of a refinement, and the layer's relative error before and after
        each step."""
        from ..packed.model import form_of  # which imports .blocks

        weight, dense, spec = matrix.weight.data, matrix.view(stored), self.spec
        values = spec.values
        if values is not None and form_of(unwrapped(self.model), name, matrix, "auto", values)[0] is None:
            values = None  # 4 bits would cost accuracy and win nothing
        # Of a transposed matrix rows do not lie apart: each process improves all of it, to the same bits.
        processes = None if matrix.is_transposed and matrix.experts is None else self.processes
        size = rows_of_tile(weight.device) if matrix.experts is None else 1
        tiles = -(-len(weight) // size)
        shares = [range(tiles)] if processes is None else processes.shares(tiles)
        shares = [range(min(one.start * size, len(weight)), min(one.stop * size, len(weight))) for one in shares]
        mine = shares[0 if processes is None else self.rank]
        found = torch.zeros(len(weight), len(FOUND), dtype=torch.float64, device=weight.device)
        if matrix.experts is not None:
            for expert in mine:
                known = inputs.of_expert(expert)
                found[expert] = improve_(weight[expert], dense[expert], known, spec, self.stopwatch, values).sum(dim=0)
        elif len(mine):
            rows = slice(mine.start, mine.stop)
            found[rows] = improve_(weight[rows], dense[rows], inputs, spec, self.stopwatch, values)
        if processes is not None:
            with self.stopwatch.measure("exchange"):
                for tensor in (matrix.stored.data[: len(weight)], found):
                    processes.exchange_rows_(tensor, shares)
        swaps, method, refined, updated, quantized, whole = found.sum(dim=0).tolist()
        errors = [method, *([refined] if spec.refine else []), *([updated] if spec.update else [])]
        if spec.values is not None:
            errors.append(errors[-1] if values is None else quantized)
        relative = [relative_error(max(0.0, error), whole) for error in errors]
        return int(swaps) if spec.refine else None, relative

    def _exchange(self, matrix: Matrix, mine: range, outcome: Outcome, processes: Processes) -> Outcome:
        """All get the others' shares of a matrix, and what was lost of them."""
        count = len(matrix.weight)
        shares = processes.shares(count)
        lost = torch.zeros(count, 3, dtype=torch.float64, device=matrix.stored.device)
        if len(mine):
            lost[mine.start : mine.stop, :2] = outcome.sums
            lost[mine.start : mine.stop, 2] = -1 if outcome.damping is None else outcome.damping
        processes.exchange_rows_(matrix.stored.data[:count], shares)
        processes.exchange_rows_(lost, shares)
        damping = float(lost[:, 2].max())
        return Outcome(lost[:, :2], None if damping < 0 else damping)


def prune_experts_(
    method: Method, weight: Tensor, inputs: LayerInputs | None, sparsity: float, pattern: Pattern | None
) -> list[Outcome]:
    """Prune experts [E, C_out, C_in]: at once where the method can, or each as a matrix of its own."""
    if not len(weight):
        return []
    if method.takes_experts and method.has_independent_rows(pattern):
        return [method.prune_(weight, inputs, sparsity, pattern)]
    known = [None if inputs is None else inputs.of_expert(expert) for expert in range(len(weight))]
    return [method.prune_(one, of_one, sparsity, pattern) for one, of_one in zip(weight, known, strict=True)]


def dense_shares(block: Block, pruned: set[str]) -> dict[str, float]:
    """What stays dense in a block whose layers ``pruned`` are pruned -> its share of the block's weights."""
    silent = {n: m.stored for n, m in block.matrices.items() if f"{block.name}.{n}" not in pruned}
    return {f"{block.name}.{name}": block.share(tensor) for name, tensor in (silent | block.dense).items()}


def default_batch_size(device: torch.device, length: int) -> int:
    """Sequences a forward pass."""
    return max(1, BATCH_TOKENS.get(device.type, 1024) // length)
