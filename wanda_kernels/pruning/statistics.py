"""Accumulates the squared norms of the inputs of a block's linear layers, each distinct input once."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .. import _backend, reference
from ..methods import LayerInputs
from ..ops import add_sqnorm_
from .fusion import Plan
from .grams import Grams
from .matrices import Block, Rows, Watching
from .recording import Call, run_block
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from ..distributed import Processes


class _LastInputSeenError(Exception):
    """Ends a statistics pass before the block's last product, whose output nobody needs."""


class BlockStatistics:
    """The sums of squares behind one block's norms, one per distinct input and sequence.

    Layers that receive the same tensor object share a sum ({q, k, v} and {gate, up} in LLaMA). The objects are
    held while the block runs on a batch, so that identity means what it says: ids and pointers of freed tensors
    come back for others. An input that a fused operator made comes with its sum.

    Experts have a sum per expert and sequence, of the tokens that they got, and each its own mean over sequences: the
    result depends neither on the batches nor on the processes.

    Args:
        block: the block to watch.
        samples: the number of calibration sequences, over all batches.
        plan: what a run of a block of this kind has shown.
        grams: also of each distinct input its Gram matrix, in the same pass.
        every: experts count every token, and not only those that the router sends them.
        min_tokens: experts that got fewer take the mean over their layer's experts, unless they count every token.
    """

    def __init__(
        self,
        block: Block,
        samples: int,
        plan: Plan,
        stopwatch: Stopwatch,
        grams: Grams | None = None,
        every: bool = False,
        min_tokens: int = 1,
    ) -> None:
        self._block = block
        self._samples = samples
        self._plan = plan
        self._stopwatch = stopwatch
        self._every = every
        self._min_tokens = min_tokens
        self._may_stop = False
        self._called: list[str] = []
        self._held: list[tuple[str, Tensor, int]] = []
        self._rows = slice(0, 0)
        self._sqnorm: dict[str, Tensor] = {}  # [samples, C_in], or [samples, E, C_in]
        self._tokens: dict[str, Tensor] = {}  # [samples, E], of experts
        self._grams = grams
        self.source: dict[str, str] = {}  # layer -> the layer whose input it shares

    def path(self, layer: str) -> str:
        """How the sums behind a layer's norm were added up: by a fused operator, or ``standalone``."""
        return self._plan.path(self.source[layer])

    def run(self, hidden: Tensor, call: Call, first_sample: int, whole: bool) -> Tensor | None:
        """Run the block on one batch and add its inputs up.

        Returns the block's output if ``whole``; otherwise None, and the last product is skipped.
        """
        self._rows = slice(first_sample, first_sample + call.sequences)
        self._called = []
        output: Tensor | None = None
        self._may_stop = not whole
        watching = Watching(self, call.sequences, self._every)
        with self._plan.installed(self._block, self._sequence_rows, self._hold), self._block.watched(watching):
            try:
                output = run_block(self._block, hidden, call)
            except _LastInputSeenError:
                pass
            finally:
                self._held.clear()
        if tuple(self._called) != self._plan.order:
            raise ValueError(
                f"{self._block.name} calls its linear layers in an order that changes from batch to batch: it "
                "cannot be pruned block by block"
            )
        return output if whole else None

    def _hold(self, source: str, x: Tensor) -> None:
        self._held.append((source, x, _version(x)))
        if self._grams is not None:
            with self._stopwatch.measure("Gram matrices"):
                sequences = self._rows.stop - self._rows.start
                self._grams.add(source, x.reshape(sequences, -1, x.shape[-1]), self._rows.start)

    def input(self, name: str, x: Tensor) -> None:
        """As :class:`Watcher`."""
        if name in self._plan.silent:
            raise ValueError(
                f"{self._block.name}.{name} is called for some batches only: it cannot be pruned block by block"
            )
        self._called.append(name)
        source = next((held for held, t, version in self._held if t is x and _version(t) == version), None)
        if source is None:
            source = name
            self._hold(name, x)
            with self._stopwatch.measure("statistics"):
                add_sqnorm_(self._sequence_rows(name, x), x if x.dim() in (2, 3) else x.flatten(1, -2))
        if self.source.setdefault(name, source) != source:
            raise ValueError(
                f"{self._block.name}.{name} shares its input with other layers in one batch and not in the next: "
                "it cannot be pruned block by block"
            )
        self._stop_after_last()

    def rows(self, name: str, rows: Rows) -> None:
        """As :class:`Watcher`."""
        sequences, count, cols = self._rows.stop - self._rows.start, len(rows.experts), rows.x.shape[-1]
        experts = slice(rows.experts.start, rows.experts.stop)
        if name not in self._sqnorm:
            total, device = self._block.matrices[name].weight.shape[0], rows.x.device
            self._sqnorm[name] = torch.zeros(self._samples, total, cols, dtype=torch.float32, device=device)
            self._tokens[name] = torch.zeros(self._samples, total, dtype=torch.int64, device=device)
        with self._stopwatch.measure("statistics"):
            sums = torch.zeros(count * sequences, cols, dtype=torch.float32, device=rows.x.device)
            add_sqnorm_(sums, rows.x, ends=rows.ends)
            self._sqnorm[name][self._rows, experts] = sums.view(count, sequences, cols).transpose(0, 1)
            self._tokens[name][self._rows, experts] = rows.tokens
        if self._grams is not None:
            with self._stopwatch.measure("Gram matrices"):
                self._grams.add_rows(name, rows.x, rows.ends.tolist(), rows.experts, sequences)

    def all_rows(self, name: str) -> None:
        """As :class:`Watcher`."""
        self._called.append(name)
        self.source[name] = name
        self._stop_after_last()

    def _stop_after_last(self) -> None:
        if self._may_stop and len(self._called) == len(self._plan.order):
            raise _LastInputSeenError

    def _sequence_rows(self, name: str, x: Tensor) -> Tensor:
        sequences = self._rows.stop - self._rows.start
        by_sequence = x.shape[0] == sequences if x.dim() > 2 else x.shape[0] % sequences == 0
        if not by_sequence:
            raise ValueError(
                f"{self._block.name}.{name} received an input of shape {list(x.shape)} for a batch of {sequences} "
                "sequences: its tokens cannot be told apart by sequence"
            )
        if name not in self._sqnorm:
            self._sqnorm[name] = torch.zeros(self._samples, x.shape[-1], dtype=torch.float32, device=x.device)
        return self._sqnorm[name][self._rows]

    def exchange(self, processes: Processes, samples: list[range]) -> None:
        """Get the other processes' sequences; process r ran ``samples[r]``."""
        with self._stopwatch.measure("exchange"):
            for tensor in (*self._sqnorm.values(), *self._tokens.values()):
                processes.exchange_rows_(tensor, samples)
            if self._grams is not None:
                self._grams.exchange()

    def inputs(self) -> dict[str, LayerInputs]:
        """Layer -> what is known of its inputs, one object for all that share them.

        The norms are [C_in] or [E, C_in], float32 (see :func:`norm_of_sequences`).

        Raises:
            ValueError: where an input held NaN or inf, or no token came to any expert of a layer.
        """
        by_source, hessians = {}, {}
        if self._grams is not None:
            with self._stopwatch.measure("Gram matrices"):
                hessians = dict(self._grams.whole())
        with self._stopwatch.measure("statistics"):
            for name, sqnorm in self._sqnorm.items():
                norm = norm_of_sequences(sqnorm.flatten(1)).view(sqnorm.shape[1:])
                if not bool(torch.isfinite(norm).all()):
                    raise ValueError(
                        f"the input of {self._block.name}.{name} holds NaN or inf, or its squares overflow float32"
                    )
                inputs = LayerInputs(norm, hessians.get(name))
                if name in self._tokens:
                    inputs.tokens = self._tokens[name].sum(dim=0)
                    if not self._every:  # else the norms of idle ones are their own, of all tokens
                        if not int(inputs.tokens.sum()):
                            raise ValueError(f"{self._block.name}.{name}: no token was routed to any of its experts")
                        inputs.pool(self._min_tokens)
                by_source[name] = inputs
        return {name: by_source[source] for name, source in self.source.items()}


def _version(x: Tensor) -> int:
    """Changes where a tensor is written in place; those made in inference mode do not count."""
    return 0 if x.is_inference() else x._version


def norm_of_sequences(sqnorm: Tensor) -> Tensor:
    """Root of the mean over sequences of ``sqnorm``, [sequences, C_in] float32: the norm up to a constant factor.

    The sequences are averaged in sample order with the official code's own float32 steps (``WrappedGPT.add_batch``):
    a plain sum differs in the last bit, which flips a weight here and there, and each flip moves everything after it
    (measured on SmolLM2: 2 flips in block 1 became 5,000 a layer in block 29). Error against float64 over 128 x 2048
    tokens: 9e-7.
    """
    if sqnorm.is_cuda and _backend.cuda_kernels("norm_of_sequences") == "triton":
        return cast(Tensor, _backend.in_triton("norm_of_sequences")(sqnorm))
    return reference.norm_of_sequences(sqnorm)
