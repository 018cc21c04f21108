"""Does the runs of a study on one loaded model, whose dense weights come back after each."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import added_peak
from ..pruning import prune
from ..pruning.blocks import find_blocks, matrices_of
from ..pruning.report import Progress, PruningReport
from ..text import perplexity
from .plan import Run

# (samples, seed) -> [samples, length], int64
Calibration = Callable[[int, int], Tensor]


class Runner:
    """A model, its dense weights, and what it is calibrated and evaluated on.

    Args:
        texts: windows of each text to evaluate on, [windows, length]; the first text's figure is ``perplexity``.
        on_window: told how many windows of all texts are done.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        texts: Sequence[Tensor],
        on_window: Callable[[int], None] | None = None,
    ) -> None:
        self._model = model
        self._calibration = calibration
        self._texts = texts
        self._on_window = on_window
        self._device = next(model.parameters()).device
        weights = [matrix.weight for matrix in matrices_of(find_blocks(model)).values()]
        self._dense = [(weight, weight.detach().to("cpu", copy=True)) for weight in weights]

    def dense(self) -> dict[str, Any]:
        """perplexity, and further: those on the other texts."""
        return self._evaluate()

    def _evaluate(self) -> dict[str, Any]:
        found: list[float] = []
        before = 0
        for windows in self._texts:

            def tell(done: int, before: int = before) -> None:
                if self._on_window is not None:
                    self._on_window(before + done)

            found.append(perplexity(self._model, windows, windows.shape[1], on_window=tell))
            before += len(windows)
        return {"perplexity": found[0], "further": found[1:]}

    def run(self, run: Run, progress: Progress | None = None) -> dict[str, Any]:
        """Prune, evaluate, and put the dense weights back, whatever happens.

        Returns:
            perplexity, further (on the other texts), achieved_sparsity, seconds (of the pruning), parts (seconds by
            part), peak_memory_bytes (beyond the model; None where it cannot be told), damped (layers whose Hessian
            needed more damping); with details also layers: name, exact_error, estimated_error, threshold, sparsity.
        """
        ids = self._calibration(run.samples, run.seed) if run.samples else None
        reports: list[PruningReport] = []

        def work() -> None:
            # details come from a run of their own: seconds and memory are those of the pruning alone
            reports.append(prune(self._model, ids, spec=run.spec(), progress=progress))

        try:
            start = time.perf_counter()
            peak = added_peak(work, self._device)
            seconds = time.perf_counter() - start
            report = reports[0]
            outcome = {
                **self._evaluate(),
                "achieved_sparsity": report.achieved_sparsity,
                "seconds": seconds,
                "parts": report.seconds,
                "peak_memory_bytes": peak,
                "damped": sum((layer.damping or 0.0) > 0.01 for layer in report.layers),
            }
            if run.detail and run.spec().needs:
                self._restore()
                report = prune(self._model, ids, spec=run.spec(exact_error=True), progress=progress)
                names = ("name", "exact_error", "estimated_error", "threshold", "sparsity")
                outcome["layers"] = [{name: getattr(layer, name) for name in names} for layer in report.layers]
            elif run.detail:
                outcome["layers"] = []
            return copy.deepcopy(outcome)
        finally:
            self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        for weight, dense in self._dense:
            weight.copy_(dense)
