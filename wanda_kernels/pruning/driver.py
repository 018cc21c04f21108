"""``prune``: what its model and its data must be."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..identity import of_environment, of_tokens
from .blocks import Block, find_blocks, matrices_of, refuse_non_finite, what_it_computes
from .loop import Loop
from .report import Progress, PruningReport
from .source import BlockSource
from .spec import PruneSpec, SpecArguments
from .stopwatch import Stopwatch


def prune(
    model: nn.Module,
    input_ids: Tensor | None = None,
    *,
    spec: PruneSpec | None = None,
    processes: Processes | None = None,
    progress: Progress | None = None,
    **arguments: Unpack[SpecArguments],
) -> PruningReport:
    """Prune the linear layers and experts of a transformers decoder in place.

    Embeddings and ``lm_head`` are never pruned, routers and small tensors beside the layers (convolutions, states)
    stay dense: the report lists them. The model stays on its device and in its dtype.

    Args:
        model: a causal language model of transformers, or one that also takes images: its text decoder is pruned.
        input_ids: [samples, length], int64: the calibration sequences. Not needed for ``magnitude``.
        spec: a :class:`PruneSpec`; or, instead of it,
        arguments: its parts: ``sparsity`` or ``pattern``, ``method`` and its options, ``propagate``, ``batch_size``,
            ``exact_error``, ``fuse_statistics``, ``owl``, ``experts``, ``min_tokens``, ``require_all``.
        processes: that share the work (:mod:`wanda_kernels.distributed`): each calls this with the same arguments
            and has the same pruned model at the end.
        progress: told about each step and block.

    Returns:
        A :class:`PruningReport`.

    Raises:
        ValueError, TypeError: bad arguments or a model that cannot be pruned, before anything is changed. Inputs
            that hold NaN or inf are found when their block is reached: the blocks before are pruned by then.
    """
    spec = PruneSpec.of(spec, arguments)
    blocks = find_blocks(model)
    check_blocks(blocks, spec)
    refuse_non_finite(blocks)
    device = next(iter(blocks[0].matrices.values())).stored.device
    ids = check_input_ids(model, input_ids, spec)
    if processes is not None:
        processes.refuse_differences(
            spec.to_dict() | {"input_ids": of_tokens(ids), "environment": of_environment(device)}
        )
    stopwatch = Stopwatch(device)
    loop = Loop(spec, model, BlockSource(blocks, stopwatch), device, stopwatch, progress or Progress(), processes)
    loop.run(ids)
    return loop.report()


def check_blocks(blocks: list[Block], spec: PruneSpec) -> None:
    """Raises ValueError for blocks that cannot be pruned as ``spec`` says, or where a layer's weight may be used
    otherwise than its input's norms say: its mask would be wrong. Their weights may be without data."""
    spec.check_experts(any(block.experts for block in blocks))
    if spec.require_all:
        for block in blocks:
            for name, parameter in block.dense.items():
                raise ValueError(
                    f"{block.name}.{name} {list(parameter.shape)} would stay dense, which require_all forbids"
                )
    if spec.experts == "all":  # found when its block is reached, the blocks before would be pruned by then
        for block in blocks:
            for name, adapter in block.experts.items():
                if adapter.only_routed is not None:
                    module = block.module.get_submodule(name.rstrip("."))
                    raise ValueError(
                        f"experts must be 'routed' for {type(module).__name__} ({block.name}.{name.rstrip('.')}): "
                        f"{adapter.only_routed}"
                    )
    for name, matrix in matrices_of(blocks).items():
        spec.check_weight(name, matrix.weight)
        reason = what_it_computes(matrix.module)
        if reason is not None:
            raise ValueError(f"{name} cannot be pruned: {reason}")


def check_input_ids(model: nn.Module, input_ids: Tensor | None, spec: PruneSpec) -> Tensor | None:
    """As int64; None where nothing has to be known of the inputs."""
    if not spec.needs:
        return None
    if input_ids is None:
        owl = " with owl" if spec.owl else ""
        raise ValueError(f"method '{spec.method.name}'{owl} needs input_ids: [samples, length], int64")
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
