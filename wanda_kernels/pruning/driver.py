"""``prune``: its arguments, what they must be, and the report of the run that they give."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..identity import of_environment, of_tokens
from ..models.modes import evaluating
from .blocks import find_blocks, refuse_non_finite, refuse_other_computations
from .methods.options import OptionArguments
from .progress import Progress
from .report import PruningReport
from .run import Run
from .selection import Pattern, Target
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
    refuse_other_computations(blocks)
    refuse_non_finite(blocks)
    device = next(iter(blocks[0].linears.values())).weight.device
    if processes is not None:
        processes.refuse_differences(
            {
                "method": method, "sparsity": target.sparsity, "pattern": str(target.pattern),
                "options": target.options.to_dict(), "propagate": propagate, "batch_size": batch_size,
                "fuse_statistics": fuse_statistics, "input_ids": of_tokens(input_ids),
                "environment": of_environment(device),
            }
        )  # fmt: skip
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
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a whole number, at least 1, got {batch_size}")


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
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor [samples, length], int64, got a {type(input_ids).__name__}")
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
