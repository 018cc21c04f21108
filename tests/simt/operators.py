"""The CUDA kernels under SIMT, one function a launcher: tensors in, tensors out. What runs is csrc/cuda/plan.h's choice
for DEVICE, unless a test asks for another kernel or block shape.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from .machine import Buffer, Machine

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _struct(pointers: str, integers: str, *rest: tuple[str, type]) -> type[ctypes.Structure]:
    fields = [(name, ctypes.c_void_p) for name in pointers.split()]
    fields += [(name, ctypes.c_int64) for name in integers.split()]
    return type("Params", (ctypes.Structure,), {"_fields_": [*fields, *rest]})


_DTYPE = ("dtype", ctypes.c_int)
RowsParams = _struct("weight norm mask score_sums", "rows cols row_stride norm_rows k", _DTYPE)
NmParams = _struct("weight norm mask score_sums", "rows cols row_stride norm_rows n m", _DTYPE)
RefineParams = _struct(
    "mask weight gram swaps sums", "", ("damping", ctypes.c_double),
    *((name, ctypes.c_int64) for name in ("rows", "cols", "most_swaps", "m", "sweeps")), _DTYPE,
)  # fmt: skip
Pack24Params = _struct("weight norm values metadata overfull", "rows cols row_stride", _DTYPE)
Unpack24Params = _struct("values metadata weight", "rows cols")
PackedWeight = _struct("values codes starts", "rows cols", _DTYPE)
PackedLinearParams = type(
    "PackedLinearParams",
    (ctypes.Structure,),
    {
        "_fields_": [
            ("weight", PackedWeight),
            *((name, ctypes.c_void_p) for name in ("x", "bias", "y")),
            ("tokens", ctypes.c_int64),
        ]
    },
)
PackedExpertsParams = type(
    "PackedExpertsParams",
    (ctypes.Structure,),
    {
        "_fields_": [
            ("stack", PackedWeight),
            *((name, ctypes.c_void_p) for name in ("x", "ends", "y")),
            *((name, ctypes.c_int64) for name in ("tokens", "experts")),
        ]
    },
)
SqnormParams = _struct(
    "sqnorm x token_mask ends",
    "sequences tokens cols sequence_stride token_stride",
    ("is_shared", ctypes.c_bool),
    _DTYPE,
)


def _plan(ints: str, *rest: tuple[str, type]) -> type[ctypes.Structure]:
    return _struct("", "", *((name, ctypes.c_int) for name in ints.split()), *rest)


_FLOATS = ("distance", "half_width", "first_half_width", "inverse_cols")
RowsTuning = _struct("", "", *((name, ctypes.c_float) for name in _FLOATS), ("halves", ctypes.c_int))
RowsPlan = _plan("path quads threads", ("grid", ctypes.c_int64), ("tuning", RowsTuning))
NmPlan = _plan("path kept threads", ("grid", ctypes.c_int64))
RefinePlan = _plan("place width threads lanes", ("band", ctypes.c_int64))
LinearPlan = _plan("rows room slices stages threads")
Device = _plan("processors shared_bytes")
DEVICE = Device(4, 227 * 1024)
ROWS_PATHS = ("staged", "direct", "any")
NM_PATHS = ("vector", "any", "segments")
REFINE_PLACES = ("staged", "shared", "global")


def _planned(machine: Machine, function: str, params: ctypes.Structure, plan: ctypes.Structure) -> Any:
    getattr(machine.library, function)(ctypes.byref(params), ctypes.byref(DEVICE), ctypes.byref(plan))
    return plan


class _Selection:
    """The buffers of a selection that prunes ("prune"), also sums ("sums") or writes a mask ("mask"), of a weight
    [rows, cols] or [E, rows, cols]."""

    def __init__(self, weight: Tensor, norm: Tensor, output: str, offset: int, gap: int) -> None:
        self.output, self.shape = output, weight.shape
        self.weight = Buffer(weight.reshape(-1, weight.shape[-1]), "weight", output != "mask", offset, gap)
        self.norm = Buffer(norm, "norm", writable=False)
        self.mask = Buffer(torch.full(weight.shape, 7, dtype=torch.uint8), "mask")
        self.sums = Buffer(torch.full((*weight.shape[:-1], 2), math.nan), "score_sums")
        self.buffers = [self.weight, self.norm, self.mask, self.sums]
        self.arguments = (
            self.weight.pointer, self.norm.pointer, self.mask.pointer if output == "mask" else None,
            self.sums.pointer if output == "sums" else None, math.prod(weight.shape[:-1]), weight.shape[-1],
            weight.shape[-1] + gap, weight.shape[-2],
        )  # fmt: skip

    def result(self) -> tuple[Tensor, Tensor]:
        """(weight, and the mask, the sums or nothing of interest)"""
        weight = self.weight.tensor().view(self.shape)
        return weight, self.mask.tensor() if self.output == "mask" else self.sums.tensor()


def rows(
    machine: Machine, weight: Tensor, norm: Tensor, k: int, *, output: str = "prune", path: str | None = None,
    grid: int = 1, halves: int = 2, offset: int = 0, gap: int = 0, distance: float = 0.4, threads: int = 64,
    quads: int = 16,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`path`: "staged" or "direct" (rows_kernel, `quads` a thread), or "any" (rows_any_kernel, `threads`)."""
    selection = _Selection(weight, norm, output, offset, gap)
    params = RowsParams(*selection.arguments, k, DTYPES[weight.dtype])
    plan = RowsPlan()
    if path is None:
        _planned(machine, "simt_plan_rows", params, plan)
    else:
        if path == "direct":  # which has 4 or 16
            quads = min(quads, 16)
        halves = halves if path == "staged" else 0
        machine.library.simt_rows_plan(ctypes.byref(params), ROWS_PATHS.index(path), quads, halves, ctypes.byref(plan))
        plan.grid, plan.tuning.distance = grid, distance
        if path == "any":
            plan.threads = threads
    machine.run("simt_rows", selection.buffers, ctypes.byref(params), ctypes.byref(plan))
    return selection.result()


def nm(
    machine: Machine, weight: Tensor, norm: Tensor, n: int, m: int, *, output: str = "prune", path: str | None = None,
    grid: int = 1, offset: int = 0, gap: int = 0, threads: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`path`: "vector" (nm_kernel), "any" (nm_any_kernel) or "segments" (rows_any_kernel)."""
    selection = _Selection(weight, norm, output, offset, gap)
    params = NmParams(*selection.arguments, n, m, DTYPES[weight.dtype])
    plan = _planned(machine, "simt_plan_nm", params, NmPlan())
    if path == "vector":
        assert NM_PATHS[plan.path] == path
        plan.threads = threads
    elif path is not None:
        plan = NmPlan(NM_PATHS.index(path), 0, threads, grid)
    machine.run("simt_nm", selection.buffers, ctypes.byref(params), ctypes.byref(plan))
    return selection.result()


def refine(
    machine: Machine, mask: Tensor, weight: Tensor, gram: Tensor, damping: float, *, most_swaps: int = 0, m: int = 0,
    sweeps: int = 0, has_sums: bool = True, place: str | None = None, pairs: bool = True, threads: int = 64,
    band: int = 1 << 20, offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(mask, swaps, sums). `m` > 0: swaps in groups of so many columns. `place` of a row's state; `pairs` of columns,
    `threads` and rows of a `band` are of a launch that names one."""
    rows, cols = weight.shape
    pruned = Buffer(mask, "mask", offset=offset)
    dense, products = Buffer(weight, "weight", False, offset * weight.itemsize), Buffer(gram, "gram", writable=False)
    swaps = Buffer(torch.full((rows,), -1, dtype=torch.int32), "swaps")
    sums = Buffer(torch.full((rows, 2), math.nan, dtype=torch.float64), "sums")
    params = RefineParams(
        pruned.pointer, dense.pointer, products.pointer, swaps.pointer, sums.pointer if has_sums else None, damping,
        rows, cols, most_swaps, m, sweeps, DTYPES[weight.dtype],
    )  # fmt: skip
    plan = _planned(machine, "simt_plan_refine", params, RefinePlan())
    if place is not None:
        number = REFINE_PLACES.index(place)
        machine.library.simt_refine_plan(ctypes.byref(params), number, int(pairs), ctypes.byref(plan))
        plan.threads, plan.band, plan.lanes = threads, band, min(plan.lanes, threads)
    count = min(plan.band, rows)
    work = [
        Buffer(torch.full((count, cols), math.nan, dtype=torch.float64), "c"),
        Buffer(torch.full((count,), math.nan, dtype=torch.float64), "errors"),
        Buffer(gram.diagonal().clone(memory_format=torch.contiguous_format), "diagonal", writable=False),
    ]
    pointers = [ctypes.c_void_p(buffer.pointer) for buffer in work]
    buffers = [pruned, dense, products, swaps, sums, *work]
    machine.run("simt_refine", buffers, ctypes.byref(params), ctypes.byref(plan), *pointers)
    for buffer in work:
        buffer.tensor()  # nothing around it was written
    return pruned.tensor(), swaps.tensor(), sums.tensor()


def pack_24(machine: Machine, weight: Tensor, norm: Tensor | None, gap: int = 0) -> tuple[Tensor, Tensor, int]:
    """(values, metadata, how many groups had more than two non-zeros)"""
    rows, cols = weight.shape
    dense = Buffer(weight, "weight", writable=False, gap=gap)
    norms = Buffer(torch.ones(cols) if norm is None else norm, "norm", writable=False)
    values = Buffer(torch.full((rows, cols // 2), math.nan, dtype=weight.dtype), "values")
    metadata = Buffer(torch.full((rows, cols // 16), -1, dtype=torch.int16), "metadata")
    overfull = Buffer(torch.zeros(1, dtype=torch.int32), "overfull")
    params = Pack24Params(
        dense.pointer, None if norm is None else norms.pointer, values.pointer, metadata.pointer,
        overfull.pointer if norm is None else None, rows, cols, cols + gap, DTYPES[weight.dtype],
    )  # fmt: skip
    machine.run("simt_pack_24", [dense, norms, values, metadata, overfull], ctypes.byref(params))
    return values.tensor(), metadata.tensor(), int(overfull.tensor())


def unpack_24(machine: Machine, values: Tensor, metadata: Tensor) -> Tensor:
    rows, cols = values.shape[0], values.shape[1] * 2
    packed = [Buffer(values, "values", writable=False), Buffer(metadata, "metadata", writable=False)]
    dense = Buffer(torch.full((rows, cols), math.nan, dtype=values.dtype), "weight")
    params = Unpack24Params(packed[0].pointer, packed[1].pointer, dense.pointer, rows, cols)
    machine.run("simt_unpack_24", [*packed, dense], ctypes.byref(params))
    return dense.tensor()


class _Packed:
    """A packed weight, (values, bitmap, starts) or (values, indices), in buffers."""

    def __init__(self, packed: tuple[Tensor, ...]) -> None:
        self.rows, self.cols, self.dtype = packed[1].shape[0], packed[1].shape[1] * 8, packed[0].dtype
        self.buffers = [Buffer(tensor, ["values", "codes", "starts"][i], False) for i, tensor in enumerate(packed)]
        pointers = [buffer.pointer for buffer in self.buffers]
        self.struct = PackedWeight(
            *pointers, *[None] * (3 - len(pointers)), self.rows, self.cols, DTYPES[packed[0].dtype]
        )


def _linear_plan(machine: Machine, weight: _Packed, tokens: int, block: tuple[int, int, int]) -> LinearPlan:
    """`block`: rows (2:4: 16 or 32, a slice of a row is one), slices, warps at most."""
    plan = LinearPlan()
    machine.library.simt_linear_plan(ctypes.byref(weight.struct), ctypes.c_int64(tokens), *block, ctypes.byref(plan))
    return plan


def unpack(machine: Machine, packed: tuple[Tensor, ...], *, warps: int | None = None) -> Tensor:
    """`warps` of a block matter to a bitmap only."""
    weight = _Packed(packed)
    dense = Buffer(torch.full((weight.rows, weight.cols), math.nan, dtype=weight.dtype), "dense")
    arguments = [ctypes.byref(weight.struct), ctypes.c_void_p(dense.pointer)]
    name = "simt_unpack_sparse24"
    if len(packed) == 3:
        name = "simt_unpack_bitmap"
        plan = (
            _planned(machine, "simt_plan_unpack", weight.struct, LinearPlan())
            if warps is None
            else _linear_plan(machine, weight, 0, (1, 1, warps))
        )
        arguments.append(ctypes.byref(plan))
    machine.run(name, [*weight.buffers, dense], *arguments)
    return dense.tensor()


def packed_linear(
    machine: Machine, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, *,
    block: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [tokens, C_in] of at most 8 tokens (bitmap) or 32 (2:4); `block` as in _linear_plan."""
    weight = _Packed(packed)
    inputs = Buffer(x, "x", writable=False)
    added = Buffer(torch.zeros(1) if bias is None else bias, "bias", writable=False)
    y = Buffer(torch.full((x.shape[0], weight.rows), math.nan, dtype=x.dtype), "y")
    params = PackedLinearParams(
        weight.struct, inputs.pointer, None if bias is None else added.pointer, y.pointer, x.shape[0]
    )
    buffers = [*weight.buffers, inputs, added, y]
    plan = (
        _planned(machine, "simt_plan_linear", params, LinearPlan())
        if block is None
        else _linear_plan(machine, weight, x.shape[0], block)
    )
    name = "simt_bitmap_linear" if len(packed) == 3 else "simt_sparse24_linear"
    machine.run(name, buffers, ctypes.byref(params), ctypes.byref(plan))
    return y.tensor()


def packed_experts(
    machine: Machine, x: Tensor, packed: tuple[Tensor, ...], ends: Tensor, *, block: tuple[int, int] | None = None
) -> Tensor:
    """x [rows, C_in] sorted by expert; `block`: tokens that there is room for, warps at most."""
    stack = _Packed(packed)
    inputs, bounds = Buffer(x, "x", writable=False), Buffer(ends, "ends", writable=False)
    y = Buffer(torch.zeros((x.shape[0], stack.rows // len(ends)), dtype=x.dtype), "y")
    params = PackedExpertsParams(
        stack.struct, inputs.pointer, bounds.pointer, y.pointer, x.shape[0], len(ends)
    )  # fmt: skip
    plan = (
        _planned(machine, "simt_plan_experts", params, LinearPlan())
        if block is None
        else _linear_plan(machine, stack, block[0], (4 if len(packed) == 3 else 16, 1, block[1]))
    )
    name = "simt_bitmap_experts" if len(packed) == 3 else "simt_sparse24_experts"
    machine.run(name, [*stack.buffers, inputs, bounds, y], ctypes.byref(params), ctypes.byref(plan))
    return y.tensor()


def add_sqnorm(
    machine: Machine, sqnorm: Tensor, x: Tensor, token_mask: Tensor | None, ends: Tensor | None = None, *,
    is_vector: bool | None = None, offset: int = 0,
) -> Tensor:  # fmt: skip
    """What add_sqnorm_ leaves in `sqnorm`, for x [sequences, tokens, C_in], or [rows, C_in] with `ends`."""
    tokens, cols = x.shape[-2:]
    sequences = x.shape[0] if ends is None else ends.shape[0]
    target, inputs = Buffer(sqnorm, "sqnorm"), Buffer(x, "x", writable=False, offset=offset)
    counts = Buffer(torch.ones(1, dtype=torch.bool) if token_mask is None else token_mask, "token_mask", writable=False)
    bounds = Buffer(torch.zeros(1, dtype=torch.int32) if ends is None else ends, "ends", writable=False)
    params = SqnormParams(
        target.pointer, inputs.pointer, None if token_mask is None else counts.pointer,
        None if ends is None else bounds.pointer, sequences, tokens, cols, tokens * cols if ends is None else 0, cols,
        sqnorm.dim() == 1, DTYPES[x.dtype],
    )  # fmt: skip
    vector = machine.library.simt_sqnorm_vector(ctypes.byref(params))
    if is_vector is not None:
        vector = 16 // x.element_size() if is_vector else 1
    machine.run("simt_sqnorm", [target, inputs, counts, bounds], ctypes.byref(params), vector)
    return target.tensor()
