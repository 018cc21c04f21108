"""What pruning a model would take, from its config alone: memory by the shapes, time by a simple model of the machine.

Memory is counted. Time is an estimate: work divided by rates, and the rates of a GPU are its data sheet's times an
assumed efficiency; no GPU was measured. ``benchmarks/cost_model.py`` measures the rates of a CPU and holds the model
against runs there. docs/scaling.md explains the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .models.experts import experts_per_token
from .models.load import empty_model
from .pruning.blocks import find_blocks
from .pruning.loop import BATCH_TOKENS

PROCESS_BYTES = 0.8e9  # of Python with torch and transformers loaded: measured on the CPU (760 MB)


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, and whether anyone measured it.

    Attributes:
        flops: of the forward passes' products.
        flops_float32: of the Gram matrices'.
        selection: bytes of weights scored and pruned.
        exchange: bytes between processes.
        storage: bytes read from, or written to, the disk.
    """

    flops: float
    flops_float32: float
    selection: float
    exchange: float
    storage: float
    measured: bool
    source: str


# 989 TFLOP/s dense bfloat16, 67 TFLOP/s float32 and 3.35 TB/s: NVIDIA's data sheet of the H100 SXM. The rest is
# assumed.
H100 = Rates(
    flops=0.4 * 989e12,
    flops_float32=0.4 * 67e12,
    selection=0.25 * 3.35e12,
    exchange=50e9,
    storage=2e9,
    measured=False,
    source="H100 SXM: 40 % of the data sheet's 989 TFLOP/s (float32: 67), 25 % of 3.35 TB/s; 50 GB/s exchange, 2 GB/s "
    "disk",
)


@dataclass(frozen=True)
class Shape:
    """A model in numbers.

    Attributes:
        blocks: how many; ``block_weights``: in the linear layers and experts of one; ``block_bytes``: of all its
            tensors.
        token_weights: of a block's, those that a token is multiplied with: not of the experts that are not chosen.
        experts: of a layer; 0 where there are none. chosen: of them, for a token.
        outside_bytes: embeddings, output, norms. width: of the hidden states. inner: the widest linear layer's.
        inputs: summed widths of the distinct inputs of a block's linear layers, at most, and of each expert's.
        input_squares: as inputs, of the widths' squares: elements of Gram matrices.
        token_inputs, token_squares: of these, those that a token adds to. widest: of the inputs.
        itemsize: bytes of an element.
    """

    blocks: int
    block_weights: int
    block_bytes: int
    outside_bytes: int
    width: int
    inner: int
    inputs: int
    itemsize: int
    token_weights: int
    input_squares: int
    token_inputs: int
    token_squares: int
    widest: int
    experts: int = 0
    chosen: int = 0

    @property
    def model_bytes(self) -> int:
        return self.blocks * self.block_bytes + self.outside_bytes


def shape_of(config: Any) -> Shape:
    """Builds the model without weights. Raises ValueError where it could not be pruned."""
    dtype = config.dtype or torch.bfloat16
    model = empty_model(config, dtype)
    blocks = find_blocks(model, meta=True)
    largest = max(blocks, key=lambda block: sum(p.numel() for p in block.module.parameters()))
    block_numel = sum(p.numel() for p in largest.module.parameters())
    in_blocks = sum(p.numel() for block in blocks for p in block.module.parameters())
    shapes = [matrix.weight.shape for matrix in largest.matrices.values()]
    experts = max((shape[0] for shape in shapes if len(shape) == 3), default=0)
    chosen = min(experts_per_token(config.get_text_config()), experts)
    per_token = [s.numel() if len(s) == 2 else s.numel() // s[0] * chosen for s in shapes]
    return Shape(
        blocks=len(blocks),
        block_weights=sum(shape.numel() for shape in shapes),
        block_bytes=block_numel * dtype.itemsize,
        outside_bytes=(sum(p.numel() for p in model.parameters()) - in_blocks) * dtype.itemsize,
        width=config.get_text_config().hidden_size,
        inner=max(max(shape[-2:]) for shape in shapes),
        inputs=sum(shape[-1] * (shape[0] if len(shape) == 3 else 1) for shape in shapes),
        itemsize=dtype.itemsize,
        token_weights=sum(per_token),
        input_squares=sum(shape[-1] ** 2 * (shape[0] if len(shape) == 3 else 1) for shape in shapes),
        token_inputs=sum(shape[-1] * (chosen if len(shape) == 3 else 1) for shape in shapes),
        token_squares=sum(shape[-1] ** 2 * (chosen if len(shape) == 3 else 1) for shape in shapes),
        widest=max(shape[-1] for shape in shapes),
        experts=experts,
        chosen=chosen,
    )


@dataclass(frozen=True)
class Prediction:
    """Seconds by part, and bytes of one device (``host_bytes``: of one process's own memory) by way of running."""

    seconds: dict[str, float]
    bytes_in_memory: float
    bytes_mapped: float
    bytes_streamed: float
    host_bytes_streamed: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def predict(
    shape: Shape, rates: Rates, devices: int = 1, samples: int = 128, length: int = 2048, passes: int = 2,
    batch_tokens: int = BATCH_TOKENS["cuda"], grams: bool = False, copies: int = 0,
) -> Prediction:  # fmt: skip
    """One run on ``devices`` devices, a process each. ``passes``: 2, or 1 for ``propagate="dense"``.

    Forward: 2 operations for each token and weight that it is multiplied with, and the products of causal attention.
    They divide by the processes, as the rows of the selection do; reading and writing the files, and exchanging rows
    and sums, do not. ``grams``: with Gram matrices (``refine``); ``copies`` of the widest are needed, too (3 to
    invert it, ``sparsegpt``; 1 for ``update``). Of several processes each keeps its inputs of a block until it has
    added them.
    """
    tokens = samples * length
    shares = min(devices, max(1, tokens // max(batch_tokens, length)))  # batches stay whole
    attention = 2 * shape.width * length  # a token's scores and their product with the values, half of them masked
    flops = shape.blocks * passes * tokens * (2 * shape.token_weights + attention)
    weights = shape.blocks * shape.block_weights * shape.itemsize
    sums = shape.blocks * samples * shape.inputs * 4
    seconds = {
        "read": shape.model_bytes / rates.storage,
        "forward": flops / rates.flops / shares,
        "selection": weights / rates.selection / devices,
        "exchange": (weights + sums) / rates.exchange if devices > 1 else 0.0,
        "write": shape.model_bytes / rates.storage,
    }
    activations = tokens * shape.width * shape.itemsize / shares
    workspace = batch_tokens * (6 * shape.width + 3 * shape.inner) * shape.itemsize + samples * shape.inputs * 4
    if grams:
        seconds["Gram matrices"] = shape.blocks * tokens * shape.token_squares / rates.flops_float32 / shares
        workspace += 4 * shape.input_squares + 4 * copies * shape.widest**2
        workspace += tokens * shape.token_inputs * shape.itemsize // shares if devices > 1 else 0
    return Prediction(
        seconds=seconds,
        bytes_in_memory=shape.model_bytes + activations + workspace,
        bytes_mapped=shape.model_bytes / devices + activations * shares / devices + workspace,
        bytes_streamed=max(shape.block_bytes, shape.outside_bytes) + activations + workspace,
        host_bytes_streamed=max(2 * shape.block_bytes, shape.outside_bytes) + PROCESS_BYTES,
    )
